"""The map of layers and experts that several pages show: a number for each, as many as fit side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.explorer.view import View
from analysis.scanning import Array

FEW = 16  # experts of a layer that fit side by side; if there are more, the first so many are listed


def expert_map(view: View, share: Array) -> dict[str, Any]:
    """The cells of a map.

    Parameters
    ----------
    view : View
        The capture.
    share : array, shape (layer, expert)
        The values shown; NaN for none.

    Returns
    -------
    dict
        `rows`: for each layer its number, and the experts with their shares; `all`: whether these are all experts, or
        only those with the largest shares.
    """
    share, everyone = np.nan_to_num(share), view.experts <= FEW
    listed = np.argsort(-share, axis=1, kind="stable")[:, :FEW]
    if everyone:
        listed = np.tile(np.arange(view.experts), (len(share), 1))
    shares = np.take_along_axis(share, listed, 1).tolist()
    cells = (list(zip(*each, strict=True)) for each in zip(listed.tolist(), shares, strict=True))
    return {"rows": list(zip(view.layers, cells, strict=True)), "all": everyone}
