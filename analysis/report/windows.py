"""The tables of windows: first choices at neighbouring layers, with examples of tokens."""

from typing import Any

import numpy as np
import xarray as xr

from analysis.escaping import visible

EXAMPLES = 6  # tokens shown for a window (arbitrary)


def window_rows(windows: xr.Dataset | None, sample: xr.Dataset | None) -> list[dict[str, Any]]:
    """Rows of a table of windows; empty if there are too few layers.

    Parameters
    ----------
    windows : xr.Dataset or None
        From `frequent_windows_of`.
    sample : xr.Dataset or None
        From `SampledRoutes`, for all layers: the source of example tokens.
    """
    if windows is None or sample is None:
        return []
    return [
        {
            "layers": f"{int(each['layer'][0])}–{int(each['layer'][-1])}",
            "experts": " → ".join(str(int(expert)) for expert in each["expert"].values),
            "tokens": int(each["counts"]),
            "share": float(each["share"]),
            "times": float(each["share"]) / windows.attrs["null"],
            "predicted": float(each["counts"]) / float(each["expected"]),
            "examples": examples(sample, each),
        }
        for each in (windows.isel(window=index) for index in range(windows.sizes["window"]))
    ]


def examples(sample: xr.Dataset, window: xr.Dataset) -> list[str]:
    """The tokens of a sample whose first choices follow a window, the most frequent first."""
    first = sample["expert"].isel(k=0).sel(layer=window["layer"].values).values
    through = (first == window["expert"].values).all(axis=1)
    pieces, counts = np.unique(sample["piece"].values[through].astype(str), return_counts=True)
    return [visible(str(piece)) for piece in pieces[np.argsort(-counts, kind="stable")][:EXAMPLES]]
