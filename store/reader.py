"""Opening captures with xarray: lazy, labelled, and never mistaking missing for measured.

The same store opens without this package: `xarray.open_zarr(path, group=name, consolidated=False)`. What is added
here is the check that nothing is missing, and dask chunks of one shard.
"""

from pathlib import Path

import numpy as np
import xarray as xr

from store.coverage import coverage
from store.group import CaptureGroup

VARIABLES = (
    *("expert", "weight", "token", "role", "length", "document_id", "offset", "captured", "name", "piece"),
)  # in reading order; a folder's own order is that of the file system


def dataset_names(path: Path | str) -> list[str]:
    """Names of the data sets in a store, sorted.

    Raises
    ------
    FileNotFoundError
        When there is no store at `path`.
    """
    path = Path(path)
    if not (path / "zarr.json").is_file():
        raise FileNotFoundError(f"no store at {path} ({'it has no zarr.json' if path.exists() else 'no such folder'})")
    return sorted(entry.name for entry in path.iterdir() if (entry / "zarr.json").is_file())


def open_capture(path: Path | str, dataset: str, *, allow_incomplete: bool = False) -> xr.Dataset:
    """One data set's routes.

    Parameters
    ----------
    path
        The store.
    dataset
        Its group in the store.
    allow_incomplete
        Also open a capture with shards missing: their `expert` is the fill value (255, or 65535 where there are more
        than 255 experts), their `weight` 0, and `captured` is False on their rows.

    Returns
    -------
    xarray.Dataset
        Lazy; a dask chunk is a shard. Variables `expert` (uint8 or uint16) and `weight` (float16) over (doc,
        position, layer, k), `token` int32 (doc, position), `length`, `document_id`, `offset` and `captured` over
        (doc), `name` (document), `piece` (token_id); for conversations also `role` uint8 (doc, position). A `doc` is
        a row: a window of a document. Positions at or beyond `length` hold fill values; `expert` tells them apart.

    Raises
    ------
    FileNotFoundError
        When the store or the data set does not exist.
    ValueError
        When shards are missing and `allow_incomplete` is not given; the message says which.
    """
    path = Path(path)
    names = dataset_names(path)
    if dataset not in names:
        raise FileNotFoundError(f"no data set {dataset!r} in {path}; it holds: {', '.join(names) or 'none'}")
    state = coverage(path, dataset)
    if not (state.complete or allow_incomplete):
        raise ValueError(f"{path}: {state}. Finish the capture, or open it with allow_incomplete=True")
    rows = CaptureGroup(path, dataset).layout.rows_per_shard
    # Opened without dask first: chunks of one shard split the 65,536-entry chunks of the one-dimensional arrays,
    # about which xarray would warn.
    lazy = xr.open_zarr(path, group=dataset, consolidated=False, chunks=None)
    data: xr.Dataset = lazy.isel(doc=slice(0, state.plan.rows)).chunk({"doc": rows})
    captured = xr.Variable("doc", np.ones(state.plan.rows, dtype=bool))
    for shard in state.missing:
        captured[shard * rows : (shard + 1) * rows] = False
    captured.attrs = {"long_name": "whether the row's shard is committed"}
    data = data.assign(captured=captured).assign_attrs(dataset=dataset)
    return data[[name for name in VARIABLES if name in data]]


def open_tree(path: Path | str, *, allow_incomplete: bool = False) -> xr.DataTree:
    """All data sets of a store, each as `open_capture` gives it, as children of one tree."""
    return xr.DataTree.from_dict(
        {name: open_capture(path, name, allow_incomplete=allow_incomplete) for name in dataset_names(path)}
    )
