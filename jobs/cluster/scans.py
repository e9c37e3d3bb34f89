"""Scan a store on a Ray cluster: each task accumulates some shards, and their counts are summed here.

The result is bit-identical to a scan in this process, because accumulators hold integers. Ray runs a lost task again,
which is safe because tasks write nothing. The caller has already decided which shards to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from analysis.scanning import Reducer, Selection, State, accumulate, merge
from jobs.cluster.connection import runtime_env
from store.reader import open_covered

if TYPE_CHECKING:
    import xarray as xr

    from store.coverage import Coverage

TASKS_A_CORE = 4  # so that a slow task does not delay the end for long (arbitrary)


class ClusterRunner:
    """An `analysis.results.Runner` over the cluster that this process is connected to.

    Parameters
    ----------
    path, state
        The store, which all nodes can read, and the part of the capture to scan.
    """

    def __init__(self, path: Path | str, state: Coverage) -> None:
        self.path, self.state = str(path), state

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
        """See `analysis.scanning.accumulate`; `threads` is the number of tasks at a time, by default one per core."""
        cores = threads or int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        number = max(1, min(len(shards), TASKS_A_CORE * cores))
        layers = dataset["layer"].values.tolist()
        remote = ray.remote(num_cpus=1, max_retries=3, runtime_env=runtime_env())(_part)
        waiting = [list(shards[start::number]) for start in range(number)]
        running: dict[Any, int] = {}
        merged = [reducer.init(dataset) for reducer in reducers]
        done = 0
        while waiting or running:
            while waiting and len(running) < cores:
                part = waiting.pop(0)
                running[remote.remote(self.path, self.state, layers, reducers, part, only)] = len(part)
            [ready], _ = ray.wait(list(running))
            merged = merge(reducers, merged, ray.get(ready))
            done += running.pop(ready)
            if progress is not None:
                progress(done, len(shards))
        return merged


def _part(
    path: str, state: Coverage, layers: list[int], reducers: Sequence[Reducer], shards: list[slice], only: Selection
) -> list[State]:
    """Accumulate some shards in one thread; runs on a worker."""
    dataset = open_covered(path, state).sel(layer=layers)
    return accumulate(dataset, reducers, shards, only=only, threads=1)
