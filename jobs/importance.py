"""What does every expert do to predictions? `python jobs/importance.py --local --model tiny --dataset demo:prose`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.interrupts import end_on_interrupt

end_on_interrupt()

from jobs.capturing.importance_options import ImportanceConfig, parse_importance
from jobs.capturing.options import take_hub_token
from jobs.console.terminal import run_job
from workers.tiny import model_path

if TYPE_CHECKING:
    from store import Coverage


def main(arguments: list[str]) -> int:
    """Measure, and tell what was found."""
    config = parse_importance(arguments)
    if not config.dataset:
        raise ValueError("give at least one --dataset, such as --dataset demo:prose; --help lists the kinds")
    model_path(config.model)  # a name with a typo is an error before torch is imported
    take_hub_token()
    if config.dry_run:
        return _estimate(config)

    from jobs.capturing.captures import exit_status

    states = _measured(config)
    return exit_status(states)


def _estimate(config: ImportanceConfig) -> int:
    from jobs.capturing.estimate import print_estimate
    from jobs.capturing.importance_run import ImportanceRun

    run = ImportanceRun(config)
    for name, source in run.sources():
        print_estimate(run, name, source)
    return 0


def _measured(config: ImportanceConfig) -> "Sequence[Coverage]":
    """Have the effects measured that are missing, in this process or on a cluster."""
    from jobs.capturing.captures import capture_datasets
    from jobs.capturing.importance_run import ImportanceRun

    run = ImportanceRun(config)
    sources = run.sources()  # a mistake is reported before a cluster is waited for
    if config.local:
        from jobs.capturing.local import capture_here

        return capture_datasets(run, sources, capture_here)
    from jobs.cluster.ray_workers import connected

    with connected(config) as cluster:
        return capture_datasets(ImportanceRun(config, cluster.device), sources, cluster.capture)


if __name__ == "__main__":
    run_job(main)
