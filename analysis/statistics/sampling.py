"""A part of the rows, for what is slow to count and needs no interval.

Rows, and not documents: one document may hold more than all that is to be counted. Does not know any metric.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.scanning import Array, Block, Reducer, State
from analysis.statistics.hashing import mixed

ROWS = "rows_sampled"


class SampledRows(Reducer):
    """A reducer over one of every so many neighbouring rows, chosen by a hash of their numbers.

    The result has the attributes `rows_sampled` and `rows_counted`: of so many rows with a token that counts, so many
    were looked at. `n` is what the reducer has counted in these.

    Parameters
    ----------
    reducer : Reducer
        What to count.
    one_in : int
        Neighbouring rows of which one is counted, from row 0 on; 1 counts all.

    Raises
    ------
    ValueError
        When `one_in` is below 1.
    """

    def __init__(self, reducer: Reducer, one_in: int) -> None:
        if one_in < 1:
            raise ValueError(f"one_in={one_in}: at least 1")
        self.reducer, self.one_in = reducer, one_in

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the reducer needs."""
        return self.reducer.needs

    def init(self, dataset: xr.Dataset) -> State:
        """The reducer's, and `rows_sampled` (2): rows that are looked at, and all, where they have a token."""
        return {**self.reducer.init(dataset), ROWS: np.zeros(2, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add the chosen rows of one shard."""
        chosen, counts = chosen_rows(block["row"], self.one_in), block["counted"].any(axis=1)
        state[ROWS] += np.count_nonzero(chosen & counts), np.count_nonzero(counts)
        self.reducer.update(_without(state), {name: values[chosen] for name, values in block.items()})

    def merge(self, state: State, other: State) -> State:
        """The reducer's, and sums."""
        return {**self.reducer.merge(_without(state), _without(other)), ROWS: state[ROWS] + other[ROWS]}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The reducer's result, which says how many rows it is of."""
        sampled, counted = state[ROWS].tolist()
        found = self.reducer.finish(_without(state), dataset)
        return found.assign_attrs(rows_sampled=sampled, rows_counted=counted)


def chosen_rows(row: Array, one_in: int) -> Array:
    """Which rows, by number, are the chosen one of their `one_in`; bool, the same for a row wherever it is asked."""
    group = row // one_in
    with np.errstate(over="ignore"):
        return np.asarray(mixed(group.astype(np.uint64)) % np.uint64(one_in) == (row % one_in).astype(np.uint64))


def of_how_many(result: xr.Dataset) -> str:
    """What part of the rows a result is of, in words; "" where it is of all."""
    sampled, counted = (result.attrs.get(name) for name in ("rows_sampled", "rows_counted"))
    return "" if sampled == counted else f"{sampled:,} of {counted:,} rows"


def _without(state: State) -> State:
    return {name: values for name, values in state.items() if name != ROWS}
