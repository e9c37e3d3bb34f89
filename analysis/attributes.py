"""How every result describes itself: how much was counted, the estimator, the value expected by chance, and the
definition.

Does not know any metric. `analysis.scan` rejects a reducer whose result lacks one of these attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import xarray as xr

REQUIRED = ("n", "estimator", "null", "definition", "source")

Result = TypeVar("Result", xr.Dataset, xr.DataArray)


def described(
    result: Result,
    *,
    n: int | Mapping[str, int],
    estimator: str,
    null: float | str,
    definition: str,
    source: str,
    counted: str = "tokens",
    **more: Any,
) -> Result:
    """Attach the attributes that describe the result of a metric.

    Parameters
    ----------
    result : xr.Dataset or xr.DataArray
        The result of a metric.
    n : int, or mapping of str to int
        How many of the things named by `counted` the result is based on; by data set if there are several.
    estimator : str
        How the numbers are computed from the counts; "counts" if they are the counts themselves.
    null : float or str
        The value expected by chance, or for an even load; in words if it differs between variables, or if there is
        none.
    definition : str
        The formula.
    source : str
        The source of the formula; "-" if there is none.
    counted : str
        What `n` counts.
    **more
        Further attributes.

    Returns
    -------
    xr.Dataset or xr.DataArray
        The same values, dims and dtypes, with these attributes added.
    """
    return result.assign_attrs(
        n=n, counted=counted, estimator=estimator, null=null, definition=definition, source=source, **more
    )


def refuse_undescribed(result: xr.Dataset, made_by: str) -> xr.Dataset:
    """Return a result, or raise a ValueError if it does not describe itself."""
    if missing := [name for name in REQUIRED if result.attrs.get(name) in (None, "")]:
        raise ValueError(
            f"{made_by} returned a result without the attributes {', '.join(missing)}: return"
            f" analysis.described(result, {', '.join(f'{name}=...' for name in REQUIRED)})"
        )
    return result
