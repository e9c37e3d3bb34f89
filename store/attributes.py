"""Convert a capture's attributes to values that netCDF can hold, and back.

In a group's `zarr.json` some attributes are mappings (`identity`, `environment`, `configuration`). netCDF supports
numbers, texts and lists of these. The attributes of a Dataset hold a mapping as JSON text and true as 1, and omit None.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from store.records import parse_json

if TYPE_CHECKING:
    import xarray as xr


def flat(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes with mappings as JSON texts, bools as numbers and tuples as lists, without None."""
    return {name: _held(value) for name, value in attrs.items() if value is not None}


def _held(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, tuple):
        return list(value)
    return json.dumps(value) if isinstance(value, Mapping) else value


def attributes(capture: xr.Dataset) -> dict[str, Any]:
    """Read the attributes of a capture, with JSON text converted back to mappings.

    Parameters
    ----------
    capture : xarray.Dataset
        From `open_capture`, from plain `xarray.open_zarr`, or from a netCDF file written from either. Its dims and
        values are not read.

    Returns
    -------
    dict
        The attributes by name. `identity`, `environment` and `configuration` are dicts if the capture has them.
    """
    return {str(name): _mapping(value) for name, value in capture.attrs.items()}


def _mapping(value: Any) -> Any:
    """The mapping that a JSON text holds; any other value unchanged."""
    if not isinstance(value, str) or not value.startswith("{"):
        return value
    try:
        return parse_json(value)
    except ValueError:
        return value
