"""How sure a number is: resampled documents, shuffled labels, and what to make of many tests at once.

Documents are the unit: tokens of one document resemble each other, so that an interval over tokens would be far too
narrow. How often a document counts in a replicate is drawn from a hash of its id, the Poisson bootstrap (Chamandy et
al. 2012, Estimating uncertainty for massive data streams): no order, no number of documents and no list of them is
needed, memory does not grow with the store, and two runs are equal to the bit. The same machine shuffles labels: a
document goes to one side or the other by its hash, which is what a permutation does when the sides have their sizes
on average only.

Replicate 0 is the data as they are. Does not know any metric: `Resampled` repeats any reducer whose result is a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from analysis.scanning import Array, Block, Reducer, State

ROWS = 64  # rows whose counts are held at once: bounds memory (arbitrary)
_POISSON = np.cumsum([np.exp(-1.0) / np.prod(np.arange(1.0, n + 1)) for n in range(20)])  # of mean 1, up to 19

Weights = Callable[[Array, int], Array]
"""From document ids (rows) and a number of replicates, how often each row counts in each: int64 (replicate, row)."""


def poisson_weights(document: Array, replicates: int, seed: int = 0) -> Array:
    """How often documents count in each replicate of the bootstrap, Poisson of mean 1; replicate 0 is all ones."""
    weights = np.searchsorted(_POISSON, _uniform(document, replicates, seed), side="right").astype(np.int64)
    return np.concatenate([np.ones((1, len(document)), np.int64), weights])


def split_weights(document: Array, replicates: int, low: float, high: float, seed: int = 0) -> Array:
    """Whether documents fall into a range of [0, 1), and so on one of several sides; replicate 0 is all ones."""
    number = _uniform(document, replicates, seed)
    weights = ((low <= number) & (number < high)).astype(np.int64)
    return np.concatenate([np.ones((1, len(document)), np.int64), weights])


def nested_weights(document: Array, replicates: int, seed: int = 0) -> Array:
    """Whether documents are in parts of the data, each about half of the one before and within it; the first is all."""
    number = _uniform(document, 1, seed)
    weights: Array = (number < 0.5 ** np.arange(replicates + 1)[:, None]).astype(np.int64)
    return weights


def _uniform(document: Array, replicates: int, seed: int) -> Array:
    """A number in [0, 1) for each replicate and document: SplitMix64 (Steele et al. 2014) of both."""
    with np.errstate(over="ignore"):
        key = mixed(np.asarray(document).astype(np.uint64) + np.uint64(seed) * np.uint64(0xD1342543DE82EF95))
        number = np.arange(1, replicates + 1, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        return mixed(key + number) / 2.0**64


def mixed(number: Array) -> Array:
    """SplitMix64's finalizer: uint64 to uint64, one to one; the caller silences overflow."""
    number = number + np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = number ^ (number >> np.uint64(31))
    return mixed


class Resampled(Reducer):
    """A reducer, repeated over resampled documents.

    Parameters
    ----------
    reducer : Reducer
        One whose accumulators are sums over rows, and small: replicates × them are held by each thread.
    replicates : int
        Beside replicate 0, the data as they are.
    weights : callable, optional
        How often rows count; default `poisson_weights`.
    """

    def __init__(self, reducer: Reducer, replicates: int = 500, weights: Weights = poisson_weights) -> None:
        if replicates < 1:
            raise ValueError(f"replicates={replicates}: at least 1")
        if type(reducer).merge is not Reducer.merge:
            raise ValueError(f"{type(reducer).__name__} is no sum over rows: it cannot be resampled")
        self.reducer, self.replicates, self.weights = reducer, replicates, weights

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the reducer needs, and which document a row is of."""
        return self.reducer.needs | {"document_id"}

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: what the reducer accumulates, with replicates before it."""
        one = self.reducer.init(dataset)
        return {name: np.zeros((self.replicates + 1, *array.shape), np.int64) for name, array in one.items()}

    def update(self, state: State, block: Block) -> None:
        """Add one shard: the counts of each row, as often as it counts in each replicate."""
        weights = self.weights(block["document_id"], self.replicates)
        occupied = np.flatnonzero(block["counted"].any(axis=1))
        for start in range(0, len(occupied), ROWS):
            rows = occupied[start : start + ROWS]
            counts = {name: np.zeros((len(rows), *array.shape[1:]), np.int64) for name, array in state.items()}
            for index, row in enumerate(rows):
                own = {name: array[row : row + 1] for name, array in block.items()}
                self.reducer.update({name: array[index] for name, array in counts.items()}, own)
            for name, array in counts.items():
                # By the floating-point product, which is fast; exact, for the numbers are whole and far below 2**53.
                added = weights[:, rows].astype(float) @ array.reshape(len(rows), -1).astype(float)
                state[name] += np.rint(added).astype(np.int64).reshape(state[name].shape)

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The reducer's result of each replicate, along `replicate`."""
        if self.reducer.stacks:
            joined = self.reducer.finish(state, dataset)
            return joined.assign_coords(replicate=np.arange(self.replicates + 1)).assign_attrs(
                replicates=self.replicates
            )
        results = [
            self.reducer.finish({name: array[number] for name, array in state.items()}, dataset)
            for number in range(self.replicates + 1)
        ]
        own, names = results[0], list(results[0].data_vars)
        stacked = {name: np.stack([result[name].values for result in results]) for name in names}  # not xarray's: slow
        return xr.Dataset(
            {name: (("replicate", *own[name].dims), stacked[name], own[name].attrs) for name in names},
            {**own.coords, "replicate": np.arange(self.replicates + 1)},
            {**own.attrs, "replicates": self.replicates},
        )


