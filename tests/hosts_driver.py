"""Captures and verifications in one host: reads options as lines of JSON and prints the exit status of each.

Each runs in a fork that is made before anything connects to a server. Before the first of the writes of `holds`, such
as "put_new fake/expert/commits/2.json", it creates the file `held 0` in its folder and waits for the file `go 0`;
before the second one it creates `held 1`, and so on. With `until_lost`, the thread then waits after such a write until
it has noticed that another job has its lease.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from fake_model import TEXTS, fake_capture
from patience import wait_until

from jobs import status
from jobs.capturing import captures, planner
from jobs.capturing.captures import exit_status
from jobs.console.terminal import run_job
from store import CaptureGroup, lease
from store.lease import Lease
from store.objects import LocalObjects
from store.s3 import S3Objects

held_leases: list[Lease] = []


def hold_at(writes: list[str], folder: Path, *, until_lost: bool) -> None:
    """Wait before each of these writes, the first time."""

    def holding(name: str, method: Any) -> Any:
        def call(self: object, key: str, *data: bytes) -> Any:
            number = writes.index(write) if (write := f"{name} {key}") in writes else None
            if number is None or (folder / f"held {number}").exists():
                return method(self, key, *data)
            (folder / f"held {number}").touch()
            wait_until((folder / f"go {number}").exists, "it is let go")
            done = method(self, key, *data)
            if until_lost:
                wait_until(lambda: held_leases[0].lost, "it notices that its lease is another job's")
            return done

        return call

    for kind in (LocalObjects, S3Objects):
        for name in ("put", "put_new", "put_over", "delete"):
            setattr(kind, name, holding(name, getattr(kind, name)))


@contextmanager
def remembered(group: CaptureGroup, **options: Any) -> Iterator[Lease]:
    """The lease, which `hold_at` checks."""
    with lease.lease(group, **options) as held:
        held_leases.append(held)
        yield held


def work(options: dict[str, Any]) -> int:
    """Capture or verify; returns the exit status."""
    store, folder = options["store"], Path(options["folder"])
    if options["verify"]:
        return status.main([store, "--verify"])
    lease.RENEW_S = lease.LOOK_S = options["renew_s"]
    lease.STALE_S, planner.PUBLISH_POSITIONS = options["stale_s"], 96
    captures.lease = remembered
    hold_at(options["holds"], folder, until_lost=options["until_lost"])
    return exit_status([fake_capture(store, TEXTS)])


def run(options: dict[str, Any]) -> int:
    """Run it in a fork; returns its exit status, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            log = os.open(f"{options['folder']}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 2)
            os.dup2(log, 1)
            run_job(lambda _: work(options))
        except SystemExit as ended:
            os._exit(int(ended.code or 0))
        finally:  # however it ended
            sys.excepthook(*sys.exc_info())
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(json.loads(line)), flush=True)
