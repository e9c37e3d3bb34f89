"""One pass over a capture, imported or captured, that reports its faults."""

from __future__ import annotations

from collections.abc import Callable

import xarray as xr

from analysis.doctor.faults import Finding, findings
from analysis.doctor.looked import look


def examine(capture: xr.Dataset, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Finding]:
    """What is wrong with routes, as far as the routes alone show it.

    Parameters
    ----------
    capture : xr.Dataset
        From `store.open_capture`, or in memory with its variables; `weight` and `phase` are used if present. For an
        incomplete capture, the captured part is examined.
    progress
        Called with (shards done, shards in all).

    Returns
    -------
    list of Finding
        Each with the fault's name, the layers, the first rows and the evidence. Empty if nothing is found, which does
        not prove that the routes are right: see `analysis.doctor.alignment`.

    Raises
    ------
    ValueError
        When a shard cannot be decoded.
    """
    pieces = [str(piece) for piece in capture["piece"].values]
    return findings(look(capture, progress), pieces, list(capture.attrs.get("special_token_ids", ())))
