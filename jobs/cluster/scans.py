"""Scans of a store on a Ray cluster: each task accumulates some shards, and what they counted is added up here.

Equal to a scan in this process to the bit, since accumulators hold integers. A task that is lost is run again by Ray:
it writes nothing. Which shards there are to read was decided before, by who asked.
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

TASKS_A_CORE = 4  # so that a slow one does not hold up the end for long (arbitrary)


class ClusterRunner:
    """An `analysis.results.Runner` over the cluster that this process is connected to.

    Parameters
    ----------
    path, state
        The store, which all nodes see, and what of the capture is looked at.
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
        """See `analysis.scanning.accumulate`; `threads` is the number of tasks at a time, default one a core."""
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
    """Runs on a worker: some shards, in one thread."""
    dataset = open_covered(path, state).sel(layer=layers)
    return accumulate(dataset, reducers, shards, only=only, threads=1)
