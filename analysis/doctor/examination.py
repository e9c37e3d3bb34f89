"""A capture, imported or captured, is looked at once, and what is wrong with it is named."""

from __future__ import annotations

from collections.abc import Callable

import xarray as xr

from analysis.doctor.faults import Finding, findings
from analysis.doctor.looked import look


def examine(capture: xr.Dataset, progress: Callable[[int, int], None] = lambda done, total: None) -> list[Finding]:
    """What is wrong with routes, as far as they show it by themselves.

    Parameters
    ----------
    capture : xr.Dataset
        As `store.open_capture` gives it, or in memory with its variables; `weight` and `phase` are used where they
        are there. An incomplete capture is examined as far as it goes.
    progress
        Called with (shards done, shards in all).

    Returns
    -------
    list of Finding
        Each with the fault's name, the layers, the first rows and the evidence; empty where nothing is found, which
        does not prove that routes are right: see `analysis.doctor.alignment`.

    Raises
    ------
    ValueError
        When a shard cannot be decoded.
    """
    pieces = [str(piece) for piece in capture["piece"].values]
    return findings(look(capture, progress), pieces, list(capture.attrs.get("special_token_ids", ())))