class Thinned(Reducer):
    """A reducer over a part of the documents, chosen by a hash of their ids: for what is slow to count.

    Parameters
    ----------
    reducer : Reducer
        One that counts tokens where `counted` says so.
    share : float
        Of the documents that are counted, on average; 1 is all.
    """

    def __init__(self, reducer: Reducer, share: float) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share={share}: above 0, and at most 1")
        if "code" in reducer.needs:
            raise ValueError(f"{type(reducer).__name__} counts codes, whatever is `counted`: it cannot be thinned")
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
        chosen = _uniform(block["document_id"], 1, seed=0)[0] < self.share
        self.reducer.update(state, {**block, "counted": block["counted"] & chosen[:, None]})

    def merge(self, state: State, other: State) -> State:
        """The reducer's."""
        return self.reducer.merge(state, other)

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The reducer's result, whose `n` is what was counted."""
        return self.reducer.finish(state, dataset).assign_attrs(share_of_documents=self.share)


def interval(values: Any, level: float = 0.95) -> xr.Dataset:
    """An estimate with its interval, from its replicates.

    Parameters
    ----------
    values : xr.DataArray
        With dimension `replicate`; replicate 0 is the data's own.
    level : float
        That the interval is to cover.

    Returns
    -------
    xr.Dataset
        `estimate`, `low` and `high` (percentiles of the replicates; Efron & Tibshirani 1993, chapter 13) and
        `standard_error`, float64, with the dims of `values` but `replicate`; NaN where a replicate has none.

    Raises
    ------
    ValueError
        When the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}: between 0 and 1")
    drawn = values.isel(replicate=slice(1, None))
    tails = drawn.quantile([(1 - level) / 2, (1 + level) / 2], "replicate", skipna=False)
    return xr.Dataset(
        {
            "estimate": values.isel(replicate=0, drop=True),
            "low": tails.isel(quantile=0, drop=True),
            "high": tails.isel(quantile=1, drop=True),
            "standard_error": drawn.std("replicate", ddof=1, skipna=False),
        }
    ).assign_attrs(level=level, estimator="Poisson bootstrap over documents, percentile interval")


def p_value(values: Any) -> Any:
    """Share of shuffled replicates that are at least as large as the data's own, themselves counted among them.

    One-sided, for statistics that are large where there is something: (1 + #{larger or equal}) / (1 + replicates),
    which is never 0 (Phipson & Smyth 2010).

    Parameters
    ----------
    values : xr.DataArray
        With dimension `replicate`; replicate 0 is the data's own.

    Returns
    -------
    xr.DataArray
        p, float64, with the dims of `values` but `replicate`; NaN where the data have no value.
    """
    own, shuffled = values.isel(replicate=0, drop=True), values.isel(replicate=slice(1, None))
    p = (1 + (shuffled >= own).sum("replicate")) / (1 + shuffled.sizes["replicate"])
    return p.where(own.notnull())


def false_discovery(p: Any) -> Any:
    """Adjusted p-values of many tests: below q, a share of at most q of the finds is false (Benjamini & Hochberg 1995).

    Parameters
    ----------
    p : xr.DataArray
        p-values; NaN where there was no test.

    Returns
    -------
    xr.DataArray
        q, float64, with the dims of `p`; NaN where there was no test.
    """
    flat = np.asarray(p.values, float).ravel()
    tested = np.flatnonzero(~np.isnan(flat))
    order = tested[np.argsort(flat[tested])]
    ranked = flat[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted = np.full(flat.shape, np.nan)
    adjusted[order] = np.minimum(np.minimum.accumulate(ranked[::-1])[::-1], 1)
    return p.copy(data=adjusted.reshape(p.shape))
