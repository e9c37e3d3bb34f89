"""The uncertainty of a number: the result recomputed with a part of the documents left out.

Documents are the units: tokens of one document resemble each other, so an interval over tokens would be far too narrow.
Up to `UNITS` documents are each a unit; more are joined into that many units at random, as in a delete-a-group
jackknife (Kott 2001, The delete-a-group jackknife). Counts are kept by unit, so memory does not grow with the store. An
interval is a Student t interval whose degrees of freedom come from the effective number of documents, which is smaller
than their number if they differ in length (Kish 1965). If few documents hold most of the tokens, there is no interval.

Promises: the same result in any order and for any numbering of at most `UNITS` documents. Does not know any metric:
`Jackknife` repeats any reducer whose result is a sum. `docs/design/0010-inference.md` says what simulations show.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import xarray as xr

from analysis.scanning import Array, Block, Reducer, State
from analysis.statistics.hashing import mixed

UNITS = 128  # with so many, a standard error is off by 6%, and its t quantile by 1% (Kott 2001)
MIN_EFFECTIVE_DOCUMENTS = 4.0  # with fewer, simulated coverage is too low (tests/benchmarks/inference.py)

BLOCKS = 2**32  # most blocks in a document

Scale = Literal["linear", "share"]


class Jackknife(Reducer):
    """A reducer, and its results with each unit of documents left out.

    Parameters
    ----------
    reducer : Reducer
        A reducer whose accumulators are small and sums over rows: each thread holds `units` copies of them.
    units : int
        The most units; each document is a separate unit if there are no more documents than this.
    block_tokens : int, optional
        Use blocks of about so many tokens, made of whole rows, instead of documents: for texts that are one long
        document. This ignores that neighbouring blocks resemble each other, so intervals are somewhat too narrow.
    """

    def __init__(self, reducer: Reducer, units: int = UNITS, block_tokens: int | None = None) -> None:
        if units < 2:
            raise ValueError(f"units={units}: must be at least 2")
        if block_tokens is not None and block_tokens < 1:
            raise ValueError(f"block_tokens={block_tokens}: must be at least 1")
        if type(reducer).merge is not Reducer.merge:
            raise ValueError(f"{type(reducer).__name__} is not a sum over rows: no part of it can be left out")
        self.reducer, self.units, self.block_tokens = reducer, units, block_tokens

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the reducer needs, and the document of each row."""
        return self.reducer.needs | {"document"} | ({"offset"} if self.block_tokens else set())

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: the reducer's accumulators with a leading dimension for units; and `unit_tokens` (unit)."""
        one = self.reducer.init(dataset)
        state = {name: np.zeros((self.units, *array.shape), np.int64) for name, array in one.items()}
        return {**state, "unit_tokens": np.zeros(self.units, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard, each run of rows to the unit of its document."""
        unit = unit_of(self._numbers(block["document"], block.get("offset")), self.units)
        of_rows = np.count_nonzero(block["counted"], axis=1)
        np.add.at(state["unit_tokens"], unit, of_rows)
        occupied = np.flatnonzero(of_rows)
        for rows in np.split(occupied, np.flatnonzero((np.diff(occupied) != 1) | (np.diff(unit[occupied]) != 0)) + 1):
            if len(rows):
                part = slice(rows[0], rows[-1] + 1)
                sums = {name: array[unit[rows[0]]] for name, array in state.items() if name != "unit_tokens"}
                self.reducer.update(sums, {name: array[part] for name, array in block.items()})

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The reducer's result along `replicate`: 0 is the whole, and each other one leaves out a unit.

        The coordinates `left_out` int64 (replicate) and `unit` say how many tokens are left out and which unit; the
        attributes `units` and `documents` say how many there are. Units without a token are skipped.
        """
        tokens = state["unit_tokens"]
        seen = np.flatnonzero(tokens)
        states = {name: without_each(array[seen]) for name, array in state.items() if name != "unit_tokens"}
        found = stacked(self.reducer, states, dataset)
        captured = dataset["captured"].values if "captured" in dataset else ...
        offset = dataset["offset"].values[captured] if self.block_tokens else None
        documents = int(np.unique(self._numbers(dataset["document_id"].values[captured], offset)).size)
        sizes = ("replicate", np.concatenate([[0], tokens[seen]]), {"units": "tokens"})
        unit = ("replicate", np.concatenate([[-1], seen]))
        return found.assign_coords(left_out=sizes, unit=unit).assign_attrs(units=len(seen), documents=documents)

    def _numbers(self, document: Array, offset: Array | None) -> Array:
        """Running numbers of documents, or different numbers for different blocks of them."""
        if self.block_tokens is None or offset is None:
            return document
        numbers: Array = document.astype(np.int64) * BLOCKS + offset // self.block_tokens
        return numbers


def without_each(by_unit: Array) -> Array:
    """The sum over units, then the sums that leave each unit out: shape (units, ...) to (1 + units, ...)."""
    whole = by_unit.sum(axis=0, keepdims=True)
    return np.concatenate([whole, whole - by_unit])


def stacked(reducer: Reducer, states: State, dataset: xr.Dataset) -> xr.Dataset:
    """A reducer's results for many states, along `replicate`."""
    replicates = len(next(iter(states.values())))
    if reducer.stacks:
        return reducer.finish(states, dataset).assign_coords(replicate=np.arange(replicates))
    each = [reducer.finish({name: array[n] for name, array in states.items()}, dataset) for n in range(replicates)]
    own, names = each[0], list(each[0].data_vars)
    values = {name: np.stack([result[name].values for result in each]) for name in names}  # xarray's concat is slow
    return xr.Dataset(
        {name: (("replicate", *own[name].dims), values[name], own[name].attrs) for name in names},
        {**own.coords, "replicate": np.arange(replicates)},
        own.attrs,
    )


def unit_of(document: Array, units: int) -> Array:
    """The unit of each document, by its running number: int64 to int64 below `units`.

    The first `units` documents each get a separate unit; of each further `units` documents, every unit gets one at
    random.
    """
    block, place = np.divmod(document.astype(np.int64), units)
    numbers, which = np.unique(block, return_inverse=True)
    with np.errstate(over="ignore"):
        key = mixed((numbers[:, None] * units + np.arange(units)).astype(np.uint64))
    order = np.where(numbers[:, None] == 0, np.arange(units), np.argsort(key, axis=1))
    unit: Array = order[which, place]
    return unit


def effective_documents(unit_tokens: Array) -> float:
    """How many documents of equal length would carry as much information: (Σ T)² / Σ T² over the units' tokens (Kish
    1965)."""
    tokens = np.asarray(unit_tokens, float)
    return float(tokens.sum() ** 2 / (tokens**2).sum()) if tokens.any() else 0.0


def effective_of(values: xr.DataArray, amount: xr.DataArray | None = None) -> xr.DataArray:
    """Effective documents of each of a jackknife's values: float64, without `replicate`.

    `amount` is what each value is a mean over, by replicate, such as the tokens that choose an expert; by default the
    tokens of the units.
    """
    if amount is None:
        tokens = left_out(values) if "left_out" in values.coords else np.ones(values.sizes["replicate"] - 1)
        return xr.DataArray(effective_documents(tokens))
    own = amount.isel(replicate=0, drop=True) - amount.isel(replicate=slice(1, None))
    squares = (own.astype(float) ** 2).sum("replicate")
    return (own.sum("replicate") ** 2 / squares.where(squares > 0)).fillna(0.0)


def left_out(found: xr.Dataset | xr.DataArray) -> Array:
    """Tokens of each unit of a jackknife's result: float64 (unit)."""
    return np.asarray(found["left_out"].values[1:], float)


def enough_documents(found: xr.Dataset) -> bool:
    """Whether a jackknife's result has enough effective documents for an interval."""
    return effective_documents(left_out(found)) >= MIN_EFFECTIVE_DOCUMENTS


def standard_error(values: xr.DataArray) -> xr.DataArray:
    """The standard error of a function of a jackknife's result; NaN if a replicate has no value."""
    estimate, left = values.isel(replicate=0, drop=True), values.isel(replicate=slice(1, None))
    units = left.sizes["replicate"]
    squares = ((left - estimate) ** 2).sum("replicate", skipna=False)
    error: xr.DataArray = np.sqrt(squares * ((units - 1) / max(units, 1)))  # type: ignore[assignment]
    return error


def degrees_of(values: xr.DataArray, amount: xr.DataArray | None = None) -> xr.DataArray:
    """Degrees of freedom of a jackknife's standard errors, one less than the effective documents; NaN with fewer than
    `MIN_EFFECTIVE_DOCUMENTS`. See `effective_of`."""
    effective = effective_of(values, amount)
    return (effective - 1).where(effective >= MIN_EFFECTIVE_DOCUMENTS)


def interval(
    values: Any,
    level: float = 0.95,
    *,
    scale: Scale = "linear",
    corrected: bool = False,
    amount: xr.DataArray | None = None,
) -> xr.Dataset:
    """An estimate with its interval, from a jackknife.

    Parameters
    ----------
    values : xr.DataArray
        A function of a result of `Jackknife`: with the dimension `replicate`, whose entry 0 is the whole, and its
        coordinate `left_out`. Without the coordinate, all units count as equal in size.
    level : float
        Coverage of the interval.
    scale : {"linear", "share"}
        "share" for values between 0 and 1: the interval is symmetric in the logarithm of the odds, and so within 0 and
        1; a share of exactly 0 or 1 has no interval.
    corrected : bool
        Subtract the jackknife estimate of bias, for values that are not means, such as an entropy (Quenouille 1956).
    amount : xr.DataArray, optional
        What each value is a mean over, by replicate, if that differs from value to value: the tokens that choose an
        expert may come from few documents. Default: all tokens.

    Returns
    -------
    xr.Dataset
        `estimate`, `low`, `high` and `standard_error`, float64, with the dims of `values` except `replicate`. The
        interval is estimate ± t · standard error, with the quantile of Student's t for the effective documents minus
        one degrees of freedom. NaN if a replicate has no value, or if there are fewer than `MIN_EFFECTIVE_DOCUMENTS`.

    Raises
    ------
    ValueError
        When the level is not between 0 and 1.
    """
    from scipy.special import stdtrit

    if not 0 < level < 1:
        raise ValueError(f"level={level}: must be between 0 and 1")
    estimate, left = values.isel(replicate=0, drop=True), values.isel(replicate=slice(1, None))
    units, degrees = left.sizes["replicate"], degrees_of(values, amount)
    error = standard_error(values).where(degrees.notnull())
    if corrected and units:
        estimate = estimate - (units - 1) * (left.mean("replicate", skipna=False) - estimate)
    low, high = _ends(estimate, xr.apply_ufunc(stdtrit, degrees, (1 + level) / 2) * error, scale)
    told = {} if degrees.ndim else {"effective_documents": round(float(effective_of(values, amount)), 1)}
    return xr.Dataset({"estimate": estimate, "low": low, "high": high, "standard_error": error}).assign_attrs(
        level=level, units=units, estimator=how(units, level), **told
    )


def amount_of(found: xr.Dataset, name: str) -> xr.DataArray | None:
    """What a variable is a mean over, named by its attribute `amount`; None: all tokens."""
    amount = found[name].attrs.get("amount")
    return None if amount is None else found[amount]


def with_intervals(found: xr.Dataset, *, level: float = 0.95, share: Collection[str] = ()) -> xr.Dataset:
    """The whole of a jackknife's result, and for each variable that names its `amount` the ends `_low` and `_high` of
    its interval; variables whose names start with one in `share` are between 0 and 1."""
    whole = found.isel(replicate=0).drop_vars(["replicate", "left_out", "unit"])
    estimators = {whole.attrs["estimator"]}
    for name in [str(name) for name in found if "amount" in found[name].attrs]:
        scale: Scale = "share" if name.startswith(tuple(share)) else "linear"
        ends = interval(found[name], level, scale=scale, amount=amount_of(found, name))
        whole = whole.assign({f"{name}_{end}": ends[end] for end in ("low", "high")})
        estimators.add(ends.attrs["estimator"])
    return whole.assign_attrs(estimator="; ".join(sorted(estimators)), level=level)


def _ends(estimate: Any, reach: Any, scale: Scale) -> tuple[Any, Any]:
    """The ends of an interval, from its half-width on the scale of the values."""
    if scale == "linear":
        return estimate - reach, estimate + reach
    inside = estimate.where((estimate > 0) & (estimate < 1))
    odds, stretch = np.log(inside / (1 - inside)), reach / (inside * (1 - inside))
    return tuple(1 / (1 + np.exp(-(odds + side * stretch))) for side in (-1, 1))


def how(units: int, level: float = 0.95) -> str:
    """Which interval `interval` returns, in words."""
    return (
        f"{100 * level:g}%, jackknife over {units} units of whole documents, Student's t with the effective documents"
    )
