"""The experts that two data sets use most differently, each with its main tokens, as rows of a table.

Promises: plain numbers and texts, the largest difference first. Does not know how rows are shown.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from analysis.scanning import Array

OF_TOKEN = {"token_id": "token_id", "piece": "piece", "contribution": "contribution"}
OF_TOKEN |= {"usage": "token_usage", "routing": "token_routing"}
"""The keys of a token in a row, and their names in `token_contributions`."""


def largest_cells(difference: Array, top: int) -> list[tuple[int, int]]:
    """Indices of layer and expert of the largest absolute differences; unknown ones come last."""
    order = np.argsort(-abs(difference), axis=None, kind="stable")[:top].tolist()
    return [divmod(cell, difference.shape[1]) for cell in order]


def shares_row(found: xr.Dataset, layer: int, expert: int) -> dict[str, Any]:
    """The part of `expert_row` that needs no tokens: both shares, and their difference with its interval and p."""
    first, second = (found.sel(layer=layer, expert=expert).isel(data_set=side) for side in (0, 1))
    return {
        "layer": layer,
        "expert": expert,
        "share": float(first["share"]),
        "other_share": float(second["share"]),
        "difference": float(first["difference"]),
        **{name: float(first[f"difference_{name}"]) for name in ("low", "high", "p")},
    }


def expert_row(found: xr.Dataset, carried: xr.Dataset, layer: int, expert: int) -> dict[str, Any]:
    """An expert in two data sets.

    Parameters
    ----------
    found : xr.Dataset
        From `contrast`, of two data sets.
    carried : xr.Dataset
        From `token_contributions` for the same data sets, with a `layer` dimension.
    layer, expert
        The model's numbers.

    Returns
    -------
    dict
        `layer`, `expert`; `share` and `other_share` of the tokens that choose it, their `difference` with `low`, `high`
        and `p`, and its parts `usage` and `routing`; `tokens`: those that contribute most, each with the keys of
        `OF_TOKEN`.
    """
    of_tokens = carried.sel(layer=layer, expert=expert)
    columns = [of_tokens[name].values.tolist() for name in OF_TOKEN.values()]
    return {
        **shares_row(found, layer, expert),
        **{name: float(of_tokens[name]) for name in ("usage", "routing")},
        "tokens": [dict(zip(OF_TOKEN, row, strict=True)) for row in zip(*columns, strict=True) if row[0] >= 0],
    }


def beyond_chance(found: xr.Dataset) -> int:
    """How many experts, over all layers, differ between two data sets by more than chance."""
    return int((found["difference_p"].isel(data_set=0) <= 1 - found.attrs["level"]).sum())
