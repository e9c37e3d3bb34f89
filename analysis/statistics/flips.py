"""Sums over units of documents with flipped signs: the null distribution if two captures were exchangeable.

If captures of the same documents did not differ, each unit's difference could have either sign (sign-flip test; Fisher
1935, The design of experiments, section 21). Does not know what differs.
"""

from __future__ import annotations

import numpy as np

from analysis.scanning import Array
from analysis.statistics.differences import SAME, studentized
from analysis.statistics.jackknife import MIN_EFFECTIVE_DOCUMENTS, effective_documents

REPLICATES = 1999  # flips of signs
MIN_UNITS = 6  # with fewer, the smallest possible p-value is above 5%


def sum_of(residuals: Array, part: Array) -> tuple[Array, Array]:
    """The sum over units, and its standard error (Bell & McCaffrey 2002, CR2)."""
    whole = residuals.sum(0)
    apart = residuals - part[:, None, None] * whole
    return whole, np.sqrt((apart**2 / (1 - np.minimum(part, 1 - 1e-12))[:, None, None]).sum(0))


def flipped(residuals: Array, part: Array, signs: Array) -> Array:
    """The largest studentized sum of each layer with flipped signs: (layer, replicate)."""
    larger = (1 / (1 - part))[:, None]
    found = []
    for layer in range(residuals.shape[1]):
        own = residuals[:, layer]
        whole = signs @ own
        squares = (own**2 * larger).sum(0) - 2 * whole * (signs @ (own * part[:, None] * larger))
        squares += whole**2 * float((part[:, None] ** 2 * larger).sum())
        found.append(abs(studentized(whole, np.sqrt(np.maximum(squares, 0)))).max(1))
    return np.array(found)


def p_together(residuals: Array, part: Array, replicates: int) -> Array:
    """Two-sided p-values of several sums over the same units, each adjusted for all of them.

    The smallest of their p-values is compared with the smallest p-value under flipped signs, with the same signs for
    all sums (single-step minP, Westfall & Young 1993). So a sum over few units, whose statistic has long tails, does
    not dominate the others. A single sum has its own p-value.

    Parameters
    ----------
    residuals, part : float64 array, shape (unit, sum)
        Each unit's contribution to a sum, and its part of the sum's total amount.
    replicates : int
        Number of sign flips.

    Returns
    -------
    float64 array, shape (sum)
        Never 0: the observed signs count as one of the flips (Phipson & Smyth 2010).
    """
    signs, statistics = np.random.default_rng(0).choice([-1.0, 1.0], (replicates, len(part))), []
    for own, of_own in zip(residuals.T[..., None, None], part.T, strict=True):
        statistics.append(np.append(abs(studentized(*sum_of(own, of_own))), flipped(own, of_own, signs)))
    own_p = np.array([_p_of_each(statistic) for statistic in statistics])
    smallest: Array = own_p.min(0)
    return np.asarray((smallest <= own_p[:, :1]).mean(1))


def _p_of_each(statistic: Array) -> Array:
    """The share of the statistics that are at least as large as each of them."""
    below = np.searchsorted(np.sort(statistic), statistic * SAME, "left")
    return np.asarray(1 - below / len(statistic))


def why_untested(tokens: Array) -> str:
    """Why nothing is tested, in words; empty if it is tested."""
    units, effective = tokens.shape[1], effective_documents(tokens.sum(0))
    if not tokens.sum(1).all():
        return "one of the captures has no counted token"
    if units < MIN_UNITS:
        return f"{units} documents: a sign-flip test needs at least {MIN_UNITS} to be significant"
    if effective < MIN_EFFECTIVE_DOCUMENTS:
        return (
            f"{units} units of unequal length, worth {effective:.1f} equal ones: a test needs at least"
            f" {MIN_EFFECTIVE_DOCUMENTS:.0f}"
        )
    return ""
