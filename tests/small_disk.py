"""Captures on a disk that is really full, and on one that really becomes read-only: `unshare --mount python
small_disk.py FOLDER`, as root. Prints the output of each run of the command, one JSON object per line.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from fake_model import TEXTS, fake_capture, store_files
from patience import NEVER_S

from jobs.capturing.captures import exit_status
from jobs.console.terminal import run_job
from store import coverage, lease
from store.objects import LocalObjects


def mount(folder: Path, options: str) -> None:
    """Mount a small disk, or change the existing one."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def run(folder: Path, what: str) -> None:
    """Run the command in its own process and print its output."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    said, store, status = io.StringIO(), folder / "routes.zarr", None
    with contextlib.redirect_stderr(said):
        try:
            run_job(lambda _: exit_status([fake_capture(store, TEXTS)]))
        except SystemExit as end:
            status = end.code
    found: dict[str, Any] = {"what": what, "status": status, "said": said.getvalue()}
    if (store / "fake" / "zarr.json").exists():
        state = coverage(store, "fake")
        found |= {"wrong": state.wrong, "lost": state.lost, "done": state.shards_done, "complete": state.complete}
        found["partial"] = [key for key in store_files(store) if "/partial/" in key]
    print(json.dumps(found), flush=True)
    os._exit(0)


def read_only_at(folder: Path, key: str) -> Callable[[LocalObjects, str, bytes], bool]:
    """A `put_new` that makes the disk read-only before it puts that object."""
    real = LocalObjects.put_new

    def put_new(self: LocalObjects, name: str, data: bytes) -> bool:
        if name == key:
            mount(folder, "remount,ro")
        return real(self, name, data)

    return put_new


if __name__ == "__main__":
    disk = Path(sys.argv[1])
    lease.RENEW_S = NEVER_S  # a renewal needs space
    mount(disk, "size=16k")
    run(disk, "full")
    for kilobytes in (64, 112):
        mount(disk, f"remount,size={kilobytes}k")
        run(disk, "full")
    mount(disk, "remount,size=4m")
    with mock.patch.object(LocalObjects, "put_new", read_only_at(disk, "fake/expert/commits/3.json")):
        run(disk, "read-only from the fourth commit on")
    run(disk, "read-only")
    mount(disk, "remount,rw")
    run(disk, "well again")
