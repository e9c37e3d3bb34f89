"""The places and experts of every token of a shard: one part of the explorer's index.

A part is one memory-mapped file, so a query reads only what it needs: the shard's occurrences in the order of their
token ids, with their experts, layer by layer. "Token 262 at layer 7" is one contiguous range.

Promises: a part is complete or absent; a truncated file or one of another kind is rejected when it is opened. Does not
know which shards there are: `analysis.explorer.index`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import xarray as xr

from analysis.scanning import Array, Block, Reducer, State, kernel, sizes
from store.files import whole_file

MARK = 0x32_5452_4150_4145  # "EAPART2" as a number: what these files begin with
ALIGNED = 128  # bytes: each array starts at a multiple of it; the first such block holds their sizes
SIZES = 9  # integers in that header
WIDTHS = (1, 2, 4)  # bytes of a count


class Part:
    """One shard, laid out for lookups.

    Parameters
    ----------
    file : Path
        Written by `Occurrences`.
    first_row : int
        The shard's first row in the capture.

    Attributes
    ----------
    token : array, shape (tokens,), int32
        The shard's text: the token ids of all rows, one row after the other.
    start : array, shape (rows + 1,), uint32
        Where each row begins in it.
    order : array, shape (occurrences,), uint32
        Places in `token`, ordered by token id and then by place, without special tokens and without what is not
        captured or not selected.
    bounds : array, shape (vocabulary + 1,), uint32
        Where each token's occurrences begin in `order`.
    expert : array, shape (layers, occurrences, k), of the capture's type
        The choices there.
    load : array, shape (rows, layers, experts), uint16 or uint32
        How often each row's counted tokens chose each expert.

    Raises
    ------
    ValueError
        When the file is not a complete part.
    """

    token: Array
    start: Array
    order: Array
    bounds: Array
    expert: Array
    load: Array

    def __init__(self, file: Path, first_row: int) -> None:
        self.first_row = first_row
        data = np.asarray(np.memmap(file, np.uint8, "r"))
        if data.size < ALIGNED or data[:8].view(np.int64)[0] != MARK:
            raise ValueError(f"{file} is not a part of an index")
        at, sizes = ALIGNED, data[8 : 8 + 8 * SIZES].view(np.int64).tolist()
        if sizes[-1] not in WIDTHS:
            raise ValueError(f"{file} is damaged: its header has no sizes")
        for name, (dtype, shape) in _layout(*sizes).items():
            size = prod(shape) * dtype.itemsize
            if at + size > data.size:
                raise ValueError(f"{file} is truncated: {data.size} bytes")
            setattr(self, name, data[at : at + size].view(dtype).reshape(shape))
            at += -(-size // ALIGNED) * ALIGNED
        if data.size != at:
            raise ValueError(f"{file} has {data.size} bytes instead of {at}")
        if self.bounds[-1] != len(self.order) or self.start[-1] != len(self.token):
            raise ValueError(f"{file} is damaged: its bounds do not end where its arrays do")

    def count(self, token: int, layer: int | None = None, expert: int | None = None) -> int:
        """How often a token occurs, or went to an expert at a layer (by index)."""
        low, high = int(self.bounds[token]), int(self.bounds[token + 1])
        if layer is None or expert is None:
            return high - low
        return int(_count(self.expert[layer, low:high], expert))

    def find(self, token: int, layer: int | None = None, expert: int | None = None) -> Array:
        """The same occurrences, as indices into `order`."""
        low, high = int(self.bounds[token]), int(self.bounds[token + 1])
        if layer is None or expert is None:
            return np.arange(low, high)
        return low + np.flatnonzero((self.expert[layer, low:high] == expert).any(axis=1))

    def find_all(self, tokens: Array, layer: int | None = None, expert: int | None = None) -> Array:
        """The occurrences of any of some tokens, or those at an expert of a layer (by index), as indices into
        `order`."""
        found = [
            self.find(int(token), layer, expert) for token in tokens if self.bounds[token] < self.bounds[token + 1]
        ]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def add_table(self, layer: int, count: Array) -> None:
        """Add to `count` (vocabulary, expert) how often each token went to each expert at a layer (by index)."""
        _add_table(self.expert[layer], self.bounds, count)

    def add_map(self, token: int, most: int, count: Array) -> int:
        """Add to `count` (layer, expert) what the first `most` occurrences of a token chose, and return their
        number."""
        low, high = int(self.bounds[token]), int(self.bounds[token + 1])
        high = min(high, low + most)
        _add_map(self.expert[:, low:high], count)
        return high - low

    def places(self, found: Array) -> tuple[Array, Array]:
        """Rows of the capture, and positions in them, for indices into `order`."""
        place = self.order[found].astype(np.int64)
        row = np.searchsorted(self.start, place, side="right") - 1
        return self.first_row + row, place - self.start[row]

    def before(self, token: int, row: int, position: int) -> int:
        """How many occurrences of a token precede a place of the capture."""
        low, high = int(self.bounds[token]), int(self.bounds[token + 1])
        at = min(max(row - self.first_row, -1), len(self.start) - 1)
        place = self.start[at] + position if 0 <= at < len(self.start) - 1 else -1 if at < 0 else len(self.token)
        return int(np.searchsorted(self.order[low:high], place))

    def around(self, row: int, position: int, tokens: int, reach: int = 1) -> tuple[Array, int]:
        """Token ids of a row: `reach` tokens from a position on and up to `tokens` on both sides, and the position's
        index."""
        low, high = (int(self.start[row - self.first_row + step]) for step in (0, 1))
        here = low + position
        first = max(low, here - tokens)
        return self.token[first : min(high, here + reach + tokens)], here - first


class Occurrences(Reducer):
    """Writes the part of each shard that it sees, unless it exists; counts nothing.

    Parameters
    ----------
    folder : Path
        Where parts are written.
    names : mapping
        The name of a shard's part by the number of its first row.
    """

    def __init__(self, folder: Path, names: Mapping[int, str]) -> None:
        self.folder, self.names = folder, names

    def init(self, dataset: xr.Dataset) -> State:
        """The size of the vocabulary and of a layer, which a block does not hold."""
        return {"vocabulary": np.array(dataset.sizes["token_id"]), "experts": np.array(sizes(dataset)[2])}

    def update(self, state: State, block: Block) -> None:
        """Write one shard's part."""
        file = self.folder / self.names[int(block["row"][0])]
        if not file.exists():
            _write(file, _ordered(block, int(state["vocabulary"]), int(state["experts"])))

    def merge(self, state: State, other: State) -> State:
        """Nothing to add."""
        return state

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Nothing: the parts are the result."""
        return xr.Dataset()


def _layout(
    rows: int,
    tokens: int,
    occurrences: int,
    vocabulary: int,
    layers: int,
    choices: int,
    expert_bytes: int,
    experts: int,
    load_bytes: int,
) -> dict[str, tuple[np.dtype[np.generic], tuple[int, ...]]]:
    """Types and shapes of a part's arrays, in order."""
    return {
        "token": (np.dtype(np.int32), (tokens,)),
        "start": (np.dtype(np.uint32), (rows + 1,)),
        "order": (np.dtype(np.uint32), (occurrences,)),
        "bounds": (np.dtype(np.uint32), (vocabulary + 1,)),
        "expert": (np.dtype(f"u{expert_bytes}"), (layers, occurrences, choices)),
        "load": (np.dtype(f"u{load_bytes}"), (rows, layers, experts)),
    }


