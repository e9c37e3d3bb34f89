"""Runs captures that die: a separate process that reads from its input what to capture and where to be killed.

Each run is a fork with everything already imported, so that a kill and a resume take a fraction of a second. A run can
die at several steps for each object that it writes: before the write, with half of the object in the scratch folder,
with all of it there but nothing visible; and before a removal. It is killed with SIGKILL. The lease is not renewed
here, because the time of a renewal depends on the machine's speed and it would count as a step.
"""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from fake_model import TEXTS, fake_capture
from patience import NEVER_S

from jobs.capturing import planner as plan
from store import lease
from store.objects import LocalObjects


def die_at(step: int | None, trace: Path) -> None:
    """Make this process die at its step number `step`, counted from 0; without one, only trace the steps."""
    steps: list[str] = []
    stage = {"key": ""}

    def reached(name: str, last_act: Callable[[], object] = lambda: None) -> None:
        if len(steps) == step:
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)
        steps.append(f"{name} {stage['key']}")
        if step is None:
            trace.write_text(json.dumps(steps))

    def announced(method: Any, name: str) -> Any:
        def call(self: LocalObjects, key: str, *data: bytes) -> Any:
            stage["key"] = key
            reached(f"before {name}")
            return method(self, key, *data)

        return call

    def torn(write: Any) -> Any:
        def call(self: LocalObjects, data: bytes) -> Path:
            reached("torn", lambda: write(self, data[: len(data) // 2]))
            partial: Path = write(self, data)
            reached("invisible")
            return partial

        return call

    for name in ("put", "put_new", "put_over", "delete"):
        setattr(LocalObjects, name, announced(getattr(LocalObjects, name), name))
    LocalObjects._write_partial = torn(LocalObjects._write_partial)  # type: ignore[method-assign]


def run(store: str, step: int | None) -> int:
    """Capture in a fork; the exit status, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            log = os.open(f"{store}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 2)
            os.dup2(log, 1)
            plan.PUBLISH_POSITIONS = 96  # twelve rows, then five: the sixth document starts in the first publication
            lease.RENEW_S = NEVER_S
            os.fsync = lambda handle: None  # losses at power failures are tested in test_power_loss.py
            die_at(step, Path(f"{store}.trace"))
            status = 0 if fake_capture(Path(store), TEXTS).complete else 1
        finally:
            sys.excepthook(*sys.exc_info()) if sys.exc_info()[0] else None
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    gc.freeze()  # a fork that scans all of it copies all of it
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
