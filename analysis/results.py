"""Answers kept next to the store, so that repeating a question costs nothing.

A reducer's counts are kept, not the results derived from them: small arrays of integers in ``STORE.results/``, for
folders and buckets alike. The key covers the capture's identity, its committed shards with their checksums, the code of
the reducer and of the scan, the reducer's parameters and the selection: anything that could change a number changes the
key (`analysis.fingerprint`). If it cannot be determined what a reducer computes, nothing is kept. Old answers are never
wrong and may be deleted at any time.

Promises: an answer equals the result of `analysis.scan`, bit for bit. Does not know any metric.
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
    """Answer questions about one capture: from kept answers, and the rest from one scan.

    Parameters
    ----------
    path, dataset
        The store, and the capture in it.
    reducers : sequence of Reducer
        The reducers to run.
    state : Coverage, optional
        The part of the capture to read; default all that is committed now.
    layers : sequence of int, optional
        The layers to read, by the model's own numbers; default all.
    only, threads, progress
        See `analysis.scan`.
    runner : Runner, optional
        Reads the shards; default this process.

    Returns
    -------
    list of xr.Dataset
        One result for each reducer, in order, with the dims and dtypes documented for the metric's own function. For an
        incomplete capture, the committed part is counted.

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
    """Answer questions about an opened Dataset, which may combine several captures: from kept answers, and the rest
    from one scan.

    Parameters
    ----------
    opened : xr.Dataset
        The Dataset to read.
    reducers : sequence of Reducer
        The reducers to run.
    folder
        Where answers are kept: see `beside`.
    name : str
        The name of a subfolder of it.
    about : sequence
        Identifies the bytes of what was opened: plain values that can be written as JSON.
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
        When it cannot be determined what it counts: see `analysis.fingerprint`.
    """
    return fingerprint(reducer, accumulate)


def _key(dataset: str, about: Sequence[object], reducer: Reducer) -> str | None:
    """Where an answer is kept; None if its question cannot be fingerprinted."""
    try:
        asked = json.dumps([*about, question(reducer)], sort_keys=True)
    except ValueError:
        return None
    return f"{dataset}/{hashlib.sha256(asked.encode()).hexdigest()}.npz"


def _read(kept: Objects, key: str | None, form: State) -> State | None:
    """The kept counts, or None if there are none, or they are incomplete or of a different form."""
    data = kept.get(key) if key else None
    if data is None:
        return None
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Exception:  # zipfile and numpy raise many types
        return None
    return found if found.keys() == form.keys() else None


def _keep(kept: Objects, key: str, state: State) -> None:
    """Keep the counts; if they cannot be written, the answer is returned anyway."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **state)  # type: ignore[arg-type]
    try:
        kept.put(key, buffer.getvalue())
    except OSError as error:
        warnings.warn(f"the answer cannot be kept next to the store: {error}", RuntimeWarning, stacklevel=3)
