"""The job's numbers as Ray metrics. Prometheus finds them next to Ray's own, with the prefix `ray_`.

`expert_atlas_tokens_total` and `expert_atlas_shards_total` (by data set), `expert_atlas_shard_seconds` (of compute),
`expert_atlas_workers` (by stage), `expert_atlas_shards_outstanding`, `_retries`, `_quarantined`, `_workers_lost`.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, get_args

from ray.util import metrics

from jobs.capturing.dispatch import Dispatcher, Stage, Unit, WorkerState


class Metrics:
    """Reports events to Ray: a `jobs.capturing.loop.Watcher`."""

    def __init__(self) -> None:
        by_dataset = {"tag_keys": ("dataset",)}
        self._tokens = metrics.Counter("expert_atlas_tokens_total", "tokens committed", **by_dataset)
        self._shards = metrics.Counter("expert_atlas_shards_total", "shards committed", **by_dataset)
        self._seconds = metrics.Histogram(
            "expert_atlas_shard_seconds", "seconds to route a shard", boundaries=[1, 3, 10, 30, 100, 300, 1000]
        )
        self._workers = metrics.Gauge("expert_atlas_workers", "workers", tag_keys=("stage",))
        self._gauges = {
            name: metrics.Gauge(f"expert_atlas_{name}", text)
            for name, text in {
                "shards_outstanding": "planned shards that are neither committed nor given up",
                "retries": "shards assigned again",
                "quarantined": "shards given up",
                "workers_lost": "workers that ended unexpectedly",
            }.items()
        }

    def finished(self, worker: WorkerState, unit: Unit, facts: Mapping[str, Any]) -> None:
        """Count a committed shard."""
        tags = {"dataset": unit.dataset}
        self._tokens.inc(facts["tokens"], tags=tags)
        self._shards.inc(1, tags=tags)
        self._seconds.observe(facts["seconds"])

    def show(self, dispatcher: Dispatcher) -> None:
        """Report the job's progress."""
        stages = Counter(worker.stage for worker in dispatcher.workers.values())
        for stage in get_args(Stage):
            self._workers.set(stages[stage], tags={"stage": stage})
        values = (
            dispatcher.outstanding,
            dispatcher.retries,
            len(dispatcher.quarantined),
            dispatcher.lost_workers,
        )
        for gauge, value in zip(self._gauges.values(), values, strict=True):
            gauge.set(value)
