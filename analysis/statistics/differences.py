"""Studentized differences of several groups, and the largest of them under the null hypothesis.

A difference is divided by its standard error over documents. The largest of these statistics, over pairs of groups and
over experts, is compared with that of documents drawn around one common share; its 95% quantile over the draws also
gives intervals that hold simultaneously for all differences (Westfall & Young 1993, Resampling-based multiple testing;
studentized, so that groups may vary differently: Janssen 1997). Does not know data sets, or what the shares are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from analysis.scanning import Array
from analysis.statistics.overdispersion import Units, drawn, spread_of

SAME = 1 - 1e-9  # equal statistics differ by rounding: reaching this fraction of the observed one counts as reaching it


@dataclass(frozen=True)
class Differences:
    """Weighted sums over data sets, such as one set's share minus the mean of the others', with standard errors."""

    weights: Array
    """float64 (..., data_set): the weight of each data set in each difference."""
    share: Array
    variance: Array
    """float64 (data_set, …), such as (data_set, layer, expert); NaN for a data set that is not tested."""

    @property
    def estimate(self) -> Array:
        return self._sum(self.weights, self.share)

    @property
    def error(self) -> Array:
        return np.sqrt(self._sum(self.weights**2, self.variance))

    def degrees(self, of_each: Array) -> Array:
        """Degrees of freedom of the errors, from those of each data set (Welch 1947)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.error**4 / self._sum(self.weights**4, self.variance**2 / of_each)

    @property
    def statistic(self) -> Array:
        """Estimates over their standard errors; 0 if both are 0."""
        return studentized(self.estimate, self.error)

    def ends(self, quantile: float) -> tuple[Array, Array]:
        """The ends of intervals of plus and minus `quantile` standard errors."""
        return self.estimate - quantile * self.error, self.estimate + quantile * self.error

    def _sum(self, weights: Array, values: Array) -> Array:
        """Sum over data sets; those with weight 0 do not matter, whatever their value."""
        of_each = weights.reshape(*weights.shape, *[1] * (values.ndim - 1))
        with np.errstate(invalid="ignore"):
            taken = np.where(of_each == 0, 0.0, of_each * values)
        return np.asarray(taken.sum(axis=-values.ndim))


def studentized(difference: Array, error: Array) -> Array:
    """A difference over its standard error: 0 if the difference is 0, infinite if only the error is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        statistic: Array = np.where((error == 0) & (abs(difference) < 1e-12), 0.0, difference / error)
    return statistic


@dataclass(frozen=True)
class ByChance:
    """The results of drawn documents at one layer if all data sets have the same shares."""

    pairwise: Array
    from_others: Array
    """The largest studentized differences of each replicate, between two data sets, and between one and the mean of the
    others."""
    share: Array
    """The drawn shares, float64 (group, replicate, expert)."""


def by_chance(units: Sequence[Units], others: Array, choices: int, replicates: int, seed: int) -> ByChance:
    """Draw every data set's documents around their common share."""
    precision = np.array([1 / max(each.variance.mean(), 1e-30) for each in units])
    common = (precision[:, None] * np.array([each.share for each in units])).sum(0) / precision.sum()
    shares, variances = zip(
        *(
            drawn(
                each.tokens, common, spread_of(each, choices), choices, replicates, np.random.default_rng([seed, own])
            )
            for own, each in enumerate(units)
        ),
        strict=True,
    )
    pairwise = np.zeros(replicates)
    for one, other in combinations(range(len(units)), 2):
        apart = studentized(shares[one] - shares[other], np.sqrt(variances[one] + variances[other]))
        pairwise = np.maximum(pairwise, abs(apart).max(-1))
    together, spreads = np.stack(shares), np.stack(variances)
    from_others = np.zeros(replicates)
    for weights in others:
        apart = np.tensordot(weights, together, 1)
        error = np.sqrt(np.tensordot(weights**2, spreads, 1))
        from_others = np.maximum(from_others, abs(studentized(apart, error)).max(-1))
    return ByChance(pairwise=pairwise, from_others=from_others, share=together)


def quantile_of_largest(largest: Array, level: float) -> float:
    """The quantile of the largest statistic of all layers over the replicates; NaN without any."""
    if not largest.size:
        return np.nan
    of_all = np.sort(largest.max(0))
    return float(of_all[min(len(of_all), int(np.ceil(level * (len(of_all) + 1)))) - 1])


def p_adjusted(statistic: Array, largest: Array) -> Array:
    """The p-value of each statistic, from the largest ones of all layers: never 0 (Phipson & Smyth 2010)."""
    if not largest.size:
        return np.full(statistic.shape, np.nan)
    of_all = np.sort(largest.max(0))
    reached = len(of_all) - np.searchsorted(of_all, statistic * SAME, "left")
    return np.where(np.isnan(statistic), np.nan, (1 + reached) / (1 + len(of_all)))


def p_by_layer(statistic: Array, largest: Array) -> Array:
    """The p-value of the largest statistic of each layer; NaN if there is none."""
    layers = statistic.shape[-2]
    if not largest.size:
        return np.full(layers, np.nan)
    found = np.nanmax(statistic.reshape(-1, *statistic.shape[-2:]), axis=(0, 2))
    reached = (largest >= found[:, None] * SAME).sum(1)
    return np.where(np.isnan(found), np.nan, (1 + reached) / (1 + largest.shape[1]))
