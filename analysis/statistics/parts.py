"""Counts of parts of the documents, chosen by a hash of their ids: no list of them is needed, nor an order.

Promises: the same parts in any order, on any chunks and machines. Does not know any metric: `Parts` and `Thinned`
repeat any reducer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from analysis.scanning import Array, Block, Reducer, State
from analysis.statistics.hashing import uniform
from analysis.statistics.jackknife import stacked

Belongs = Callable[[Array], Array]
"""From document ids (rows), which rows are in each part: bool (part, row)."""


def halves(document: Array, seed: int = 0) -> Array:
    """The first of two halves of the documents: bool (1, row)."""
    half: Array = uniform(document, 1, seed) < 0.5
    return half


def nested(document: Array, halvings: int) -> Array:
    """Parts of the data, each about half of the one before and within it: bool (halvings, row)."""
    within: Array = uniform(document, 1) < 0.5 ** np.arange(1, halvings + 1)[:, None]
    return within


class Parts(Reducer):
    """A reducer over all documents, and over parts of them.

    Parameters
    ----------
    reducer : Reducer
        One whose accumulators are sums over rows.
    number : int
        Of parts, beside the whole.
    belongs : callable
        Which rows are in each of them.
    """

    def __init__(self, reducer: Reducer, number: int, belongs: Belongs) -> None:
        if type(reducer).merge is not Reducer.merge:
            raise ValueError(f"{type(reducer).__name__} is no sum over rows: parts of it cannot be kept apart")
        self.reducer, self.number, self.belongs = reducer, number, belongs

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the reducer needs, and which document a row is of."""
        return self.reducer.needs | {"document_id"}

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: what the reducer accumulates, with the whole and the parts before it."""
        one = self.reducer.init(dataset)
        return {name: np.zeros((self.number + 1, *array.shape), np.int64) for name, array in one.items()}

    def update(self, state: State, block: Block) -> None:
        """Add one shard to the whole, and its rows to the parts that they are in."""
        self.reducer.update({name: array[0] for name, array in state.items()}, block)
        for part, rows in enumerate(self.belongs(block["document_id"]), 1):
            self.reducer.update({name: array[part] for name, array in state.items()}, rows_of(block, rows))

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The reducer's results along `replicate`: 0 is the whole."""
        return stacked(self.reducer, state, dataset)


class Thinned(Reducer):
    """A reducer over a part of the documents: for what is slow to count.

    Parameters
    ----------
    reducer : Reducer
        Any.
    share : float
        Of the documents that are counted, on average; 1 is all.
    """

    def __init__(self, reducer: Reducer, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: above 0, and at most 1")
        self.reducer, self.share = reducer, share

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the reducer needs, and which document a row is of."""
        return self.reducer.needs | {"document_id"}

    def init(self, dataset: xr.Dataset) -> State:
        """The reducer's."""
        return self.reducer.init(dataset)

    def update(self, state: State, block: Block) -> None:
        """Add the chosen rows of one shard."""
        self.reducer.update(state, rows_of(block, uniform(block["document_id"], 1)[0] < self.share))

    def merge(self, state: State, other: State) -> State:
        """The reducer's."""
        return self.reducer.merge(state, other)

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The reducer's result, whose `n` is what was counted."""
        return self.reducer.finish(state, dataset).assign_attrs(share_of_documents=self.share)


def rows_of(block: Block, rows: Array) -> Block:
    """Some rows of a shard."""
    return block if rows.all() else {name: array[rows] for name, array in block.items()}