def _ordered(block: Block, vocabulary: int, experts: int) -> dict[str, Array]:
    """A part's arrays."""
    filled = np.arange(block["token"].shape[1]) < block["length"][:, None]
    token = block["token"][filled]
    counted = np.flatnonzero(block["counted"][filled])
    order = counted[np.argsort(token[counted], kind="stable")]
    rows, positions, layers, _ = block["expert"].shape
    load = np.zeros((rows, layers, experts), np.min_scalar_type(max(positions, 2**8)))
    _add_rows(block["expert"], block["counted"], load)
    return {
        "token": token,
        "start": np.concatenate([[0], np.cumsum(block["length"])]),
        "order": order,
        "bounds": np.searchsorted(token[order], np.arange(vocabulary + 1)),
        "expert": _by_layer(block["expert"], np.flatnonzero(filled)[order]),
        "load": load,
    }


def _write(file: Path, arrays: Mapping[str, Array]) -> None:
    """Write a part atomically."""
    layers, occurrences, choices = arrays["expert"].shape
    rows, vocabulary = len(arrays["start"]) - 1, len(arrays["bounds"]) - 1
    expert, load = arrays["expert"], arrays["load"]
    shapes = rows, len(arrays["token"]), occurrences, vocabulary, layers, choices, expert.itemsize
    header = MARK, *shapes, load.shape[-1], load.itemsize
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as unfinished, unfinished.open("wb") as stream:
        stream.write(np.array(header, np.int64).tobytes().ljust(ALIGNED, b"\0"))
        for name, (dtype, _) in _layout(*header[1:]).items():
            data = arrays[name].astype(dtype, copy=False).tobytes()
            stream.write(data + bytes(-len(data) % ALIGNED))


@kernel
def _by_layer(expert: Array, place: Array) -> Array:
    """The experts at some places of a shard, (layer, place, k)."""
    rows, positions, layers, choices = expert.shape
    flat = expert.reshape(rows * positions, layers, choices)
    ordered = np.empty((layers, place.size, choices), dtype=expert.dtype)
    for index in range(place.size):
        for layer in range(layers):
            for k in range(choices):
                ordered[layer, index, k] = flat[place[index], layer, k]
    return ordered


@kernel
def _add_rows(expert: Array, counted: Array, load: Array) -> None:
    """Count the choices of each row (row, layer, expert)."""
    rows, positions, layers, choices = expert.shape
    for row in range(rows):
        for position in range(positions):
            if counted[row, position]:
                for layer in range(layers):
                    for k in range(choices):
                        load[row, layer, expert[row, position, layer, k]] += 1


@kernel
def _count(choices: Array, expert: int) -> int:
    """How many of the occurrences (occurrence, k) chose an expert; a token chooses an expert at most once."""
    number = 0
    for choice in choices.ravel():
        number += choice == expert
    return number


@kernel
def _add_table(choices: Array, bounds: Array, count: Array) -> None:
    for token in range(len(bounds) - 1):
        for index in range(bounds[token], bounds[token + 1]):
            for k in range(choices.shape[1]):
                count[token, choices[index, k]] += 1


@kernel
def _add_map(choices: Array, count: Array) -> None:
    for layer in range(choices.shape[0]):
        for index in range(choices.shape[1]):
            for k in range(choices.shape[2]):
                count[layer, choices[layer, index, k]] += 1
