"""Sums over units of documents with flipped signs: what chance gives where two captures could be exchanged.

If captures of the same documents were alike, each unit's difference could have either sign (sign-flip test; Fisher
1935, The design of experiments, section 21). Does not know what differs.
"""

from __future__ import annotations

import numpy as np

from analysis.scanning import Array
from analysis.statistics.differences import studentized
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
