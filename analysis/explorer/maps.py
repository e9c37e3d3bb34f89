"""The map of layers and experts that several pages show: a number for each, as many as fit beside each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.explorer.view import View
from analysis.scanning import Array

FEW = 16  # experts of a layer that fit beside each other; of more, so many are listed


def expert_map(view: View, share: Array) -> dict[str, Any]:
    """The cells of a map.

    Parameters
    ----------
    view : View
        The capture.
    share : array, shape (layer, expert)
        What is shown; NaN for nothing.

    Returns
    -------
    dict
        `rows`: of each layer its number, and the experts with their shares; and whether these are `all`, or the
        largest ones.
    """
    share, everyone = np.nan_to_num(share), view.experts <= FEW
    listed = np.argsort(-share, axis=1, kind="stable")[:, :FEW]
    if everyone:
        listed = np.tile(np.arange(view.experts), (len(share), 1))
    shares = np.take_along_axis(share, listed, 1).tolist()
    cells = (list(zip(*each, strict=True)) for each in zip(listed.tolist(), shares, strict=True))
    return {"rows": list(zip(view.layers, cells, strict=True)), "all": everyone}
