"""Conditional mutual information: what one variable says about the experts when another is already known.

Computed from single tokens, because the table would have a cell for each combination of three variables. Most of these
cells occur once or never, so the plain estimate is far too large; the value from shuffles is reported with it and
subtracted.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from analysis.scanning import Array, kernel


def conditional_information(
    expert: xr.DataArray,
    x: Any,
    given: Any,
    *,
    within: Any = None,
    unit: Any = None,
    draws: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    """Mutual information of a token's experts and x, given another variable, in bits.

    Parameters
    ----------
    expert : xr.DataArray
        Experts of tokens, int (token, layer, k).
    x, given : array, shape (token), int
        The variable of interest, and the variable that is already known.
    within : array, shape (token), int, optional
        The null shuffles x among the tokens with the same value of `given` and, if passed, of `within`.
    unit : array, shape (token), int, optional
        Shuffle x of whole units instead, such as documents: x must be the same for all tokens of a unit.
    draws : int
        Number of shuffles.
    seed : int
        Seed of the shuffles.

    Returns
    -------
    xr.Dataset
        Over layer, float64, in bits: `mutual_information` I(expert; x | given) by maximum likelihood over all choices;
        `null` and `null_high`, the mean and the 95% quantile of the shuffles; `corrected`, the difference from the
        mean, 0 on average if x adds no information. NaN if there is no token.

    Raises
    ------
    ValueError
        When `draws` is below 1, both `within` and `unit` are given, or x differs within a unit.
    """
    if draws < 1 or (within is not None and unit is not None):
        raise ValueError(f"draws={draws}: must be at least 1; and at most one of `within` and `unit` can be given")
    values = expert.transpose("token", "layer", "k").values
    experts = int(values.max(initial=0)) + 1
    x, given = _numbered(x), _numbered(given)
    random, nothing = np.random.default_rng(seed), np.zeros(len(x), np.int64)
    if unit is None:
        shuffle = partial(_within, x, given if within is None else _numbered(given, within), random)
    else:
        shuffle = partial(_of_units, x, _numbered(unit), random)
    alone = _cells(values, given, nothing, experts)
    own = _information(values, x, given, experts, alone)
    drawn = np.array([_information(values, shuffle(), given, experts, alone) for _ in range(draws)])
    found = {"mutual_information": own, "null": drawn.mean(0), "null_high": np.quantile(drawn, 0.95, axis=0)}
    found["corrected"] = own - found["null"]
    result = {name: ("layer", bits, {"units": "bits"}) for name, bits in found.items()}
    return xr.Dataset(result, coords={"layer": expert["layer"].values}).assign_attrs(
        draws=draws,
        estimator="maximum likelihood; corrected: minus the mean of the shuffles",
        definition="I(e; x | g) = Σ P(e, x, g) log2(P(e, x | g) / (P(e | g) P(x | g))), e being the chosen experts",
        source="Cover & Thomas 2006, section 2.5",
    )


def _information(expert: Array, x: Array, given: Array, experts: int, alone: Array) -> Array:
    """Bits by layer; `alone` is the result of `_cells` for `given` alone."""
    n = expert.shape[0] * expert.shape[2]
    if not n:
        return np.full(expert.shape[1], np.nan)
    choices = expert.shape[2]
    pairs = np.unique(given * (x.max() + 1) + x, return_counts=True)[1] * choices
    strata = np.bincount(given) * choices
    margins = (strata * np.log2(strata)).sum() - (pairs * np.log2(pairs)).sum()
    information: Array = (_cells(expert, given, x, experts) - alone + margins) / n
    return information


def _cells(expert: Array, given: Array, x: Array, experts: int) -> Array:
    """Σ c log2(c) over the cells of (given, x, expert), by layer; `given` has no gaps."""
    order = np.lexsort((x, given))
    new = np.diff(given[order], prepend=-1).astype(bool) | np.diff(x[order], prepend=-1).astype(bool)
    bounds = np.append(np.flatnonzero(new), len(order))
    count = np.arange(1, len(order) + 1, dtype=float)
    step = np.diff(count * np.log2(count), prepend=0.0)
    return _add_up(expert, order, bounds, experts, step)


def _numbered(*values: Any) -> Array:
    """The combinations of values that occur, numbered from 0 without gaps."""
    number = np.zeros(len(values[0]), np.int64)
    for each in values:
        own = np.unique(np.asarray(each), return_inverse=True)[1].astype(np.int64)
        number = np.unique(number * (own.max(initial=0) + 1) + own, return_inverse=True)[1].astype(np.int64)
    return number


def _within(x: Array, stratum: Array, random: np.random.Generator) -> Array:
    """x, permuted among the tokens of each stratum."""
    shuffled = np.empty_like(x)
    shuffled[np.argsort(stratum, kind="stable")] = x[np.lexsort((random.random(len(x)), stratum))]
    return shuffled


def _of_units(x: Array, unit: Array, random: np.random.Generator) -> Array:
    """x, permuted among units."""
    of_unit = np.zeros(unit.max(initial=-1) + 1, x.dtype)
    of_unit[unit] = x
    if (of_unit[unit] != x).any():
        raise ValueError(
            "x differs within a unit: whole units can only be shuffled if all their tokens have the same x"
        )
    shuffled: Array = random.permutation(of_unit)[unit]
    return shuffled


@kernel
def _add_up(expert: Array, order: Array, bounds: Array, experts: int, step: Array) -> Array:
    _, layers, choices = expert.shape
    count, total = np.zeros((layers, experts), dtype=np.int64), np.zeros(layers)
    for group in range(bounds.size - 1):
        if bounds[group + 1] == bounds[group] + 1:
            continue  # each count is 1, and 1 log 1 is 0
        tokens = order[bounds[group] : bounds[group + 1]]
        for token in tokens:
            for layer in range(layers):
                for k in range(choices):
                    e = expert[token, layer, k]
                    total[layer] += step[count[layer, e]]
                    count[layer, e] += 1
        for token in tokens:
            for layer in range(layers):
                for k in range(choices):
                    count[layer, expert[token, layer, k]] = 0
    return total
