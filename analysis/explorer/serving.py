"""Processes that serve pages: a page is rendered in Python, and a process renders one at a time.

Promises: the first process indexes and serves; the others only serve. They receive what is indexed, the progress and
the errors, and end with the first one, however it ends. Each holds its own tables of counts.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn

from analysis.explorer.live import Explorer
from analysis.explorer.site import site
from analysis.scanning import Selection

SWITCH_S = 0.0005  # Python's switch interval: a page takes ten switches, of 5 ms each by default (measured)
TELL_S = 2.0  # between two checks for news to send (arbitrary)
ENDED_S = 3.0  # a helper gets to end by itself (arbitrary)
MOST = 4  # processes, unless more are asked for (arbitrary)


def server_of(explorer: Explorer, names: Sequence[str]) -> uvicorn.Server:
    """The server of an explorer, also under these host names."""
    sys.setswitchinterval(SWITCH_S)
    config = uvicorn.Config(site(explorer, names), log_level="warning", timeout_graceful_shutdown=2)
    return uvicorn.Server(config)


@contextmanager
def helpers(explorer: Explorer, names: Sequence[str], listener: socket.socket, number: int) -> Iterator[None]:
    """Let so many other processes serve the same socket while the block runs."""
    context = multiprocessing.get_context("spawn")
    given = explorer.path, explorer.names, explorer.folder, explorer.only
    pipes, stop = [context.Pipe() for _ in range(number)], threading.Event()
    started = [context.Process(target=_help, args=(given, names, listener, other), daemon=True) for _, other in pipes]
    for process, (_, other) in zip(started, pipes, strict=True):
        process.start()
        other.close()  # otherwise a helper would not notice that the first process ended
    telling = threading.Thread(target=_tell, args=(explorer, [own for own, _ in pipes], stop), daemon=True)
    telling.start()
    try:
        yield
    finally:
        stop.set()
        for own, _ in pipes:
            own.close()
        for process in started:
            process.join(ENDED_S)
            process.terminate()
            process.join()


def _tell(explorer: Explorer, pipes: list[Connection], stop: threading.Event) -> None:
    """Send the helpers what has changed, until `stop` is set."""
    before: dict[str, Any] = {}
    while not stop.wait(TELL_S if before else 0.0):
        digests = {name: shown.digest for name, shown in [*explorer.shown.items()]}
        said = {"digests": digests, "problems": {**explorer.problems}, "progress": {**explorer.progress}}
        for pipe in pipes if said != before else ():
            with contextlib.suppress(OSError):  # the helper has ended
                pipe.send(said)
        if said["digests"] != before.get("digests"):
            _settle()
        before = said


def _help(
    given: tuple[str, Sequence[str] | None, Path | None, Selection],
    names: Sequence[str],
    listener: socket.socket,
    told: Connection,
) -> None:
    """Serve what the first process has indexed, until that process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the helpers
    path, datasets, folder, only = given
    explorer = Explorer(path, datasets, folder, only=only)
    server = server_of(explorer, names)
    answering = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    answering.start()
    _listen(explorer, told)
    server.should_exit = True
    answering.join()


def _listen(explorer: Explorer, told: Connection) -> None:
    """Show what the first process has indexed, until it ends."""
    before: dict[str, str] = {}
    with contextlib.suppress(EOFError, OSError):
        while True:
            said = told.recv()
            for name, digest in said["digests"].items():
                explorer.reread(name, digest)
            if said["digests"] != before:
                before = said["digests"]
                _settle()
            explorer.problems, explorer.progress = said["problems"], said["progress"]


def _settle() -> None:
    """Exclude long-lived objects from garbage collection: a full collection takes 0.2 s."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
