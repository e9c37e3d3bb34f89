"""The fake model with faults, and texts whose shards reveal their numbers: for captures on a failing cluster.

The planned faults are in a folder that all processes can read, the script: for a shard, or for loading a model, a file
with one act per line. A process that starts it records the attempt, removes the first line and acts.
"""

import errno
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fake_model import FakeEngine, FakeRun, fake_layout, word_id, words

from store import s3
from workers.shard import DeviceLost, Routes, RoutingError

LOAD, CLOCK = "load", "clock"
TOKENS_A_SHARD = 32  # of the layout of `fake_model`: four rows of eight
FIRST_ID = 2
WORDS = {word_id(word): word for word in (f"w{number}" for number in range(20_000))}


@dataclass(frozen=True)
class Attempt:
    """The start of a shard or of a load, by a process of a node's raylet, at a time in seconds, on a host."""

    what: str
    process: int
    raylet: int
    at: float
    host: str


class Script:
    """The folder.

    Acts are "raise" (like a router whose output is wrong), "storage" (a full disk), "device" (a lost GPU), "die"
    (SIGKILL), "slow" (for a load: its shards take ten times as long), "hold", which stays the first line and lasts
    until the script changes, and "hold HOST", which has no effect on other hosts. Those of `CLOCK` are seconds by which
    the driver's clock is moved ahead, one each time that it is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def write(self, what: object, *acts: str) -> None:
        """Set the acts from now on; without acts, nothing fails."""
        new = self.folder / f"{what}.new"
        new.write_text("\n".join(acts))
        new.rename(self.folder / str(what))

    def attempts(self) -> list[Attempt]:
        """All starts, in order."""
        notes = self.folder / "attempts"
        lines = notes.read_text().splitlines() if notes.exists() else []
        parts = (line.split() for line in lines)
        return [Attempt(what, int(process), int(raylet), float(at), host) for what, process, raylet, at, host in parts]

    def begin(self, what: object) -> str:
        """Record an attempt and do the first act, which is returned."""
        with (self.folder / "attempts").open("a") as notes:
            notes.write(f"{what} {os.getpid()} {os.getppid()} {time.time():.3f} {socket.gethostname()}\n")
        if self._acts(what)[:1] and self._acts(what)[0].startswith("hold"):
            while self._acts(what)[:1] in (["hold"], [f"hold {socket.gethostname()}"]):
                time.sleep(0.02)
            return "hold"
        match act := self.next(what):
            case "raise":
                raise RoutingError("layer 0 chose as the script says")
            case "storage":
                raise OSError(errno.ENOSPC, "No space left on device")
            case "device":
                raise DeviceLost("the device is gone")
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return act

    def next(self, what: object) -> str:
        """Remove the first act and return it; empty if there is none."""
        acts = self._acts(what)
        if acts:
            self.write(what, *acts[1:])
        return acts[0] if acts else ""

    def _acts(self, what: object) -> list[str]:
        file = self.folder / str(what)
        return file.read_text().splitlines() if file.exists() else []


class FaultyEngine(FakeEngine):
    """An engine that follows the script.

    Parameters
    ----------
    folder
        Of the script.
    seconds
        Average duration of a shard: 0.5 to 1.5 times as long, depending on its number.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        super().__init__()
        self.script = Script(folder)
        self.seconds = seconds * (10 if self.script.begin(LOAD) == "slow" else 1)

    def route(self, token: np.ndarray, length: np.ndarray) -> Routes:
        """See `FakeEngine.route`; the batch is a whole shard."""
        shard = int(token[0, 0]) - FIRST_ID
        self.script.begin(shard)
        time.sleep(self.seconds * Random(shard).uniform(0.5, 1.5))
        return super().route(token, length)


class Impatient:
    """Makes an engine. A process that receives it stops trying to reach an S3 server after a number of seconds."""

    def __init__(self, make_engine: Callable[[], FaultyEngine], seconds: float) -> None:
        self.make_engine, self.seconds = make_engine, seconds

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        s3.REQUEST_S = s3.RETRY_S = self.seconds

    def __call__(self) -> FaultyEngine:
        return self.make_engine()


def numbered_texts(shards: int) -> Sequence[str]:
    """Documents of one shard each, the last one smaller; each starts with a word whose id identifies its shard."""
    sizes = [TOKENS_A_SHARD] * (shards - 1) + [TOKENS_A_SHARD - 12]
    return [f"{WORDS[FIRST_ID + shard]} {words(size - 1, shard)}" for shard, size in enumerate(sizes)]


def faulty_run(store: str, folder: Path, *, seconds: float, patience_s: float | None = None, **options: Any) -> FakeRun:
    """A run with the faulty engine; for `patience_s` see `Impatient`."""
    run = FakeRun(store, fake_layout(), batch_tokens=TOKENS_A_SHARD, **options)
    make = partial(FaultyEngine, folder, seconds)
    run.make_engine = make if patience_s is None else Impatient(make, patience_s)
    return run
