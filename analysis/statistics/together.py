"""Intervals and p-values of many means that hold all of them together, by Student's t of each one's own documents.

Means of numbers, such as an entropy or a norm, have no distribution that documents could be drawn from, as counts have
(`analysis.statistics.overdispersion`). So each estimate is divided by its standard error over documents and compared
with Student's t, whose degrees of freedom come from the effective documents; and the level is that of the largest of so
many independent statistics (Šidák 1967, Rectangular confidence regions for the means of multivariate normal
distributions), which is somewhat too careful where they depend on each other.

Does not know data sets, layers or experts. `docs/0010-inference.md` says what simulations show.
"""

from __future__ import annotations

import numpy as np
import xarray as xr


def together(estimate: xr.DataArray, error: xr.DataArray, degrees: xr.DataArray, level: float = 0.95) -> xr.Dataset:
    """Intervals and p-values, of the null 0, that hold of all estimates together.

    Parameters
    ----------
    estimate, error, degrees : xr.DataArray
        Of the same dims: what is tested, its standard error, and the degrees of freedom of that.
    level : float
        That all intervals together are to cover.

    Returns
    -------
    xr.Dataset
        `low`, `high` and `p`, float64, of the same dims; NaN where one of the three has no value. Attribute `tests`:
        how many estimates there are.

    Raises
    ------
    ValueError
        When the level is not between 0 and 1.
    """
    from scipy.special import stdtr, stdtrit

    if not 0 < level < 1:
        raise ValueError(f"level={level}: between 0 and 1")
    known = estimate.notnull() & error.notnull() & degrees.notnull()
    tests = max(1, int(known.sum()))
    quantile = xr.apply_ufunc(stdtrit, degrees.where(known), (1 + level ** (1 / tests)) / 2)
    statistic = abs(estimate) / error.where(error > 0)
    tail = 2 * xr.apply_ufunc(stdtr, degrees.where(known), -statistic)
    tail = tail.where(error > 0, xr.where(estimate == 0, 1.0, 0.0))
    p = -np.expm1(tests * np.log1p(-tail.clip(max=1 - 1e-16)))
    ends = {"low": estimate - quantile * error, "high": estimate + quantile * error, "p": p}
    return xr.Dataset({name: values.where(known) for name, values in ends.items()}).assign_attrs(tests=tests)
