"""A part of the rows, for quantities that are slow to count and need no interval.

Rows and not documents, because one document may hold more than should be counted in all. Does not know any metric.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.scanning import Array, Block, Reducer, State
from analysis.statistics.hashing import mixed

ROWS = "rows_sampled"


class SampledRows(Reducer):
    """A reducer over one of every `one_in` neighbouring rows, selected by a hash of their numbers.

    The result has the attributes `rows_sampled` and `rows_counted`: the number of rows that were read, of those with a
    counted token. `n` is what the reducer counted in them.

    Parameters
    ----------
    reducer : Reducer
        What to count.
    one_in : int
        Number of neighbouring rows of which one is counted, starting at row 0; 1 counts all.

    Raises
    ------
    ValueError
        When `one_in` is below 1.
    """

    def __init__(self, reducer: Reducer, one_in: int) -> None:
        if one_in < 1:
            raise ValueError(f"one_in={one_in}: must be at least 1")
        self.reducer, self.one_in = reducer, one_in

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the reducer needs."""
        return self.reducer.needs

    def init(self, dataset: xr.Dataset) -> State:
        """The reducer's accumulators, and `rows_sampled` (2): rows that are read, and all rows, with a counted
        token."""
        return {**self.reducer.init(dataset), ROWS: np.zeros(2, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add the selected rows of one shard."""
        chosen, counts = chosen_rows(block["row"], self.one_in), block["counted"].any(axis=1)
        state[ROWS] += np.count_nonzero(chosen & counts), np.count_nonzero(counts)
        self.reducer.update(_without(state), {name: values[chosen] for name, values in block.items()})

    def merge(self, state: State, other: State) -> State:
        """The reducer's, and sums."""
        return {**self.reducer.merge(_without(state), _without(other)), ROWS: state[ROWS] + other[ROWS]}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The reducer's result, with the number of rows it covers."""
        sampled, counted = state[ROWS].tolist()
        found = self.reducer.finish(_without(state), dataset)
        return found.assign_attrs(rows_sampled=sampled, rows_counted=counted)


def chosen_rows(row: Array, one_in: int) -> Array:
    """Which rows, by number, are the selected one of their `one_in`; bool, the same for a row in every call."""
    group = row // one_in
    with np.errstate(over="ignore"):
        return np.asarray(mixed(group.astype(np.uint64)) % np.uint64(one_in) == (row % one_in).astype(np.uint64))


def of_how_many(result: xr.Dataset) -> str:
    """Which part of the rows a result covers, in words; "" for all."""
    sampled, counted = (result.attrs.get(name) for name in ("rows_sampled", "rows_counted"))
    return "" if sampled == counted else f"{sampled:,} of {counted:,} rows"


def _without(state: State) -> State:
    return {name: values for name, values in state.items() if name != ROWS}
