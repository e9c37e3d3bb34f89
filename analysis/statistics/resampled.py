"""Means over tokens, and their differences, with simultaneous intervals and adjusted p-values.

Unlike counts (`analysis.statistics.overdispersion`), means of numbers such as an entropy or a norm have no model
distribution to draw documents from. So the observed documents are resampled with replacement, and the largest
studentized difference of all cells is compared with that of the resamples (bootstrap-t: Efron & Tibshirani 1993,
chapter 12; single-step max-T: Westfall & Young 1993). With Student's t alone, equal means were reported as different in
up to 24 of 100 simulations of documents with skewed means: the tail of the largest statistic depends on the skewness.

A cell, such as the tokens that choose an expert, may cover few documents or many. Each statistic is divided by the
quantile of Student's t for its own effective documents, so no cell dominates all others; a cell with fewer than
`MIN_DOCUMENTS` of them is not tested.

Promises: the same numbers for the same seed; whole documents are drawn, so the dependence between cells is kept. Does
not know data sets, layers or experts. See `docs/design/0010-inference.md` for simulations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from analysis.scanning import Array
from analysis.statistics.differences import Differences
from analysis.statistics.jackknife import amount_of

MIN_DOCUMENTS = 10.0  # effective; with 8 skewed ones, equal means differ in 15 of 100 simulations
REPLICATES = 999
CELLS_AT_ONCE = 512  # cells in an array of draws: 4 MB each (arbitrary)


@dataclass(frozen=True)
class Totals:
    """Each unit's contribution to the means of all cells."""

    total: Array
    amount: Array
    """float64 (unit, cell): sums, and the amounts that they are sums over, such as tokens. The mean is the ratio of the
    totals."""

    @property
    def part(self) -> Array:
        """Each unit's part of each cell's amount."""
        with np.errstate(invalid="ignore"):
            part: Array = self.amount / self.amount.sum(0)
        return part

    @property
    def degrees(self) -> Array:
        """The effective documents minus one; NaN if there are fewer than `MIN_DOCUMENTS`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            effective = 1 / (self.part**2).sum(0)
            return np.where(effective >= MIN_DOCUMENTS, effective - 1, np.nan)

    def fitted(self, times: Array) -> tuple[Array, Array]:
        """Means and their variances, with each unit repeated so many times: (draw, unit) to (draw, cell) each.

        Linearized, with each unit's residual inflated for its part in the mean (Bell & McCaffrey 2002, CR2).
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            larger = np.where(self.part < 1, 1 / (1 - self.part), 0.0)
            amount = times @ self.amount
            mean = (times @ self.total) / amount
            squares = times @ (larger * self.total**2) - 2 * mean * (times @ (larger * self.total * self.amount))
            squares += mean**2 * (times @ (larger * self.amount**2))
            return mean, np.maximum(squares, 0) / amount**2


def totals_of(found: xr.Dataset, variable: str) -> Totals:
    """Each unit's totals, from a variable of a jackknife's result that names its `amount`: cells as one dimension."""
    amount = amount_of(found, variable)
    assert amount is not None, variable
    values = found[variable].transpose("replicate", ...)
    counts = amount.broadcast_like(values).transpose(*values.dims).values.astype(float)
    sums = np.where(counts > 0, values.values * counts, 0.0)
    flat = [each.reshape(len(each), -1) for each in (sums, counts)]
    return Totals(*(each[0] - each[1:] for each in flat))


@dataclass(frozen=True)
class Together:
    """Estimates, float64 (difference, cell), with the ends of simultaneous intervals and adjusted p-values."""

    estimate: Array
    low: Array
    high: Array
    p: Array
    tests: int
    """Cells and differences that are tested."""


def together(
    sets: Sequence[Totals], weights: Array, *, level: float = 0.95, replicates: int = REPLICATES, seed: int = 0
) -> Together:
    """Test weighted sums of the means of sets of documents.

    Parameters
    ----------
    sets : sequence of Totals
        Totals with the same cells.
    weights : float64 array, shape (differences, sets)
        The weight of each set in each difference.
    level : float
        Simultaneous coverage of the intervals.
    replicates : int
        Number of resamples of documents.
    seed : int

    Returns
    -------
    Together
        NaN if a set in a difference has no value or, except for the estimates, too few documents.

    Raises
    ------
    ValueError
        When the level is not between 0 and 1.
    """
    from scipy.special import stdtrit

    if not 0 < level < 1:
        raise ValueError(f"level={level}: must be between 0 and 1")
    degrees = np.stack([each.degrees for each in sets])
    own = _differences(sets, weights, [np.ones((1, len(each.total))) for each in sets], np.isnan(degrees))
    estimate, error = own.estimate[:, 0], own.error[:, 0]
    known = np.isfinite(estimate) & (error > 0)
    tests = max(1, int(known.sum()))
    of_error = own.degrees(np.broadcast_to(degrees[:, None], own.variance.shape))[:, 0]
    unit = stdtrit(np.where(known, of_error, np.nan), 1 - (1 - level) / (2 * tests)) * error
    random = np.random.default_rng(seed)
    times = [random.multinomial(n := len(each.total), np.full(n, 1 / n), replicates).astype(float) for each in sets]
    largest = np.zeros(replicates)
    for first in range(0, estimate.shape[1], CELLS_AT_ONCE):
        some = slice(first, first + CELLS_AT_ONCE)
        parts = [Totals(each.total[:, some], each.amount[:, some]) for each in sets]
        drawn = _differences(parts, weights, times, np.isnan(degrees[:, some]))
        with np.errstate(divide="ignore", invalid="ignore"):
            apart = abs(drawn.estimate - estimate[:, None, some]) / drawn.error
            scaled = np.where(known[:, None, some], apart / (unit / error)[:, None, some], 0.0)
        largest = np.maximum(largest, np.nan_to_num(scaled, nan=0.0, posinf=np.inf).max((0, 2)))
    ordered = np.sort(largest)
    reach = unit * ordered[min(replicates, int(np.ceil(level * (replicates + 1)))) - 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        reached = replicates - np.searchsorted(ordered, abs(estimate) / unit, "left")
    p = np.where(known, (1 + reached) / (1 + replicates), np.nan)
    return Together(estimate, estimate - reach, estimate + reach, p, tests if known.any() else 0)


def _differences(sets: Sequence[Totals], weights: Array, times: Sequence[Array], untested: Array) -> Differences:
    """Differences of the sets' means, (difference, draw, cell)."""
    mean, variance = (np.stack(each) for each in zip(*map(Totals.fitted, sets, times), strict=True))
    return Differences(weights, mean, np.where(untested[:, None], np.nan, variance))
