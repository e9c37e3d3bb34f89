"""Where every token of a shard stands, and with which experts: one part of the explorer's index.

A part is plain arrays mapped into memory, so that what is asked for is read and nothing else: the occurrences of the
shard in the order of their tokens, with their experts, layer by layer. "Token 262 at layer 7" is one contiguous range.

Promises: a part is whole or absent. Does not know which shards there are: `analysis.index`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xarray as xr

from analysis.scan import Array, Block, Reducer, State, kernel


class Part:
    """One shard, laid out for looking up.

    Parameters
    ----------
    folder : Path
        Where `Occurrences` has written it.
    first_row : int
        Row of the capture that is the shard's first.

    Attributes
    ----------
    token : array, shape (tokens,), int32
        The shard's text: the token ids of all rows, one row after the other.
    start : array, shape (rows + 1,), uint32
        Where each row begins in it.
    order : array, shape (occurrences,), uint32
        Places in `token`, ordered by token id and then by place; special tokens and what is not captured are left out.
    bounds : array, shape (vocabulary + 1,), uint32
        Where each token's occurrences begin in `order`.
    expert : array, shape (layers, occurrences, k), of the capture's type
        The choices there.
    """

    token: Array
    start: Array
    order: Array
    bounds: Array
    expert: Array

    def __init__(self, folder: Path, first_row: int) -> None:
        for name in Part.__annotations__:
            setattr(self, name, np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")))
        self.first_row = first_row

    def count(self, token: int, layer: int | None = None, expert: int | None = None) -> int:
        """How often a token occurs, or went to an expert at a layer (by index)."""
        low, high = int(self.bounds[token]), int(self.bounds[token + 1])
        if layer is None or expert is None:
            return high - low
        return int(_count(self.expert[layer, low:high], expert))

    def find(self, token: int, layer: int | None = None, expert: int | None = None) -> Array:
        """Where, as indices into `order`."""
        low, high = int(self.bounds[token]), int(self.bounds[token + 1])
        if layer is None or expert is None:
            return np.arange(low, high)
        return low + np.flatnonzero((self.expert[layer, low:high] == expert).any(axis=1))

    def places(self, found: Array) -> tuple[Array, Array]:
        """Rows of the capture, and positions in them, of indices into `order`."""
        place = self.order[found].astype(np.int64)
        row = np.searchsorted(self.start, place, side="right") - 1
        return self.first_row + row, place - self.start[row]

    def around(self, row: int, position: int, tokens: int) -> tuple[Array, int]:
        """Token ids of a row, up to so many on both sides of a position, and the position's index among them."""
        low, high = (int(self.start[row - self.first_row + step]) for step in (0, 1))
        here = low + position
        first = max(low, here - tokens)
        return self.token[first : min(high, here + tokens + 1)], here - first


class Occurrences(Reducer):
    """Writes the part of each shard that it sees, unless it is there; counts nothing.

    Parameters
    ----------
    folder : Path
        Where parts go.
    names : mapping
        The name of a shard's part by the number of its first row.
    """

    def __init__(self, folder: Path, names: Mapping[int, str]) -> None:
        self.folder, self.names = folder, names

    def init(self, dataset: xr.Dataset) -> State:
        """The size of the vocabulary, which a block does not tell."""
        return {"vocabulary": np.array(dataset.sizes["token_id"])}

    def update(self, state: State, block: Block) -> None:
        """Write one shard's part."""
        part = self.folder / self.names[int(block["row"][0])]
        if part.is_dir():
            return
        with _whole_folder(part) as unfinished:
            for name, values in _ordered(block, int(state["vocabulary"])).items():
                np.save(unfinished / f"{name}.npy", values)

    def merge(self, state: State, other: State) -> State:
        """Nothing to add."""
        return state

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Nothing: the parts are the result."""
        return xr.Dataset()


def _ordered(block: Block, vocabulary: int) -> dict[str, Array]:
    """A part's arrays."""
    filled = np.arange(block["token"].shape[1]) < block["length"][:, None]
    token = block["token"][filled]
    counted = np.flatnonzero(block["counted"][filled])
    order = counted[np.argsort(token[counted], kind="stable")]
    return {
        "token": token,
        "start": np.concatenate([[0], np.cumsum(block["length"])]).astype(np.uint32),
        "order": order.astype(np.uint32),
        "bounds": np.searchsorted(token[order], np.arange(vocabulary + 1)).astype(np.uint32),
        "expert": _by_layer(block["expert"], np.flatnonzero(filled)[order]),
    }


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """Where to write what appears as `path` when the block ends, and not at all if something is raised in it."""
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        os.replace(unfinished, path)
    except OSError:
        if not path.is_dir():  # else another process was faster, and has written the same
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
def _count(choices: Array, expert: int) -> int:
    """How many of the occurrences (occurrence, k) chose an expert; a token's choices are different ones."""
    number = 0
    for choice in choices.ravel():
        number += choice == expert
    return number
