"""Counts of parts of the documents, selected by a hash of their ids, without a list or an order.

Promises: the same parts in any order, on any chunks and machines. Does not know any metric: `Parts` works with any
reducer whose result is a sum.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from analysis.scanning import Array, Block, Reducer, State
from analysis.statistics.hashing import uniform
from analysis.statistics.jackknife import stacked

Belongs = Callable[[Array], Array]
"""From document ids (rows) to the rows in each part: bool (part, row)."""


def halves(document: Array, seed: int = 0) -> Array:
    """The first of two halves of the documents: bool (1, row)."""
    half: Array = uniform(document, 1, seed) < 0.5
    return half


def nested(document: Array, halvings: int) -> Array:
    """Parts of the data, each a subset with about half of the previous one: bool (halvings, row)."""
    within: Array = uniform(document, 1) < 0.5 ** np.arange(1, halvings + 1)[:, None]
    return within


class Parts(Reducer):
    """A reducer over all documents, and over parts of them.

    Parameters
    ----------
    reducer : Reducer
        A reducer whose accumulators are sums over rows.
    number : int
        Number of parts besides the whole.
    belongs : callable
        The rows in each part.
    """

    def __init__(self, reducer: Reducer, number: int, belongs: Belongs) -> None:
        if type(reducer).merge is not Reducer.merge:
            raise ValueError(f"{type(reducer).__name__} is not a sum over rows: its parts cannot be separated")
        self.reducer, self.number, self.belongs = reducer, number, belongs

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the reducer needs, and the document of each row."""
        return self.reducer.needs | {"document_id"}

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: the reducer's accumulators with a leading dimension for the whole and the parts."""
        one = self.reducer.init(dataset)
        return {name: np.zeros((self.number + 1, *array.shape), np.int64) for name, array in one.items()}

    def update(self, state: State, block: Block) -> None:
        """Add one shard to the whole, and its rows to their parts."""
        self.reducer.update({name: array[0] for name, array in state.items()}, block)
        for part, rows in enumerate(self.belongs(block["document_id"]), 1):
            self.reducer.update({name: array[part] for name, array in state.items()}, rows_of(block, rows))

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The reducer's results along `replicate`: 0 is the whole."""
        return stacked(self.reducer, state, dataset)


def rows_of(block: Block, rows: Array) -> Block:
    """Some rows of a shard."""
    return block if rows.all() else {name: array[rows] for name, array in block.items()}
