"""One capture as a person walks through it: its documents as pages of text, and every token's places.

Promises: a page is read from the store alone, whatever is indexed, and costs one chunk of each array; places come from
the index. Text is plain text: who shows it escapes it. Does not know experts' pages (`analysis.explorer.expert`), nor
HTML.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
import zarr

from analysis.explorer.index import Indexed
from analysis.explorer.parts import Part
from analysis.explorer.pieces import readable
from analysis.metrics.scores import Scores, entropies, known_scores, probabilities
from analysis.metrics.tokens import TokenOrder, expert_tokens_of, label_counts
from analysis.scanning import Array, sizes
from store.attributes import attributes
from store.group import CaptureGroup
from store.layout import CHUNK_POSITIONS, LABELS
from store.secrets import without_secrets

AROUND = 12  # tokens of context on each side
CONTEXTS, DOCUMENTS, TOKENS = 20, 50, 50  # rows of a page's lists
ORDERS: tuple[TokenOrder, ...] = ("lift", "count")
TOP_TOKENS, MIN_COUNT = 20, 20  # of an expert by lift; a lift of a rarer token is mostly luck
MAPPED = 2**25  # choices that a token's map is made of at most, where there are no tables: 50 ms (measured)
TABLES_BYTES = 2**28  # of counts by token and expert, for as many layers as have room (arbitrary)


class Unreadable(ValueError):
    """What is committed cannot be read back."""


class View:
    """What is shown of one capture, as far as it was captured at one moment.

    Parameters
    ----------
    path, dataset
        The store, and the capture in it.
    now : Indexed
        What of it is indexed.
    before : View, optional
        An earlier view of the same capture: what cannot have changed is taken from it.
    """

    def __init__(self, path: Any, dataset: str, now: Indexed, before: View | None = None) -> None:
        self.store, self.dataset, self.now, self.capture = path, dataset, now, now.capture
        self.layers = [int(number) for number in self.capture["layer"].values]
        _, self.choices, self.experts = sizes(self.capture)
        self.pieces: list[str] = before.pieces if before else [str(piece) for piece in self.capture["piece"].values]
        self.texts: list[str] = before.texts if before else readable(self.pieces)
        self.tops: dict[tuple[int, TokenOrder], xr.Dataset] = {}
        self.tables: dict[int, Array] = {}
        self._before = before if before and before.now.parts.keys() <= now.parts.keys() else None
        group = CaptureGroup(path, dataset)
        self.arrays: Any = zarr.open_group(group.objects.zarr_store(), path=dataset, mode="r", use_consolidated=False)

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
    def document_tokens(self) -> Array:
        """Tokens of every document, int64: all, and those that are captured, (2, document)."""
        documents, length = self.rows["document_id"], self.rows["length"].astype(np.int64)
        count = [np.bincount(documents, part, len(self.names)) for part in (length, length * self.rows["captured"])]
        return np.rint(count).astype(np.int64)

    @cached_property
    def _folded(self) -> list[str]:
        return [name.casefold() for name in self.names]

    def documents(self, containing: str = "", page: int = 1) -> dict[str, Any]:
        """A page, from 1 on, of the documents whose names contain a text, whatever its case.

        Raises
        ------
        ValueError
            When there is no such page.
        """
        wanted, found = containing.casefold(), list(range(len(self.names)))
        if wanted:
            found = [number for number, name in enumerate(self._folded) if wanted in name]
        _refuse_page(page, len(found), DOCUMENTS)
        shown = found[(page - 1) * DOCUMENTS : page * DOCUMENTS]
        tokens, captured = self.document_tokens
        rows = [
            {"id": number, "name": self.names[number], "tokens": int(tokens[number]), "captured": int(captured[number])}
            for number in shown
        ]
        return {"rows": rows, "number": len(found), "page": page, "pages": -(-len(found) // DOCUMENTS)}

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

    def document(self, document: int, page: int = 1) -> dict[str, Any]:
        """One page of a document, from 1 on: its tokens, and what they chose.

        Returns
        -------
        dict
            Beside what names it: `texts` and `ids` of its tokens; and base64 of little-endian arrays (token, layer,
            k): `expert`, of the capture's type, where its largest value is "not captured", and `weight`, uint16, in
            units of `scale`. Where they were recorded, base64 of float32: `surprise` (token) at what comes next, in
            nats, and `entropy` (token, layer) of the routers, in bits; NaN where it is not known.

        Raises
        ------
        ValueError
            When there is no such document or page, or its shard cannot be decoded.
        """
        pages = self.pages_of(document)
        if not 1 <= page <= max(1, len(pages)):
            raise ValueError(f"page {page} of document {document}: it has pages 1 to {max(1, len(pages))}")
        about = {
            "dataset": self.dataset,
            "document": document,
            "name": self.names[document],
            "tokens": int(self.document_tokens[0, document]),
            "page": page,
            "pages": len(pages),
        }
        if not pages:
            return about | self._window(0, 0, 0) | {"row": 0, "start": 0, "offset": 0}
        row, at = pages[page - 1]
        length = self.rows["length"]
        stop = min(int(length[row]), at + CHUNK_POSITIONS)
        before = sum(int(length[other]) for other in {other for other, _ in pages[: page - 1]} - {row})
        return about | self._window(row, at, stop) | {"row": row, "start": at, "offset": before + at}

    def whole(self, document: int) -> dict[str, Any]:
        """A document as one page, however long.

        Raises
        ------
        ValueError
            As `document`.
        """
        pages = [self._arrays(row, 0, int(self.rows["length"][row])) for row in dict(self.pages_of(document))]
        about = {"dataset": self.dataset, "document": document, "name": self.names[document], "offset": 0}
        if not pages:
            return about | self._window(0, 0, 0)
        return about | self._coded(*(np.concatenate(parts) for parts in zip(*pages, strict=True)))

    def _window(self, row: int, start: int, stop: int) -> dict[str, Any]:
        """Tokens, experts and weights of some positions of a row, for `document`."""
        return self._coded(*self._arrays(row, start, stop))

    def distribution(self, row: int, position: int) -> dict[str, Any]:
        """What the routers computed for one token.

        Returns
        -------
        dict
            Lists by layer: `experts`, ids; their `probability`; and `chosen`, the ids that the router chose. `of`: the
            experts of a layer, more than are listed where only the largest logits were recorded.

        Raises
        ------
        ValueError
            When there is no such place, it is not captured, or no logits were recorded.
        """
        self.page_at(row, position)
        if self.scores is None:
            raise ValueError(f"{self.dataset} has no distributions: its routers' logits were not recorded")
        logit, expert = (self._read(name, row, position, position + 1)[0] for name in ("logit", "expert"))
        if not self.rows["captured"][row] or np.isnan(logit).any():
            raise ValueError(f"row {row} of {self.dataset} is not captured yet")
        ids = np.tile(np.arange(self.experts), (len(logit), 1))
        if self.scores.truncated:
            ids = self._read("logit_expert", row, position, position + 1)[0]
        return {
            "experts": ids.tolist(),
            "probability": np.round(probabilities(logit, self.scores), 6).tolist(),
            "chosen": expert.tolist(),
            "of": self.experts,
        }

    @cached_property
    def scores(self) -> Scores | None:
        """How router logits become weights; None where none were recorded, or that is not known."""
        return known_scores(self.capture)

    def _measured(self, row: int, start: int, stop: int) -> tuple[Array, Array]:
        """Surprise (position) and entropy (position, layer), float32; of no length where they were not recorded."""
        surprise, entropy = np.empty(0, np.float32), np.empty((0, len(self.layers)), np.float32)
        if "logprob" in self.capture:
            surprise = -self._read("logprob", row, start, stop)
        if self.scores is not None:
            logit = self._read("logit", row, start, stop)
            entropy = entropies(logit, self.scores.experts, self.scores.sigmoid).astype(np.float32)
        if not self.rows["captured"][row : row + 1].all():
            return np.full_like(surprise, np.nan), np.full_like(entropy, np.nan)
        return surprise, entropy

    def _arrays(self, row: int, start: int, stop: int) -> tuple[Array, ...]:
        """Tokens, experts, weights, surprise, entropy, speakers and phases of some positions of a row; fill where it is
        not captured."""
        token, expert = (self._read(name, row, start, stop) for name in ("token", "expert"))
        weight = self._read("weight", row, start, stop) if "weight" in self.capture else np.ones(expert.shape)
        labels = [
            self._read(name, row, start, stop) if name in self.capture else np.empty(0, np.uint8) for name in LABELS
        ]
        missing = np.iinfo(expert.dtype).max
        if not self.rows["captured"][row : row + 1].all():  # what a killed worker left is not to be shown
            expert, weight = np.full_like(expert, missing), np.zeros_like(weight)
        elif (expert == missing).any() and not self.given:
            raise self._unreadable(row, "experts are gone")
        elif len(weight) and not weight.any() and not self.given:
            raise self._unreadable(row, "weights are gone")
        if (token < 0).any() or (token >= len(self.texts)).any():
            raise self._unreadable(row, "tokens are gone")
        return token, expert, weight, *self._measured(row, start, stop), *labels

    @cached_property
    def given(self) -> bool:
        """Whether the routes came from elsewhere: those of some tokens may not be known."""
        return "written" in attributes(self.capture).get("identity", {})

    def _coded(
        self, token: Array, expert: Array, weight: Array, surprise: Array, entropy: Array, *labels: Array
    ) -> dict[str, Any]:
        scale = float(weight.max(initial=0)) or 1.0
        coded = np.rint(weight.astype(np.float64) * (65_535 / scale)).astype("<u2")
        return {
            "ids": token.tolist(),
            "texts": [self.texts[number] for number in token.tolist()],
            "expert": base64.b64encode(expert.astype(expert.dtype.newbyteorder("<")).tobytes()).decode(),
            "weight": base64.b64encode(coded.tobytes()).decode(),
            "scale": scale / 65_535,
            "bytes": expert.dtype.itemsize,
            "weighed": "weight" in self.capture,
            "roles": self._labelled(labels),
            "surprise": _in_float32(surprise) if "logprob" in self.capture else None,
            "entropy": _in_float32(entropy) if self.scores is not None else None,
        }

    def _labelled(self, labels: Sequence[Array]) -> list[str] | None:
        """Who speaks each token of a conversation, and whether it is of the prompt or generated."""
        named = []
        for name, numbers in zip(LABELS, labels, strict=True):
            if name in self.capture:
                names = self.capture[name].attrs["flag_meanings"].split()
                named.append([names[number] if number < len(names) else "" for number in numbers.tolist()])
        return [", ".join(filter(None, each)) for each in zip(*named, strict=True)] if named else None

    def _read(self, array: str, row: int, start: int, stop: int) -> Array:
        """Some positions of a row, straight from its chunk."""
        try:
            return np.asarray(self.arrays[array][row, start:stop])
        except Exception as error:  # codecs raise whatever they run into
            raise self._unreadable(row, without_secrets(str(error))) from error

    def _unreadable(self, row: int, reason: str) -> Unreadable:
        return Unreadable(
            f"row {row} of {self.dataset} cannot be decoded ({reason}): python jobs/status.py {self.store} --verify"
            " marks what is damaged, and the same capture again does those shards"
        )

    # Places

    def place(self, part: Part, row: int, position: int) -> dict[str, Any]:
        """A token in its row, with the text around it, and which page of which document it is on."""
        ids, at = part.around(row, position, AROUND)
        texts = [self.texts[number] for number in ids.tolist()]
        document = int(self.rows["document_id"][row])
        return {
            "row": row,
            "position": position,
            "before": "".join(texts[:at]),
            "token": texts[at],
            "after": "".join(texts[at + 1 :]),
            "document": document,
            "name": self.names[document],
            "experts": [],
            "weight": None,
        }

    def contexts(self, token: int, layer: int | None, expert: int | None, page: int) -> dict[str, Any]:
        """A page, from 1 on, of the places of a token: all, or those where it went to an expert at a layer.

        Raises
        ------
        ValueError
            When there is no such layer, expert or page.
        """
        if (layer is None) != (expert is None) or not (layer is None or layer in self.layers):
            raise ValueError(f"name a layer of {self.layers[0]} to {self.layers[-1]} and an expert, or neither")
        if expert is not None and not 0 <= expert < self.experts:
            raise ValueError(f"expert {expert}: {self.dataset} has experts 0 to {self.experts - 1}")
        at = None if layer is None else self.layers.index(layer)
        number, found = self.now.occurrences(token, at, expert, skip=max(0, page - 1) * CONTEXTS, limit=CONTEXTS)
        _refuse_page(page, number, CONTEXTS)
        rows = []
        for part, index in found:
            [row], [position] = part.places(np.array([index]))
            chosen = [] if at is None else part.expert[at, index].tolist()
            rows.append(self.place(part, int(row), int(position)) | {"experts": chosen})
        return {"rows": rows, "number": number, "page": page, "pages": -(-number // CONTEXTS)}

    def page_at(self, row: int, position: int) -> tuple[int, int, int]:
        """The document, its page, and the token on it, of a place.

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
    def token_counts(self) -> Array:
        """How often each token was counted, int64 (token_id)."""
        before, known = (None, set()) if self._before is None else (self._before, self._before.now.parts.keys())
        count = np.zeros(len(self.texts), np.int64) if before is None else before.token_counts.copy()
        for name, part in self.now.parts.items():
            if name not in known:
                count += np.diff(part.bounds.astype(np.int64))
        return count

    def find_tokens(self, text: str) -> dict[str, Any]:
        """The tokens that contain a text, in their piece or as they read: the same ones first, then by frequency."""
        text = text.replace("↵", "\n")
        wanted, count = text.casefold(), self.token_counts
        both = zip(self.pieces, self.texts, strict=True)
        found = [at for at, names in enumerate(both) if any(wanted in name.casefold() for name in names)]
        exactly = {text, f" {text}", f"▁{text}"}
        found.sort(key=lambda at: (self.texts[at] not in exactly and self.pieces[at] not in exactly, -count[at], at))
        rows = [
            {"id": number, "text": self.texts[number], "piece": self.pieces[number], "count": int(count[number])}
            for number in found[:TOKENS]
        ]
        return {"rows": rows, "number": len(found)}

    def token(self, token: int) -> dict[str, Any]:
        """A token's occurrences, and how many of them chose each expert, layer by layer.

        Returns
        -------
        dict
            `count`: its occurrences; `of`: as many of them as `counts` [layer][expert] are of, the first ones where
            it is too frequent for all.

        Raises
        ------
        ValueError
            When there is no such token.
        """
        if not 0 <= token < len(self.texts):
            raise ValueError(f"token {token}: the vocabulary of {self.dataset} has tokens 0 to {len(self.texts) - 1}")
        of, counts = self._map(token)
        return {
            "id": token,
            "text": self.texts[token],
            "piece": self.pieces[token],
            "special": token in self.capture.attrs["special_token_ids"],
            "count": int(self.token_counts[token]),
            "of": of,
            "counts": counts.tolist(),
        }

    def _map(self, token: int) -> tuple[int, Array]:
        """How many occurrences were looked at, and their choices (layer, expert)."""
        if len(self.tables) == len(self.layers):
            return int(self.token_counts[token]), np.stack([self.tables[at][token] for at in range(len(self.layers))])
        counts, of = np.zeros((len(self.layers), self.experts), np.int64), 0
        most = max(1, MAPPED // (len(self.layers) * self.choices))
        for part in self.now.parts.values():
            if of < most:
                of += part.add_map(token, most - of, counts)
        return of, counts

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
        return count

    @property
    def has_room(self) -> bool:
        """Whether the tables of all layers may be kept."""
        return 8 * len(self.layers) * len(self.texts) * self.experts <= TABLES_BYTES

    def warm(self) -> None:
        """Compute what the first visitors would wait for, and forget the view before."""
        _ = self.document_tokens, self.token_counts
        self.now.occurrences(0, 0, 0)  # compiled
        if self.has_room:
            for at, layer in enumerate(self.layers):
                self.table(at)
                for by in ORDERS:
                    self.top(layer, by)
        self._before = None


def _in_float32(values: Array) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _refuse_page(page: int, number: int, rows: int) -> None:
    pages = max(1, -(-number // rows))
    if not 1 <= page <= pages:
        raise ValueError(f"page {page}: there are pages 1 to {pages}")
