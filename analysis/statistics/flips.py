"""Sums over units of documents with flipped signs: what chance gives where two captures could be exchanged.

If captures of the same documents were alike, each unit's difference could have either sign (sign-flip test; Fisher
1935, The design of experiments, section 21). Does not know what differs.
"""

from __future__ import annotations

import numpy as np

from analysis.scanning import Array
from analysis.statistics.differences import SAME, studentized
from analysis.statistics.jackknife import MIN_EFFECTIVE_DOCUMENTS, effective_documents

REPLICATES = 1999  # flips of signs
MIN_UNITS = 6  # of fewer, the smallest p of flipped signs is above 5 %


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
    """Two-sided p of several sums over the same units, each adjusted for all of them.

    The smallest of their p-values is compared with the smallest that flipped signs give, the same signs for all sums
    (single-step minP, Westfall & Young 1993). So a sum that few units have, whose statistic has long tails, does not
    decide for the others. Of one sum it is its own p.

    Parameters
    ----------
    residuals, part : float64 array, shape (unit, sum)
        What each unit adds to a sum, and its part of what the sum is over.
    replicates : int
        Flips of signs.

    Returns
    -------
    float64 array, shape (sum)
        Never 0: the signs as they are count as one of the flips (Phipson & Smyth 2010).
    """
    signs, statistics = np.random.default_rng(0).choice([-1.0, 1.0], (replicates, len(part))), []
    for own, of_own in zip(residuals.T[..., None, None], part.T, strict=True):
        statistics.append(np.append(abs(studentized(*sum_of(own, of_own))), flipped(own, of_own, signs)))
    own_p = np.array([_p_of_each(statistic) for statistic in statistics])
    smallest: Array = own_p.min(0)
    return np.asarray((smallest <= own_p[:, :1]).mean(1))


def _p_of_each(statistic: Array) -> Array:
    """The share of the statistics that each of them does not exceed."""
    below = np.searchsorted(np.sort(statistic), statistic * SAME, "left")
    return np.asarray(1 - below / len(statistic))


def why_untested(tokens: Array) -> str:
    """Why nothing is tested, in words; empty where it is."""
    units, effective = tokens.shape[1], effective_documents(tokens.sum(0))
    if not tokens.sum(1).all():
        return "no token is counted in one of the captures"
    if units < MIN_UNITS:
        return f"{units} documents: flipped signs of fewer than {MIN_UNITS} cannot be significant"
    if effective < MIN_EFFECTIVE_DOCUMENTS:
        return (
            f"{units} units, as unequal as {effective:.1f} of one length: no test below {MIN_EFFECTIVE_DOCUMENTS:.0f}"
        )
    return ""
