"""One capture as a person walks through it: its documents as pages of text, and every token's places.

Promises: a page is read from the store alone, whatever is indexed, and costs one chunk of each array; places come from
the index. Text is plain text: who shows it escapes it. Does not know experts' pages (`analysis.profile`), nor HTML.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
import zarr

from analysis.index import Indexed
from analysis.occurrences import Part
from analysis.reading import readable
from analysis.scan import Array, sizes
from analysis.tables import at_layer
from analysis.tokens import Order, TopTokens
from store.group import CaptureGroup
from store.layout import CHUNK_POSITIONS

AROUND = 12  # tokens of context on each side
CONTEXTS, DOCUMENTS, TOKENS = 20, 50, 50  # rows of a page's lists
TOP_TOKENS, MIN_COUNT = 20, 20  # of an expert by lift; a lift of a rarer token is mostly luck


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
        self.tops: dict[tuple[int, Order], xr.Dataset] = {}
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

    def documents(self, containing: str = "", page: int = 0) -> dict[str, Any]:
        """A page of the documents whose names contain a text, whatever its case."""
        wanted = containing.casefold()
        found = [number for number, name in enumerate(self.names) if wanted in name.casefold()]
        shown = found[page * DOCUMENTS : (page + 1) * DOCUMENTS]
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
            raise ValueError(f"document {document}: {self.dataset} has documents 0 to {len(self.names) - 1}")
        rows = np.flatnonzero(self.rows["document_id"] == document)
        rows = rows[np.argsort(self.rows["offset"][rows], kind="stable")]
        return [(int(row), at) for row in rows for at in range(0, int(self.rows["length"][row]), CHUNK_POSITIONS)]

    def document(self, document: int, page: int = 0) -> dict[str, Any]:
        """One page of a document: its tokens, and what they chose.

        Returns
        -------
        dict
            Beside what names it: `texts` and `ids` of its tokens; and base64 of little-endian arrays (token, layer,
            k): `expert`, of the capture's type, where its largest value is "not captured", and `weight`, uint16, in
            units of `scale`.

        Raises
        ------
        ValueError
            When there is no such document or page, or its shard cannot be decoded.
        """
        pages = self.pages_of(document)
        if not 0 <= page < max(1, len(pages)):
            raise ValueError(f"page {page} of document {document}: it has pages 0 to {max(0, len(pages) - 1)}")
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
        row, at = pages[page]
        stop = min(int(self.rows["length"][row]), at + CHUNK_POSITIONS)
        place = {"row": row, "start": at, "offset": int(self.rows["offset"][row]) + at}
        return about | self._window(row, at, stop) | place

    def _window(self, row: int, start: int, stop: int) -> dict[str, Any]:
        """Tokens, experts and weights of some positions of a row, for `document`."""
        token = self._read("token", row, start, stop)
        expert, weight = self._read("expert", row, start, stop), self._read("weight", row, start, stop)
        if not self.rows["captured"][row : row + 1].all():  # what a killed worker left is not to be shown
            expert = np.full_like(expert, np.iinfo(expert.dtype).max)
            weight = np.zeros_like(weight)
        scale = float(weight.max(initial=0)) or 1.0
        coded = np.rint(weight.astype(np.float64) * (65_535 / scale)).astype("<u2")
        roles = self._roles(row, start, stop)
        return {
            "ids": token.tolist(),
            "texts": [self.texts[number] for number in token.tolist()],
            "expert": base64.b64encode(expert.astype(expert.dtype.newbyteorder("<")).tobytes()).decode(),
            "weight": base64.b64encode(coded.tobytes()).decode(),
            "scale": scale / 65_535,
            "bytes": expert.dtype.itemsize,
            "roles": roles,
        }

    def _roles(self, row: int, start: int, stop: int) -> list[str] | None:
        """Who speaks each token of a conversation."""
        if "role" not in self.capture:
            return None
        names = self.capture["role"].attrs["flag_meanings"].split()
        return [names[role] if role < len(names) else "" for role in self._read("role", row, start, stop).tolist()]

    def _read(self, array: str, row: int, start: int, stop: int) -> Array:
        """Some positions of a row, straight from its chunk."""
        try:
            return np.asarray(self.arrays[array][row, start:stop])
        except Exception as error:  # codecs raise whatever they run into
            raise ValueError(
                f"row {row} of {self.dataset} cannot be decoded ({error}): python jobs/status.py {self.store} --verify"
                " marks what is damaged, and the same capture again does those shards"
            ) from error

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
        """A page of the places of a token: all, or those where it went to an expert at a layer."""
        at = None if layer is None else self.layers.index(layer)
        number, found = self.now.occurrences(token, at, expert, skip=page * CONTEXTS, limit=CONTEXTS)
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
        return document, self.pages_of(document).index((row, start)), position - start

    # Tokens

    @cached_property
    def token_counts(self) -> xr.Dataset:
        """How often each token was counted, and at which experts, at the layers that have a table."""
        return self.now.result("tokens")

    def find_tokens(self, text: str) -> dict[str, Any]:
        """The tokens that contain a text, the same ones first, then the most frequent: at most `TOKENS`."""
        wanted, count = text.casefold(), self.token_counts["tokens"].values
        found = [number for number, own in enumerate(self.texts) if wanted in own.casefold()]
        exactly = {text, f" {text}"}
        found.sort(key=lambda number: (self.texts[number] not in exactly, -count[number], number))
        rows = [
            {"id": number, "text": self.texts[number], "piece": self.pieces[number], "count": int(count[number])}
            for number in found[:TOKENS]
        ]
        return {"rows": rows, "number": len(found)}

    def token(self, token: int) -> dict[str, Any]:
        """A token's occurrences, and the share of them that goes to each expert, layer by layer.

        Raises
        ------
        ValueError
            When there is no such token.
        """
        if not 0 <= token < len(self.texts):
            raise ValueError(f"token {token}: the vocabulary of {self.dataset} has tokens 0 to {len(self.texts) - 1}")
        counts = self.token_counts
        own = counts["count"].values[token].astype(np.int64)
        return {
            "id": token,
            "text": self.texts[token],
            "piece": self.pieces[token],
            "special": token in self.capture.attrs["special_token_ids"],
            "count": int(counts["tokens"].values[token]),
            "layers": [int(number) for number in counts["layer"].values],
            "counts": own.tolist(),
        }

    def top(self, layer: int, by: Order) -> xr.Dataset:
        """The first tokens of all experts of a layer; computed once."""
        if (layer, by) not in self.tops:
            ranking = TopTokens([layer], top=TOP_TOKENS, by=by, min_count=MIN_COUNT if by == "lift" else 1)
            self.tops[layer, by] = ranking.finish(at_layer(self.token_counts, layer), self.capture).isel(layer=0)
        return self.tops[layer, by]

    @cached_property
    def table_layers(self) -> list[int]:
        """The layers that have a table of tokens."""
        return [int(number) for number in self.token_counts["layer"].values]
