"""The tables of windows: what tokens choose at neighbouring layers, with some of the tokens that do."""

from typing import Any

import numpy as np
import xarray as xr

from analysis.escaping import visible

EXAMPLES = 6  # tokens shown of a window (arbitrary)


def window_rows(windows: xr.Dataset | None, sample: xr.Dataset | None) -> list[dict[str, Any]]:
    """Rows of a table of windows; none where there are too few layers.

    Parameters
    ----------
    windows : xr.Dataset or None
        From `frequent_windows_of`.
    sample : xr.Dataset or None
        From `SampledRoutes`, of all layers: what example tokens are taken from.
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
    """The most frequent tokens of a sample whose first choices are a window, the most frequent first."""
    first = sample["expert"].isel(k=0).sel(layer=window["layer"].values).values
    through = (first == window["expert"].values).all(axis=1)
    pieces, counts = np.unique(sample["piece"].values[through].astype(str), return_counts=True)
    return [visible(str(piece)) for piece in pieces[np.argsort(-counts, kind="stable")][:EXAMPLES]]
