"""A capture of the faulty model on the cluster of $RAY_ADDRESS, or with `local`, in a process that a test may kill.

Its argument is JSON: `store`, `script`, `shards`, `seconds` that a shard takes, `device`, and options of the capture.
Exit status and messages are those of `jobs/capture.py`. With `stay`, it keeps its connection until its input ends.
`placeless_s` are the seconds after which it reports that there is no GPU, `node_s` the seconds for which it waits for
the end of a node, `stale_s` those after which the lease of another host is stale, and `patience_s` those after which
workers stop trying to reach S3.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from fake_model import text_source
from faulty_model import CLOCK, Script, faulty_run, numbered_texts

from jobs.capturing import dispatch, loop
from jobs.capturing import planner as plan
from jobs.capturing.captures import capture_datasets, exit_status
from jobs.capturing.local import capture_here
from jobs.capturing.options import CaptureConfig
from jobs.cluster import ray_workers as clusters
from jobs.cluster.ray_workers import connected
from jobs.console.terminal import run_job
from store import lease

plan.PUBLISH_POSITIONS = 16 * 32  # sixteen shards at a time: the first are captured while the last are planned
lease.RENEW_S = 1.0
dispatch.PAUSES_S = (0.0, 2.0)


class Clock:
    """The clock of the loop, which is moved ahead by the script, so that a test decides when workers are late or hung.

    Parameters
    ----------
    script
        See `faulty_model.Script`.
    """

    def __init__(self, script: Script) -> None:
        self.script, self.ahead_s = script, 0.0

    def monotonic(self) -> float:
        """Stands in for `time.monotonic`."""
        self.ahead_s += float(self.script.next(CLOCK) or 0)
        return time.monotonic() + self.ahead_s


def main(arguments: list[str]) -> int:
    """Capture; 0 when complete."""
    given: dict[str, Any] = json.loads(arguments[0])
    store, script, stay = given.pop("store"), Path(given.pop("script")), given.pop("stay", False)
    loop.time = Clock(Script(script))  # type: ignore[assignment]
    lease.STALE_S = given.pop("stale_s", lease.STALE_S)
    clusters.PLACELESS_S = given.pop("placeless_s", clusters.PLACELESS_S)
    clusters.NODE_S = given.pop("node_s", 0.5)
    source, seconds = text_source(numbered_texts(given.pop("shards"))), given.pop("seconds")
    patience_s = given.pop("patience_s", None)
    config = CaptureConfig(store=store, **given)
    retry = config.retry_quarantined
    run: Any = faulty_run(store, script, seconds=seconds, patience_s=patience_s, retry_quarantined=retry)
    if config.local:
        return exit_status(capture_datasets(run, [("fake", source)], capture_here))
    with connected(config) as cluster:
        states = capture_datasets(run, [("fake", source)], cluster.capture)
        if stay:
            sys.stdin.read()
    return exit_status(states)


if __name__ == "__main__":
    run_job(main)
