"""One pass over a capture: each shard is decoded once and feeds every reducer.

Promises: every captured token is counted once and tokens that were not captured, padding and special tokens
never; the result does not depend on chunks, threads or their order, because accumulators hold integers only;
memory is threads × (one decoded shard + the accumulators), whatever the size of the store.
Does not know any metric: those are the reducers.
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, TypeVar, cast

import numba
import numpy as np
import xarray as xr
from numpy.typing import NDArray

Array = NDArray[Any]
Block = dict[str, Array]
"""The decoded arrays of one shard by variable name, and `counted`, bool (doc, position): tokens to count."""
State = dict[str, NDArray[np.int64]]
"""What a reducer accumulates: integer arrays by name, so that sums are exact in any order."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def kernel(function: _Function) -> _Function:
    """Compile a numpy loop to machine code that runs without the interpreter lock."""
    return cast(_Function, numba.njit(nogil=True, cache=True)(function))


class Reducer(ABC):
    """A metric's share of a scan: integer sums over blocks, then one small labelled Dataset."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Variables it reads besides `expert`, `token` and `length`, which are always decoded."""

    @abstractmethod
    def init(self, dataset: xr.Dataset) -> State:
        """An empty accumulator for a capture of this shape; each thread has its own."""

    @abstractmethod
    def update(self, state: State, block: Block) -> None:
        """Add the counted tokens of one shard to `state`, in place."""

    def merge(self, state: State, other: State) -> State:
        """The accumulator of both halves; sums, unless a reducer says otherwise."""
        return {name: state[name] + other[name] for name in state}

    @abstractmethod
    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The labelled result, with attributes `n`, `null`, `definition` and `source`."""


def scan(
    dataset: xr.Dataset,
    reducers: Sequence[Reducer],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[xr.Dataset]:
    """Feed every shard of a capture to all reducers, decoding it once.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture as `store.open_capture` gives it, lazy and chunked by whole shards along `doc`; a selection
        of its layers or rows serves as well. Incomplete captures count what is there.
    reducers : sequence of Reducer
        What to compute.
    threads : int, optional
        Shards decoded at the same time; default one a processor.
    progress : callable, optional
        Called with (shards done, shards in all) after each shard, from any thread.

    Returns
    -------
    list of xr.Dataset
        One result for each reducer, in their order.

    Raises
    ------
    ValueError
        When a captured token names an expert or a token id that the model does not have.
    """
    names = {"expert", "token", "length"}.union(*(reducer.needs for reducer in reducers))
    names |= {"captured"} & set(dataset.variables)
    # Bare variables: coordinates would be loaded with every shard for nothing.
    variables = xr.Dataset({name: dataset[name].variable for name in sorted(names)})
    shards = deque(_shards(dataset))
    total, done = len(shards), itertools.count(1)

    def work() -> list[State]:
        states = [reducer.init(dataset) for reducer in reducers]
        try:
            while True:
                try:
                    rows = shards.popleft()
                except IndexError:
                    return states
                block = _decode(variables.isel(doc=rows), dataset, rows.start)
                for reducer, state in zip(reducers, states, strict=True):
                    reducer.update(state, block)
                if progress is not None:
                    progress(next(done), total)
        finally:
            shards.clear()  # when one thread fails, the others stop after the shard in hand

    num_threads = max(1, min(threads or os.cpu_count() or 1, total))
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(work) for _ in range(num_threads)]
        try:
            merged = futures[0].result()
            for future in futures[1:]:
                pairs = zip(reducers, merged, future.result(), strict=True)
                merged = [reducer.merge(mine, other) for reducer, mine, other in pairs]
        finally:
            shards.clear()  # Ctrl-C: do not go through the rest of the store first
    return [reducer.finish(state, dataset) for reducer, state in zip(reducers, merged, strict=True)]


def sizes(dataset: xr.Dataset) -> tuple[int, int, int]:
    """The numbers of layers L, choices k and experts E of a capture: always the data's, never ours."""
    return dataset.sizes["layer"], dataset.sizes["k"], int(dataset.attrs["num_experts"])


