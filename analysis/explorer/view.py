"""One capture as seen by the explorer's pages: its rows, its vocabulary, its places, and its tables of counts.

Promises: it shows the capture at one moment and does not change; slow results are computed once. Text is plain text:
the templates escape it. Does not know what a page shows: each page has its own file in this folder.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
import zarr

from analysis.explorer.index import AROUND, Indexed
from analysis.explorer.parts import Part
from analysis.explorer.phrases import Phrases
from analysis.explorer.pieces import readable
from analysis.explorer.places import in_lines, in_one_line, words_around
from analysis.metrics.scores import Scores, known_scores
from analysis.metrics.tokens import TokenOrder, expert_tokens_of, label_counts
from analysis.scanning import Array, sizes
from analysis.token_classes import CLASSES, members_by_class
from store.attributes import attributes
from store.group import CaptureGroup
from store.layout import CHUNK_POSITIONS
from store.secrets import without_secrets

ORDERS: tuple[TokenOrder, ...] = ("lift", "count")
TOP_TOKENS, MIN_COUNT = 20, 20  # of an expert by lift; the lift of a rarer token is mostly chance
INDENTED = 0.005  # of the tokens are spaces that indent a line, as in code (arbitrary)
TABLES_BYTES = 2**28  # of counts by token and expert, for as many layers as fit (arbitrary)


class Unreadable(ValueError):
    """Committed data cannot be read back."""


class View:
    """What is shown of one capture, in its state at one moment.

    Parameters
    ----------
    path, dataset
        The store, and the capture in it.
    now : Indexed
        The indexed part.
    before : View, optional
        An earlier view of the same capture: what cannot have changed is reused.
    """

    def __init__(self, path: Any, dataset: str, now: Indexed, before: View | None = None) -> None:
        self.store, self.dataset, self.now, self.capture = path, dataset, now, now.capture
        self.layers = [int(number) for number in self.capture["layer"].values]
        _, self.choices, self.experts = sizes(self.capture)
        self.pieces: list[str] = before.pieces if before else [str(piece) for piece in self.capture["piece"].values]
        self.texts: list[str] = before.texts if before else readable(self.pieces)
        self.tops: dict[tuple[int, TokenOrder], xr.Dataset] = {}
        self.tables: dict[int, Array] = {}
        self._classes: Mapping[str, Array] | None = before._classes if before else None
        self._kept = before.phrases if before else None
        self._before = before if before and before.now.parts.keys() <= now.parts.keys() else None

    @cached_property
    def arrays(self) -> Mapping[str, Any]:
        """The arrays of the store, opened once."""
        store = CaptureGroup(self.store, self.dataset).objects.zarr_store()
        return dict(zarr.open_group(store, path=self.dataset, mode="r", use_consolidated=False).arrays())

    # Documents

    @cached_property
    def names(self) -> list[str]:
        """Of all documents."""
        return [str(name) for name in self.capture["name"].values]

    @cached_property
    def rows(self) -> Mapping[str, Array]:
        """`document_id`, `length`, `offset` and `captured` of every row."""
        return {name: self.capture[name].values for name in ("document_id", "length", "offset", "captured")}

    @cached_property
    def first_row(self) -> Array:
        """The token ids of the first row; empty if there is no row."""
        return self.read("token", 0, 0, int(self.rows["length"][0])) if len(self.rows["length"]) else np.zeros(0, int)

    @cached_property
    def document_tokens(self) -> Array:
        """Tokens of every document, int64: all, and the captured ones, (2, document)."""
        documents, length = self.rows["document_id"], self.rows["length"].astype(np.int64)
        count = [np.bincount(documents, part, len(self.names)) for part in (length, length * self.rows["captured"])]
        return np.rint(count).astype(np.int64)

    @cached_property
    def folded_names(self) -> list[str]:
        """Of all documents, without case."""
        return [name.casefold() for name in self.names]

    def pages_of(self, document: int) -> list[tuple[int, int]]:
        """The pages of a document: row and first position of each, in reading order; none for an empty document.

        Raises
        ------
        ValueError
            When there is no such document.
        """
        if not 0 <= document < len(self.names):
            there = f"has documents 0 to {len(self.names) - 1}" if self.names else "has no document yet"
            raise ValueError(f"document {document}: {self.dataset} {there}")
        rows = np.flatnonzero(self.rows["document_id"] == document)
        rows = rows[np.argsort(self.rows["offset"][rows], kind="stable")]
        return [(int(row), at) for row in rows for at in range(0, int(self.rows["length"][row]), CHUNK_POSITIONS)]

    @cached_property
    def scores(self) -> Scores | None:
        """How router logits become weights; None if no logits were recorded, or the rule is not known."""
        return known_scores(self.capture)

    @cached_property
    def given(self) -> bool:
        """Whether the routes were imported: those of some tokens may be unknown."""
        return "written" in attributes(self.capture).get("identity", {})

    def read(self, array: str, row: int, start: int, stop: int) -> Array:
        """Some positions of a row, straight from its chunk."""
        try:
            return np.asarray(self.arrays[array][row, start:stop])
        except Exception as error:  # codecs raise many types
            raise self.unreadable(row, without_secrets(str(error))) from error

    def unreadable(self, row: int, reason: str) -> Unreadable:
        """The error for a row whose bytes are not what was committed."""
        return Unreadable(
            f"row {row} of {self.dataset} cannot be decoded ({reason}): python jobs/status.py {self.store} --verify"
            " marks the damaged shards, and running the same capture again redoes them"
        )

    # Places

    @cached_property
    def indented(self) -> bool:
        """Whether its texts are indented, like code; if so, their lines are kept."""
        blank = [text.isspace() and len(text.replace("\n", "")) > 1 for text in self.texts]
        return bool(self.token_counts[blank].sum() > INDENTED * self.token_counts.sum())

    def place(
        self, part: Part, row: int, position: int, shares: Array | None = None, tokens: int = 1
    ) -> dict[str, Any]:
        """A token in its row, or several as one, with the text around it and its document; `shares` says how strongly
        it and the `AROUND` tokens on both sides are shaded."""
        ids, at = part.around(row, position, AROUND, tokens)
        texts = [self.texts[number] for number in ids.tolist()]
        texts[at : at + tokens] = ["".join(texts[at : at + tokens])]
        document = int(self.rows["document_id"][row])
        own = None if shares is None else shares[AROUND - at :][: len(ids)].tolist()
        words = words_around(texts, at, own)
        return {
            **(in_lines(words) if self.indented else in_one_line(words)),
            "row": row,
            "position": position,
            "document": document,
            "name": self.names[document],
            "experts": [],
            "weight": None,
        }

    def chosen_layer(self, layer: int | None, expert: int | None) -> int | None:
        """The index of a layer whose number is given together with an expert; None if neither is given.

        Raises
        ------
        ValueError
            When there is no such layer or expert, or one is given without the other.
        """
        if (layer is None) != (expert is None) or not (layer is None or layer in self.layers):
            raise ValueError(f"name a layer of {self.layers[0]} to {self.layers[-1]} and an expert, or neither")
        if expert is not None and not 0 <= expert < self.experts:
            raise ValueError(f"expert {expert}: {self.dataset} has experts 0 to {self.experts - 1}")
        return None if layer is None else self.layers.index(layer)

    def page_at(self, row: int, position: int) -> tuple[int, int, int]:
        """The document of a place, its page, and the token on that page.

        Raises
        ------
        ValueError
            When there is no such place.
        """
        lengths = self.rows["length"]
        if not (0 <= row < len(lengths) and 0 <= position < lengths[row]):
            raise ValueError(f"{self.dataset} has no token in row {row} at position {position}")
        document = int(self.rows["document_id"][row])
        start = position // CHUNK_POSITIONS * CHUNK_POSITIONS
        return document, self.pages_of(document).index((row, start)) + 1, position - start

    # Tokens

    @cached_property
    def phrases(self) -> Phrases:
        """For finding phrases."""
        return Phrases(self.pieces, self.capture.attrs["special_token_ids"]) if self._kept is None else self._kept

    def tokens_containing(self, text: str) -> list[int]:
        """Ids of the tokens that contain a text, in their piece or in readable form, ignoring case; in order."""
        wanted, (joined, starts) = text.casefold().replace("\0", ""), self._joined
        found, at = set[int](), joined.find(wanted)
        while at >= 0:
            token = bisect_right(starts, at) - 1
            found.add(token)
            at = joined.find(wanted, starts[token + 1])
        return sorted(found)

    @cached_property
    def _joined(self) -> tuple[str, list[int]]:
        """All pieces and texts, case-folded and concatenated, and where each token's begin."""
        both = [f"{piece}\0{text}\0".casefold() for piece, text in zip(self.pieces, self.texts, strict=True)]
        return "".join(both), [0, *itertools.accumulate(map(len, both))]

    @cached_property
    def token_counts(self) -> Array:
        """How often each token was counted, int64 (token_id)."""
        before, known = (None, set()) if self._before is None else (self._before, self._before.now.parts.keys())
        count = np.zeros(len(self.texts), np.int64) if before is None else before.token_counts.copy()
        for name, part in self.now.parts.items():
            if name not in known:
                count += np.diff(part.bounds.astype(np.int64))
        return count

    def top(self, layer: int, by: TokenOrder) -> xr.Dataset:
        """The first tokens of all experts of a layer; computed once."""
        if (layer, by) not in self.tops:
            count = self.table(self.layers.index(layer))[:, None]
            counts = label_counts(count, self.token_counts, [layer], self.capture)
            least = MIN_COUNT if by == "lift" else 1
            self.tops[layer, by] = expert_tokens_of(counts, layer, top=TOP_TOKENS, by=by, min_count=least)
        return self.tops[layer, by]

    def table(self, at: int) -> Array:
        """How often each token went to each expert at a layer (by index), int64 (token_id, expert)."""
        if at in self.tables:
            return self.tables[at]
        before = self._before if self._before is not None and at in self._before.tables else None
        count = np.zeros((len(self.texts), self.experts), np.int64) if before is None else before.tables[at].copy()
        known = set() if before is None else before.now.parts.keys()
        for name, part in self.now.parts.items():
            if name not in known:
                part.add_table(at, count)
        if self.has_room:
            self.tables[at] = count
        elif count.nbytes <= TABLES_BYTES:
            self.tables = {at: count}  # a page asks a layer for more than one thing
        return count

    @property
    def classes(self) -> Mapping[str, Array]:
        """The token classes that occur in the vocabulary, by name, and their tokens: bool (token_id)."""
        if self._classes is None:
            self._classes = {name: own for name, own in members_by_class(CLASSES, self.pieces).items() if own.any()}
        return self._classes

    @property
    def has_room(self) -> bool:
        """Whether there is room for the tables of all layers."""
        return 8 * len(self.layers) * len(self.texts) * self.experts <= TABLES_BYTES

    def warm(self) -> None:
        """Compute what the first visitors would wait for, and drop the earlier view."""
        _ = self.document_tokens, self.token_counts
        self.now.occurrences(0, 0, 0)  # compiled
        self.phrases.find("the", self.now.parts.values(), self.token_counts, skip=0, limit=1)  # likewise
        if self.has_room:
            for at, layer in enumerate(self.layers):
                self.table(at)
                for by in ORDERS:
                    self.top(layer, by)
        self._before = None


def refuse_page(page: int, number: int, rows: int) -> None:
    """Raise a ValueError if a list of so many rows has no such page."""
    pages = max(1, -(-number // rows))
    if not 1 <= page <= pages:
        raise ValueError(f"page {page}: pages are 1 to {pages}")
