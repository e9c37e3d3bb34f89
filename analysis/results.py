"""Answers kept beside the store, so that the same question a second time costs nothing.

What a reducer has counted is kept, not what is made of it: small arrays of integers in ``STORE.results/``, for a folder
as for a bucket. Their key is made of the capture's identity, of what of it is committed, to the checksums of its
objects, of the code of the reducer and of the scan, of the reducer's parameters and of the selection: whatever could
change a number makes another key (`analysis.fingerprint`). Where it cannot be told what a reducer computes, nothing is
kept. Old answers are never wrong and may be deleted at any time.

Promises: an answer is what `analysis.scan` would give, to the bit. Does not know any metric.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
import xarray as xr

from analysis.fingerprint import fingerprint
from analysis.scanning import EVERYTHING, Reducer, Selection, State, accumulate, finish, shards_to_read
from store.coverage import Coverage, coverage
from store.group import CaptureGroup
from store.identity import identity_hash
from store.names import beside
from store.objects import Objects, open_objects
from store.reader import open_covered


class Runner(Protocol):
    """Accumulates shards somewhere: `analysis.scanning.accumulate` in this process, or `jobs.cluster.scans` on a
    cluster."""

    def __call__(
        self,
        dataset: xr.Dataset,
        reducers: Sequence[Reducer],
        shards: Sequence[slice],
        *,
        only: Selection,
        threads: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> list[State]:
        """See `analysis.scanning.accumulate`."""


def measure(
    path: Path | str,
    dataset: str,
    reducers: Sequence[Reducer],
    *,
    state: Coverage | None = None,
    layers: Sequence[int] | None = None,
    only: Selection = EVERYTHING,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    runner: Runner = accumulate,
) -> list[xr.Dataset]:
    """Answer questions about one capture: from what is kept, and the rest from one scan.

    Parameters
    ----------
    path, dataset
        The store, and the capture in it.
    reducers : sequence of Reducer
        The questions.
    state : Coverage, optional
        What of the capture to look at; default all that is committed now.
    layers : sequence of int, optional
        The model's own numbers of the layers to look at; default all.
    only, threads, progress
        See `analysis.scan`.
    runner : Runner, optional
        Where shards are read.

    Returns
    -------
    list of xr.Dataset
        One result for each reducer, in their order, with the dims and dtypes that the metric's own function names. An
        incomplete capture counts what is there.

    Raises
    ------
    FileNotFoundError
        When there is no such capture.
    ValueError
        When it cannot be read, or a layer was not captured.
    """
    state = state or coverage(path, dataset)
    capture = open_covered(path, state)
    if layers is not None:
        if unknown := sorted(set(layers) - set(capture["layer"].values.tolist())):
            raise ValueError(f"layers {unknown} were not captured; {dataset} has {capture['layer'].values.tolist()}")
        capture = capture.sel(layer=list(layers))
    about = [identity_hash(CaptureGroup(path, dataset).identity), state.digest, layers and list(layers)]
    return answers(
        capture, reducers, beside(path), dataset, about, only=only, threads=threads, progress=progress, runner=runner
    )


def answers(
    opened: xr.Dataset,
    reducers: Sequence[Reducer],
    folder: Path | str,
    name: str,
    about: Sequence[object],
    *,
    only: Selection = EVERYTHING,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    runner: Runner = accumulate,
) -> list[xr.Dataset]:
    """Answer questions about what was opened, which may be more than one capture: from what is kept, and the rest from
    one scan.

    Parameters
    ----------
    opened : xr.Dataset
        What to look at.
    reducers : sequence of Reducer
        The questions.
    folder
        Where answers are kept: see `beside`.
    name : str
        Of the folder in it.
    about : sequence
        What was opened, to its bytes: plain values, of which JSON can be made.
    only, threads, progress, runner
        See `measure`.

    Returns
    -------
    list of xr.Dataset
        See `measure`.
    """
    kept = open_objects(folder, scratch=".scratch")
    keys = [_key(name, [*about, asdict(only)], reducer) for reducer in reducers]
    read = (_read(kept, key, reducer.init(opened)) for key, reducer in zip(keys, reducers, strict=True))
    states = {index: state for index, state in enumerate(read) if state is not None}
    if asked := [index for index in range(len(reducers)) if index not in states]:
        shards = shards_to_read(opened, only)
        wanted = [reducers[index] for index in asked]
        found = runner(opened, wanted, shards, only=only, threads=threads, progress=progress)
        for index, counted in zip(asked, found, strict=True):
            states[index] = counted
            if key := keys[index]:
                _keep(kept, key, counted)
    return finish(reducers, [states[index] for index in range(len(reducers))], opened)


def question(reducer: Reducer) -> str:
    """What a reducer counts, as a hash: of its code, its parameters, and how a scan feeds it.

    Raises
    ------
    ValueError
        When it cannot be told what it counts: see `analysis.fingerprint`.
    """
    return fingerprint(reducer, accumulate)


def _key(dataset: str, about: Sequence[object], reducer: Reducer) -> str | None:
    """Where an answer is kept; None where it cannot be told of what it is the answer."""
    try:
        asked = json.dumps([*about, question(reducer)], sort_keys=True)
    except ValueError:
        return None
    return f"{dataset}/{hashlib.sha256(asked.encode()).hexdigest()}.npz"


def _read(kept: Objects, key: str | None, form: State) -> State | None:
    """What was counted, or None where it is not kept, not whole, or not of that form."""
    data = kept.get(key) if key else None
    if data is None:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Exception:  # zipfile and numpy raise whatever they run into
        return None
    return found if found.keys() == form.keys() else None


def _keep(kept: Objects, key: str, state: State) -> None:
    """Keep what was counted; where nothing can be written the answer is given all the same."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **state)  # type: ignore[arg-type]
    try:
        kept.put(key, buffer.getvalue())
    except OSError as error:
        warnings.warn(f"the answer cannot be kept beside the store: {error}", RuntimeWarning, stacklevel=3)
