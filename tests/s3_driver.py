"""Captures on S3 that die: reads [store, the write before which it is killed, or null] and prints the exit status.

Each capture is a fork that is made before anything connects to the server: threads and connections do not survive a
fork.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from fake_model import TEXTS, fake_capture

from store.s3 import S3Objects


def die_before(write: str) -> None:
    """Make this process die before it does `write`, as "put_new fake/zarr.json"."""

    def deadly(name: str, method: Any) -> Any:
        def call(self: S3Objects, key: str, *data: bytes) -> Any:
            if f"{name} {key}" == write:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(self, key, *data)

        return call

    for name in ("put", "put_new", "put_over", "delete"):
        setattr(S3Objects, name, deadly(name, getattr(S3Objects, name)))


def run(store: str, death: str | None) -> int:
    """Capture in a fork; the exit status, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            if death is not None:
                die_before(death)
            status = 0 if fake_capture(store, TEXTS).complete else 1
        finally:
            sys.excepthook(*sys.exc_info()) if sys.exc_info()[0] else None
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(*json.loads(line)), flush=True)
