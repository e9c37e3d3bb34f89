"""Corrections for many tests."""

from __future__ import annotations

from typing import Any

import numpy as np


def false_discovery(p: Any) -> Any:
    """Adjusted p-values of many tests: among those below q, the expected share of false discoveries is at most q
    (Benjamini & Hochberg 1995).

    Parameters
    ----------
    p : xr.DataArray
        p-values; NaN if there was no test.

    Returns
    -------
    xr.DataArray
        q, float64, with the dims of `p`; NaN if there was no test.
    """
    flat = np.asarray(p.values, float).ravel()
    tested = np.flatnonzero(~np.isnan(flat))
    order = tested[np.argsort(flat[tested])]
    ranked = flat[order] * len(order) / np.arange(1, len(order) + 1)
    adjusted = np.full(flat.shape, np.nan)
    adjusted[order] = np.minimum(np.minimum.accumulate(ranked[::-1])[::-1], 1)
    return p.copy(data=adjusted.reshape(p.shape))
