"""The experts that distinguish one data set: those that it uses more than the others, beyond chance.

Does not know what they are used for, such as a mask.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr


def carriers(
    found: xr.Dataset, data_set: str, *, most: int = 8, left: int | Mapping[int, int] = 1
) -> list[tuple[int, int]]:
    """The experts whose share of a data set's tokens is larger than in the others by more than chance.

    Parameters
    ----------
    found : xr.Dataset
        From `analysis.contrast`.
    data_set : str
        One of its data sets.
    most : int
        The most experts to return, those with the largest differences.
    left : int or mapping of int to int
        How many experts of each layer must remain, such as the k that a router chooses; one number, or by layer.

    Returns
    -------
    list of (int, int)
        (layer, expert), by the model's own numbers; the largest difference first, ties by layer and expert. Empty if no
        difference is beyond chance, that is, if none has a `difference_p` of at most 1 minus the level of `found`; that
        p-value is corrected for all experts, layers and data sets.

    Raises
    ------
    ValueError
        When there is no such data set, `most` is not positive, or the data set is not tested; the message says why.
    """
    names = found["data_set"].values.tolist()
    if data_set not in names:
        raise ValueError(f"no data set {data_set!r}: choose from {', '.join(names)}")
    kept = dict(left) if isinstance(left, Mapping) else dict.fromkeys(found["layer"].values.tolist(), left)
    if most < 1 or min(kept.values()) < 0:
        raise ValueError(f"most={most}, left={left}: must be at least 1 and at least 0")
    if untested := found.attrs["untested"]:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in untested.items())
        raise ValueError(f"differences were not tested: {reasons}")
    own = found.sel(data_set=data_set)
    difference, p = (own[name].transpose("layer", "expert").values for name in ("difference", "difference_p"))
    beyond = (difference > 0) & (p <= 1 - found.attrs["level"])
    room = [difference.shape[1] - kept[layer] for layer in own["layer"].values.tolist()]
    taken: list[tuple[int, int]] = []
    for cell in np.argsort(-difference, axis=None, kind="stable").tolist():
        layer, expert = divmod(cell, difference.shape[1])
        if len(taken) < most and beyond[layer, expert] and room[layer] > 0:
            room[layer] -= 1
            taken.append((int(own["layer"][layer]), int(own["expert"][expert])))
    return taken
