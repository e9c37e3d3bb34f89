"""A capture of the tiny model through Ray in which the first worker's GPU really fails in the middle.

Arguments: the store, a file that is written when it happens, and bf16 or fp8 for the products. Exit status and messages
are those of `jobs/capture.py`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from jobs.capturing.captures import capture_datasets, exit_status
from jobs.capturing.options import CaptureConfig
from jobs.capturing.run import Run
from jobs.cluster.ray_workers import connected
from jobs.console.terminal import run_job
from workers.replica import Assignment

MICRO_BATCHES = 3  # that succeed


def engine_of_a_gpu_that_breaks(make_engine: Callable[[], Any], happened: Path) -> Any:
    """The engine. In the first process, an assertion on the GPU fails after some micro-batches."""
    import torch

    engine, original = make_engine(), None
    original, routed = engine.start, 0

    def start(*rows: Any) -> Any:
        nonlocal routed
        routed += 1
        if routed > MICRO_BATCHES and not happened.exists():
            happened.touch()
            torch._assert_async(torch.zeros(1, device="cuda"))
        return original(*rows)

    engine.start = start
    return engine


class BreakingRun(Run):
    """A run whose engine is the breaking one."""

    def __init__(self, config: CaptureConfig, device: str, happened: Path) -> None:
        super().__init__(config, device)
        self.happened = happened

    def assignment(self, leases: Mapping[str, str]) -> Assignment:
        """See `jobs.capturing.run.Run.assignment`."""
        assignment = super().assignment(leases)
        return replace(
            assignment, make_engine=partial(engine_of_a_gpu_that_breaks, assignment.make_engine, self.happened)
        )


def options(store: str, matmul: str) -> dict[str, Any]:
    """About eight shards of real text."""
    small = {"sequence_length": 256, "rows_per_shard": 16, "batch_tokens": 4096, "limit_documents": 4}
    return {"model": "tiny", "dataset": ("demo:prose",), "store": store, "device": "cuda", "matmul": matmul, **small}


def main(arguments: list[str]) -> int:
    """Capture; 0 when complete."""
    store, happened, matmul = arguments
    config = CaptureConfig(workers=1, **options(store, matmul))
    with connected(config) as cluster:
        run = BreakingRun(config, cluster.device, Path(happened))
        return exit_status(capture_datasets(run, run.sources(), cluster.capture))


if __name__ == "__main__":
    run_job(main)