def _shards(dataset: xr.Dataset) -> list[slice]:
    """Row ranges with anything captured: the chunks of `expert` along `doc`, or what the attributes say."""
    chunks: tuple[int, ...] | None = cast("dict[Hashable, tuple[int, ...]]", dataset["expert"].chunksizes).get("doc")
    if chunks is None:  # already in memory
        step, rows = int(dataset.attrs["rows_per_shard"]), dataset.sizes["doc"]
        chunks = tuple(min(step, rows - start) for start in range(0, rows, step))
    stops = itertools.accumulate(chunks)
    shards = [slice(stop - size, stop) for size, stop in zip(chunks, stops, strict=True)]
    if "captured" not in dataset:
        return shards
    captured = dataset["captured"].values
    return [rows for rows in shards if captured[rows].any()]  # an uncommitted shard may be torn: leave it shut


def _decode(rows: xr.Dataset, dataset: xr.Dataset, first_row: int) -> Block:
    """Load one shard in this thread and mark the tokens that count."""
    try:
        loaded = rows.load(scheduler="synchronous")
    except ValueError as error:  # a checksum that does not match, a shard cut short
        raise ValueError(
            f"rows {first_row} to {first_row + rows.sizes['doc'] - 1} of {dataset.attrs.get('dataset')} cannot be"
            f" decoded ({error}): remove expert/commits/{first_row // int(dataset.attrs['rows_per_shard'])}.json in"
            " its folder, and the capture does that shard again"
        ) from error
    block: Block = {str(name): np.ascontiguousarray(loaded[name].values) for name in loaded.data_vars}
    if "captured" in block:
        block["length"] = np.where(block["captured"], block["length"], 0)
    special = np.array(dataset.attrs["special_token_ids"], dtype=np.int64).reshape(-1)
    num_experts, vocabulary = int(dataset.attrs["num_experts"]), dataset.sizes["token_id"]
    fill = np.iinfo(block["expert"].dtype).max  # the store's fill value: never a legal expert
    block["counted"], where = _counted(
        block["expert"], block["token"], block["length"], special, fill, num_experts, vocabulary
    )
    row, position, layer, k = where
    if row >= 0 and layer < 0:
        raise ValueError(
            f"row {first_row + row}, position {position}: token {block['token'][row, position]}, but the"
            f" vocabulary has {vocabulary} tokens; the shard is damaged or the pieces are another model's"
        )
    if row >= 0:
        raise ValueError(
            f"row {first_row + row}, position {position}, layer {int(dataset['layer'][layer])}: expert"
            f" {block['expert'][row, position, layer, k]}, but the model has {num_experts} experts;"
            " the shard is damaged"
        )
    return block


@kernel
def _counted(
    expert: Array, token: Array, length: Array, special: Array, fill: int, num_experts: int, vocabulary: int
) -> tuple[Array, tuple[int, int, int, int]]:
    """Which tokens count, bool (doc, position), and where the first illegal value is, or -1s."""
    rows, positions, layers, choices = expert.shape
    counted = np.zeros((rows, positions), dtype=np.bool_)
    for row in range(rows):
        for position in range(min(length[row], positions)):
            if layers == 0 or expert[row, position, 0, 0] == fill:
                continue  # not captured yet
            if token[row, position] < 0 or token[row, position] >= vocabulary:
                return counted, (row, position, -1, -1)
            for layer in range(layers):
                for k in range(choices):
                    if expert[row, position, layer, k] >= num_experts:
                        return counted, (row, position, layer, k)
            counted[row, position] = True
            for index in range(special.size):
                if token[row, position] == special[index]:
                    counted[row, position] = False
    return counted, (-1, -1, -1, -1)
