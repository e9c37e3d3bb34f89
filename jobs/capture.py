"""Capture routes: `ray job submit -- python jobs/capture.py --dataset wikitext-103`, or `--local` in one process.

Plans each data set (text to rows), and fills every shard that is missing. Nothing is done twice: what is planned
or committed is kept, and the same command goes on from there.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.interrupts import end_on_interrupt

end_on_interrupt()

from jobs.capturing.options import CaptureConfig, parse_capture, take_hub_token
from jobs.console.terminal import run_job
from workers.tiny import model_path


def main(arguments: list[str]) -> int:
    """Run the command; 0 when every data set is complete."""
    config = parse_capture(arguments)
    if config.print_config:
        print(config.as_yaml(), end="")
        return 0
    if not config.dataset:
        raise ValueError("give at least one --dataset, such as --dataset demo:prose; --help lists the kinds")
    model_path(config.model)  # a name with a typo is an error before torch is imported
    take_hub_token()
    if config.dry_run:
        return _estimate(config)
    return _capture_here(config) if config.local else _capture_on_cluster(config)


# Each imports what it needs and no more: torch and transformers take seconds, and --help does not wait for them.


def _estimate(config: CaptureConfig) -> int:
    from jobs.capturing.estimate import print_estimate
    from jobs.capturing.run import Run

    run = Run(config)
    for name, source in run.sources():
        print_estimate(run, name, source)
    return 0


def _capture_here(config: CaptureConfig) -> int:
    from jobs.capturing.captures import capture_datasets, exit_status
    from jobs.capturing.local import capture_here
    from jobs.capturing.run import Run

    run = Run(config)
    return exit_status(capture_datasets(run, run.sources(), capture_here))


def _capture_on_cluster(config: CaptureConfig) -> int:
    from jobs.capturing.captures import capture_datasets, exit_status
    from jobs.capturing.run import Run
    from jobs.cluster.ray_workers import connected

    sources = Run(config).sources()  # first: a mistake is reported before a cluster is waited for
    with connected(config) as cluster:
        return exit_status(capture_datasets(Run(config, cluster.device), sources, cluster.capture))


if __name__ == "__main__":
    run_job(main)
