"""Open captures with xarray: lazy, labelled, and with missing data marked as missing.

The same store opens without this package: `xarray.open_zarr(path, group=name, consolidated=False)`. This module adds a
check that nothing is missing, and dask chunks of one shard.
"""

from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import xarray as xr
import zarr

from store.attributes import flat
from store.coverage import Coverage, coverage
from store.group import CaptureGroup
from store.names import dataset_names
from store.plan import Plan
from store.verification import metadata_faults


def open_capture(path: Path | str, dataset: str, *, allow_incomplete: bool = False) -> xr.Dataset:
    """Open one data set's routes.

    Parameters
    ----------
    path
        The store: a folder, or s3://bucket/prefix.
    dataset
        Its group in the store.
    allow_incomplete
        Also open a capture with missing shards: their `expert` is the fill value (255, or 65535 if there are more than
        255 experts), their `weight` 0, and `captured` is False on their rows.

    Returns
    -------
    xarray.Dataset
        Lazy; a dask chunk is a shard. Variables `expert` (uint8 or uint16) and `weight` (float16, or float32 if
        captured so) over (doc, position, layer, k), `token` int32 (doc, position), `length`, `document_id`, `offset`
        and `captured` over (doc), `name` (document), `piece` (token_id); for conversations also `role` uint8 (doc,
        position). Optional recordings: `logit` float32 (doc, position, layer, expert_id), or with the dim candidate
        instead of expert_id and with `logit_expert`; `output_norm` float32, with the dims of `expert`; `logprob`
        float32 (doc, position), in nats; `effect` float32 (doc, position, layer, expert_id), in nats. Imported routes
        may have no `weight`, and may have `phase` uint8 (doc, position), 0 for tokens of the prompt and 1 for generated
        ones. A `doc` is a row: a window of a document. Positions at or beyond `length` hold fill values: `expert` and
        `logit_expert` 255 or 65535, `weight` 0, `token` -1, `role` and `phase` 255, the others NaN; `logprob` and
        `effect` are also NaN at the last position of a row. Attributes have types that netCDF supports; `attributes`
        returns them with mappings.

    Raises
    ------
    FileNotFoundError
        When the store or the data set does not exist.
    ValueError
        When shards are missing and `allow_incomplete` is not given, or objects of the plan are lost; the message
        says which.
    """
    names = dataset_names(path)
    if dataset not in names:
        raise FileNotFoundError(f"no data set {dataset!r} in {path}; it holds: {', '.join(names) or 'none'}")
    state = coverage(path, dataset)
    if not (state.complete or state.lost or allow_incomplete):
        raise ValueError(f"{path}: {state}. Finish the capture, or open it with allow_incomplete=True")
    return open_covered(path, state)


def open_covered(path: Path | str, state: Coverage) -> xr.Dataset:
    """One data set's routes up to a count, complete or not; see `open_capture`.

    Shards that are committed after the count are not marked as captured, so that the count and the data agree.

    Raises
    ------
    ValueError
        When objects of the plan are lost, or an array's description differs from the layout's, so that it would be read
        wrongly.
    """
    if state.lost:
        raise ValueError(f"{path}: {state}")
    group = CaptureGroup(path, state.dataset)
    if faults := metadata_faults(group, state.plan):
        raise ValueError(f"{path}/{state.dataset}: the plan is damaged: {faults[0]}; {group.remedy}")
    try:
        arrays = zarr.open_group(group.objects.zarr_store(), path=state.dataset, mode="r", use_consolidated=False)
        variables = {
            name: _variable(arrays[name], state.plan, group.layout.rows_per_shard) for name in group.layout.arrays()
        }
    except OSError:  # a storage that cannot be reached is not damaged
        raise
    except Exception as error:  # Zarr raises errors of many kinds
        raise ValueError(f"{path}/{state.dataset} cannot be opened: {error}; {group.remedy}") from error
    captured = ~np.isin(np.arange(state.plan.rows) // group.layout.rows_per_shard, state.missing)
    variables["captured"] = xr.Variable("doc", captured, {"long_name": "whether the row's shard is committed"})
    attrs = group.attrs
    if not _are_numbers(special := attrs.get("special_token_ids", [])):
        raise ValueError(f"{path}/{state.dataset}/zarr.json holds {special!r:.80} for special_token_ids, not numbers")
    attrs["environment"] = group.environment or attrs.get("environment")  # of the workers, or as planned
    return xr.Dataset(variables, attrs=flat({**attrs, "dataset": state.dataset}))


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _variable(array: Any, plan: Plan, rows: int) -> xr.Variable:
    """An array up to the end of the plan, in dask chunks of a shard.

    The arrays grow one after the other while a data set is planned, so their sizes differ for a moment. The plan's
    record counts the entries that all of them hold.
    """
    dims = array.metadata.dimension_names
    size = {"doc": plan.rows, "document": plan.documents}.get(dims[0], array.shape[0])
    chunks = (rows if dims[0] == "doc" else array.shape[0], *array.shape[1:])
    lazy = dask.array.from_zarr(array, chunks=chunks, name=False)  # type: ignore[no-untyped-call]
    return xr.Variable(dims, lazy[:size], dict(array.attrs))


def open_tree(path: Path | str, *, allow_incomplete: bool = False) -> xr.DataTree:
    """All data sets of a store, as children of one tree.

    Parameters
    ----------
    path
        The store: a folder, or s3://bucket/prefix.
    allow_incomplete
        Also open captures with missing shards, as in `open_capture`.

    Returns
    -------
    xarray.DataTree
        Lazy; each child is a data set as returned by `open_capture`.

    Raises
    ------
    FileNotFoundError
        When the store does not exist.
    ValueError
        When a data set cannot be opened: see `open_capture`.
    """
    return xr.DataTree.from_dict(
        {name: open_capture(path, name, allow_incomplete=allow_incomplete) for name in dataset_names(path)}
    )
