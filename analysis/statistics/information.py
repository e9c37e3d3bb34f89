"""Entropy and association of counts, with the correction for few observations.

All in bits. The plain estimates are biased: an entropy is found too small and a mutual information too large, by about
(cells − 1) / (2 n ln 2). Miller (1955) and Madow subtract that with the cells that were seen; both are given, and an
association of nothing shows how much of the plain one is bias. Works on any counts with named dimensions, so that
replicates of `Jackknife` and layers go along.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr


def entropy(counts: xr.DataArray, dim: str | Sequence[str]) -> xr.Dataset:
    """Entropy over some dimensions.

    Parameters
    ----------
    counts : xr.DataArray
        Numbers of observations.
    dim : str or sequence of str
        Over what.

    Returns
    -------
    xr.Dataset
        Over the other dims of `counts`: `entropy` (maximum likelihood) and `corrected` (Miller 1955), float64 in bits,
        and `n`, int64; NaN where n is 0.
    """
    n = counts.sum(dim)
    share = counts / n.where(n > 0)
    plain = -(share * np.log2(share.where(share > 0))).sum(dim).where(n > 0)
    seen = (counts > 0).sum(dim)
    return xr.Dataset({"entropy": plain, "corrected": plain + (seen - 1) / (2 * np.log(2) * n.where(n > 0)), "n": n})


def association(counts: xr.DataArray, one: str, other: str, *, bias: float = 1.0) -> xr.Dataset:
    """How much one thing tells of another, from their table.

    Parameters
    ----------
    counts : xr.DataArray
        Numbers of observations, with both dimensions and any others.
    one, other : str
        The dims of what tells, and of what it tells about.
    bias : float
        Share of Miller and Madow's correction to apply: theirs is for independent observations. The k choices of a
        token are different experts, so that a table of all of them has (E − k)/(E − 1) of it, and one of all pairs of
        choices at two layers the square of that.

    Returns
    -------
    xr.Dataset
        Over the other dims of `counts`, float64: `mutual_information` and, corrected by Miller–Madow, `corrected` in
        bits; `cramers_v` (Cramér 1946, section 21.9), 0 to 1; `best_guess`, the share of observations of which the
        likeliest `other` given `one` is right, and `best_guess_alone`, without knowing `one`. NaN where there is no
        observation. Null: 0, 0, 0, and `best_guess_alone`.
    """
    both = entropy(counts, (one, other))
    alone = [entropy(counts.sum(away), kept) for kept, away in ((one, other), (other, one))]
    plain, corrected = (alone[0][kind] + alone[1][kind] - both[kind] for kind in ("entropy", "corrected"))
    corrected = plain + bias * (corrected - plain)
    n = both["n"].where(both["n"] > 0)
    rows, columns = counts.sum(other), counts.sum(one)
    expected = rows * columns / n
    chi_square = ((counts - expected) ** 2 / expected.where(expected > 0)).sum((one, other))
    smaller: Any = np.minimum((rows > 0).sum(one), (columns > 0).sum(other)) - 1
    return xr.Dataset(
        {
            "mutual_information": plain.assign_attrs(units="bits", null=0.0),
            "corrected": corrected.assign_attrs(units="bits", null=0.0, estimator="Miller–Madow"),
            "cramers_v": np.sqrt(chi_square / n / smaller.where(smaller > 0)).assign_attrs(null=0.0),
            "best_guess": (counts.max(other).sum(one) / n).assign_attrs(null="best_guess_alone"),
            "best_guess_alone": columns.max(other) / n,
            "n": both["n"],
        }
    ).assign_attrs(
        definition="MI = H(one) + H(other) - H(one, other); V = sqrt(chi² / n / (min(rows, columns) - 1)), over rows"
        " and columns that were seen",
        source="Miller 1955; Cramér 1946",
    )
