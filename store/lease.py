"""Who may write a group: one job at a time, told apart by host and process.

Byte-identity does not need it (every put is whole and the same for the same shard); it saves the second job from
doing the first one's work again, and gives exactly one of them the right to remove what killed writers left.
"""

import contextlib
import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from store.group import CaptureGroup

RENEW_S = 20.0
STALE_S = 120.0  # arbitrary: six renewals missed; a holder on this host that is gone is stale at once


@contextlib.contextmanager
def lease(group: CaptureGroup) -> Iterator[None]:
    """Hold the group's lease while the block runs.

    Raises
    ------
    RuntimeError
        When another job holds it; the message says who, where and since when.
    """
    key = f"{group.dataset}/token/lease.json"
    mine = _holder()
    if not group.objects.put_new(key, json.dumps(mine).encode()):
        other = _read(group, key)
        if other is not None and not _is_stale(group, key, other):
            raise RuntimeError(
                f"{group.path}/{group.dataset} is being captured by process {other['process']} of {other['user']} on"
                f" {other['host']} since {other['since']}: wait for it or end it, then run this command again"
            )
        group.objects.put(key, json.dumps(mine).encode())
        time.sleep(0.05)  # of two that take over at once, the one whose record stands has it
        if not _is(_read(group, key), mine):
            raise RuntimeError(f"{group.path}/{group.dataset}: another job took over the stale lease; run this again")
    done = threading.Event()
    renewer = threading.Thread(target=_renew, args=(group, key, mine, done), daemon=True)
    renewer.start()
    try:
        group.objects.clear(group.objects.scratch)
        yield
    finally:
        done.set()
        renewer.join()
        if _is(_read(group, key), mine):
            group.objects.delete(key)


def _renew(group: CaptureGroup, key: str, mine: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(RENEW_S):
        with contextlib.suppress(OSError):  # a full disk: the capture itself reports it
            if not _is(_read(group, key), mine):
                return  # it was taken over while this process stood still
            group.objects.put(key, json.dumps({**mine, "renewed": time.time()}).encode())


def _holder() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "user": _user(),
        "process": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "renewed": time.time(),
    }


def _read(group: CaptureGroup, key: str) -> dict[str, Any] | None:
    try:
        holder = json.loads(group.objects.get(key) or b"null")
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and holder.keys() >= _holder().keys() else None


def _is(holder: dict[str, Any] | None, mine: dict[str, Any]) -> bool:
    return holder is not None and holder.get("token") == mine["token"]


def _is_stale(group: CaptureGroup, key: str, holder: dict[str, Any]) -> bool:
    """Whether the holder is gone: on this host told by its process, elsewhere by a record that does not change.

    Clocks of two hosts may differ, so a record that looks old is watched for one and a half renewals first.
    """
    if holder["host"] == socket.gethostname():
        return bool(_process_start(holder["process"]) != holder["process_start"])
    if time.time() - float(holder["renewed"]) <= STALE_S:
        return False
    time.sleep(1.5 * RENEW_S)
    return _read(group, key) in (holder, None)


def _process_start(process: int) -> str | None:
    """When a process of this host began, in the kernel's ticks: tells a process from a later one of the same id.

    None for one that is gone, or dead and waiting for its parent.
    """
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())
