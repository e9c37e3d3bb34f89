"""Who may write a group: one job at a time, identified by host and process.

Identical bytes do not need it (every put is complete, and the same for the same shard). It saves a second job from
repeating the first one's work, and gives exactly one of them the right to remove what killed writers left.
`docs/design/0020-what-stores-promise.md` says what a job may still write after losing it.

No clock of another host is read. A record counts its renewals. To find out whether the holder on another host is alive,
a host watches that count for a time that it measures with its own monotonic clock.
"""

import contextlib
import getpass
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from store.group import CaptureGroup
from store.records import as_json, parse_json

RENEW_S = 20.0
STALE_S = 120.0  # arbitrary: six missed renewals; a dead holder on this host is stale at once
LOOK_S = 2.0  # arbitrary: between two reads of the record of a holder on another host


@dataclass(kw_only=True)
class Lease:
    """A lease that this job holds or held."""

    token: str
    """Its unique name: a process that reads it in its store uses the same store."""
    lost: bool = False
    """Whether another job has taken it over or its record is missing; noticed at the next renewal."""


@contextlib.contextmanager
def lease(group: CaptureGroup, waits: Callable[[str], None] = lambda why: None) -> Iterator[Lease]:
    """Hold the group's lease while the block runs.

    Parameters
    ----------
    group
        The data set.
    waits
        Called with the reason before watching the lease of another host, for at most `STALE_S`.

    Raises
    ------
    RuntimeError
        When another job holds it; the message says which user, where and since when.
    """
    key, mine = _key(group), _holder()
    if not group.objects.put_new(key, as_json(mine)):
        _take_over(group, mine, waits)
    held, done = Lease(token=mine["token"]), threading.Event()
    renewer = threading.Thread(target=_renew, args=(group, mine, held, done), daemon=True)
    renewer.start()
    try:
        group.objects.clear(group.objects.scratch)
        yield held
    finally:
        done.set()
        renewer.join()
        with contextlib.suppress(OSError):  # reported already, and the next job sees that this process is gone
            if _is(_read(group), mine):
                group.objects.delete(key)


def lease_token(group: CaptureGroup) -> str | None:
    """Token of the current lease in the store; None if there is none."""
    holder = _read(group)
    return None if holder is None else str(holder["token"])


def lease_holder(group: CaptureGroup) -> str | None:
    """Who holds the lease now, where, and since when by the holder's clock; None if there is no lease.

    For a holder on this host also whether it is gone; for one on another host how often it has renewed the lease: if
    this number grows, the holder is alive.
    """
    holder = _read(group)
    if holder is None:
        return None
    if holder["processes"] == _processes():
        return _who(holder) + (", which is gone" if _is_gone(holder) else "")
    return f"{_who(holder)}, renewed {holder['renewed']:,.0f} times (every {RENEW_S:.0f} s while it is alive)"


def _take_over(group: CaptureGroup, mine: dict[str, Any], waits: Callable[[str], None]) -> None:
    standing = group.objects.get(_key(group))
    other = _parse(standing)
    if _is(other, mine):  # the answer to the first try was lost
        return
    if other is not None and not _is_stale(group, other, waits):
        raise RuntimeError(
            f"{group.path}/{group.dataset} is being captured by {_who(other)}: wait for it or stop it, then run this"
            " command again"
        )
    if group.objects.get(_key(group)) is None:
        group.objects.put_new(_key(group), as_json(mine))
    elif standing is not None:
        group.objects.put_over(_key(group), standing, as_json(mine))
    time.sleep(0.05)  # if two take over at once, the one whose record remains has the lease
    if not _is(_read(group), mine):
        raise RuntimeError(f"{group.path}/{group.dataset}: another job took over the stale lease; run this again")


def _renew(group: CaptureGroup, mine: dict[str, Any], held: Lease, done: threading.Event) -> None:
    renewed = 0
    while not done.wait(RENEW_S):
        with contextlib.suppress(OSError):  # a full disk or an unreachable storage: the capture itself reports it
            standing = group.objects.get(_key(group))
            if standing is None or not _is(_parse(standing), mine):
                held.lost = True  # it was taken over while this process was stopped
                return
            renewed += 1
            group.objects.put_over(_key(group), standing, as_json({**mine, "renewed": renewed}))


def _key(group: CaptureGroup) -> str:
    return f"{group.dataset}/token/lease.json"


def _holder() -> dict[str, Any]:
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "processes": _processes(),
        "user": _user(),
        "process": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "renewed": 0,
    }


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder['process']} of {holder['user']} on {holder['host']} since {holder['since']}"


def _read(group: CaptureGroup) -> dict[str, Any] | None:
    return _parse(group.objects.get(_key(group)))


def _parse(data: bytes | None) -> dict[str, Any] | None:
    try:
        holder = parse_json(data or b"null")
    except ValueError:
        return None
    known = isinstance(holder, dict) and holder.keys() >= _holder().keys()
    return holder if known and type(holder["process"]) is int and type(holder["renewed"]) in (int, float) else None


def _is(holder: dict[str, Any] | None, mine: dict[str, Any]) -> bool:
    return holder is not None and holder["token"] == mine["token"]


def _is_stale(group: CaptureGroup, holder: dict[str, Any], waits: Callable[[str], None]) -> bool:
    """Whether the holder is gone: by its process if that can be seen, otherwise by a record that has stopped changing.

    Each read comes after reading the clock: a record that was unchanged before this process was stopped says nothing
    about the time since.
    """
    if holder["processes"] == _processes():
        return _is_gone(holder)
    where = f"{group.path}/{group.dataset}"
    waits(f"{where} is leased by {_who(holder)}: waiting up to {STALE_S:.0f} s to see whether it is alive")
    began = time.monotonic()
    while True:
        watched_s = time.monotonic() - began
        standing = _read(group)
        if standing != holder:
            return standing is None
        if watched_s >= STALE_S:
            return True
        time.sleep(LOOK_S)


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether a holder on this host has ended."""
    return bool(_process_start(holder["process"]) != holder["process_start"])


def _processes() -> list[str]:
    """Identifies the scope of process ids: this boot of this machine's kernel, and this container.

    The host's name is not enough: containers and unnamed machines share theirs.
    """
    try:
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    except OSError:
        return [socket.gethostname()]


def _process_start(process: int) -> str | None:
    """When a process of this host started, in the kernel's ticks: distinguishes a process from a later one with the
    same id.

    None for a process that is gone, or dead and waiting for its parent.
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
