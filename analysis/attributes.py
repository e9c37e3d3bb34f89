"""What every result says of itself: how much was counted, by which estimator, what chance gives, and what it means.

Does not know any metric. `analysis.scan` refuses a reducer whose result lacks one of these attributes.
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
    """Attach to a result what every result of a metric says of itself.

    Parameters
    ----------
    result : xr.Dataset or xr.DataArray
        Of a metric.
    n : int, or mapping of str to int
        How many of what `counted` names the result is made of; by data set where there are several.
    estimator : str
        How the numbers are made of the counts; "counts" where they are the counts themselves.
    null : float or str
        What chance, or an even load, gives; in words where it is another number for each variable, or none.
    definition : str
        The formula.
    source : str
        Where the formula is from; "-" where it is from nowhere else.
    counted : str
        What `n` is a number of.
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
    """Give a result back, or raise a ValueError where it does not say what it is."""
    if missing := [name for name in REQUIRED if result.attrs.get(name) in (None, "")]:
        raise ValueError(
            f"{made_by} gives a result without the attributes {', '.join(missing)}: return"
            f" analysis.described(result, {', '.join(f'{name}=...' for name in REQUIRED)})"
        )
    return result
