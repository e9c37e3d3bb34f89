"""Simulated processes over one store, without a process: each can die, fail or stand still before any of its acts.

A process here is the code that `jobs/capture.py --local` runs, in this interpreter. What it does to the store goes
through objects that count its steps: an act changes the store, a look reads it. Death is before an act, and whatever
the dead one's `finally` blocks still try is refused; on a disk half an object is left in the scratch folder. Who stands
still does so in a thread that waits, and goes on when it is told to, however long it has been taken for dead.

The answer to a put may be lost although the put took effect. Then the storage's client tries again, at once or after
the process has stood still, or it gives up.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bucket import Bucket
from fake_model import TEXTS, FakeRun, fake_layout, text_source
from patience import HUNG_S, NEVER_S

import workers.replica
import workers.shard
from jobs.capturing import captures, local, loop, progress
from jobs.capturing import planner as planning
from jobs.capturing.captures import Fill, capture_datasets
from store import CaptureGroup, Coverage, Layout, layout, lease, names, planned, verification
from store.layout import ArraySpec
from store.objects import LocalObjects, Objects
from store.planned import PlannedGroup

STORE, NAME = "simulated.zarr", "fake"
ACTS = ("put", "put_new", "put_over", "delete", "clear", "settle")
PUTS = ("put", "put_new", "put_over")
LOOKS = ("get", "get_many", "size_bytes", "sizes", "list", "folders")
_here = threading.local()


class Killed(BaseException):
    """The process is dead: it does nothing more, whatever its code says."""


class Process:
    """One process.

    Parameters
    ----------
    dies_at, fails_at
        Before which of its acts, counted from 0, it dies, or storage fails once.
    stops_at
        Before which of its steps, acts and looks, it stands still.
    loses_at
        Of which of its acts it loses the answer, if that is a put. The put has taken effect, and is tried again.
    late
        Whether it stands still before it tries that again.
    gives_up
        Whether it does not try again: storage seems to fail.
    """

    numbers = count()

    def __init__(
        self,
        *,
        dies_at: int | None = None,
        fails_at: int | None = None,
        stops_at: int | None = None,
        loses_at: int | None = None,
        late: bool = False,
        gives_up: bool = False,
    ) -> None:
        self.dies_at, self.fails_at, self.stops_at = dies_at, fails_at, stops_at
        self.loses_at, self.late, self.gives_up = loses_at, late, gives_up
        self.storage_failed = False
        """Whether it was told so."""
        self.number = next(Process.numbers)
        self.acts = self.steps = 0
        self.dead = False
        self.seems_dead = False
        """Whether others take its lease for stale."""
        self.error: BaseException | None = None
        self._reports: queue.Queue[str] = queue.Queue()
        self._go_on = threading.Event()

    def look(self) -> None:
        """Whatever reads the store comes here first."""
        if self.steps == self.stops_at:
            self._stand_still()
        self.steps += 1
        if self.dead:
            raise Killed

    def act(self, last_act: Callable[[], object] = lambda: None) -> None:
        """Whatever changes the store comes here first."""
        self.look()
        number, self.acts = self.acts, self.acts + 1
        if number == self.dies_at:
            self.dead = self.seems_dead = True
            last_act()
            raise Killed
        if number == self.fails_at:
            self._fail()

    def answered(self, put: Callable[[], Any]) -> Any:
        """Put something, and learn what became of it: from the answer, or from that to a second try."""
        answer = put()
        if self.acts - 1 != self.loses_at:
            return answer
        if self.gives_up:
            self._fail()
        if self.late:
            self._stand_still()
        if self.dead:
            raise Killed
        return put()

    def run(self, work: Callable[[], object]) -> BaseException | None:
        """Do the work to its end, or to the process's; what ended it."""
        _here.process = self
        try:
            work()
        except (Killed, Exception) as error:
            self.error = error
        finally:
            _here.process = None
            self.seems_dead = True  # it has ended
        return self.error

    def start(self, work: Callable[[], object]) -> bool:
        """Do the work in a thread until it ends or stands still; whether it stands still."""

        def whole() -> None:
            self.run(work)
            self._reports.put("has ended")

        threading.Thread(target=whole, daemon=True).start()
        return self._stands_still()

    def go_on(self, *, steps: int | None = None, acts: int | None = None) -> bool:
        """Go on: for so many steps, or until it dies before its act number `acts` from here; else to the end."""
        self.stops_at = None if steps is None else self.steps + 1 + steps
        self.dies_at = None if acts is None else self.acts + acts
        self._go_on.set()
        return self._stands_still()

    def end(self) -> None:
        """Die where it stands."""
        self.dead = True
        self.go_on()

    def _fail(self) -> None:
        self.storage_failed = True
        raise OSError(28, "No space left on device")

    def _stand_still(self) -> None:
        self._reports.put("stands still")
        self.dead |= not self._go_on.wait(HUNG_S)
        self._go_on.clear()

    def _stands_still(self) -> bool:
        return self._reports.get(timeout=HUNG_S) == "stands still"


class Watched:
    """Objects as one process has them."""

    def __init__(self, objects: Objects, process: Process) -> None:
        self._objects, self._process = objects, process

    def __getattr__(self, name: str) -> Any:
        found, process = getattr(self._objects, name), self._process

        def look(*arguments: Any) -> Any:
            process.look()
            return found(*arguments)

        def act(*arguments: Any) -> Any:
            process.act(lambda: _tear(self._objects, arguments[-1]))
            return process.answered(lambda: found(*arguments)) if name in PUTS else found(*arguments)

        return act if name in ACTS else look if name in LOOKS else found


def _tear(objects: Objects, data: object) -> None:
    """What is left of a write in which a process died: on a disk, half of it under no key."""
    if isinstance(objects, LocalObjects) and isinstance(data, bytes):
        objects._write_partial(data[: len(data) // 2])


class _AtOnce:
    """A `ThreadPoolExecutor` without a thread: the same steps in the same order, every time."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "_AtOnce":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def shutdown(self, **_: object) -> None:
        pass

    def map(self, work: Callable[[Any], Any], *over: Iterable[Any]) -> Iterator[Any]:
        return iter([work(*each) for each in zip(*over, strict=False)])

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Do it now; its result, or error, is there when it is asked for."""
        future: Future[Any] = Future()
        try:
            future.set_result(work())
        except (Killed, Exception) as error:
            future.set_exception(error)
        return future


class _Remembered:
    """A `cached_property` without a lock: in Python 3.11 all instances share it, also one in which a zombie stands."""

    def __init__(self, name: str, function: Callable[[Any], Any]) -> None:
        self.name, self.function = name, function

    def __get__(self, instance: Any, owner: type) -> Any:
        return instance.__dict__.setdefault(self.name, self.function(instance))


@contextmanager
def simulation(make: Callable[[str], Objects]) -> Iterator[None]:
    """All stores are one, made by `make` of a scratch key; whoever opens it inside a process is counted and may die."""
    processes: dict[int, Process] = {}

    def opened(_: object, scratch: str) -> Any:
        process, objects = getattr(_here, "process", None), make(scratch)
        return objects if process is None else Watched(objects, process)

    def holder() -> dict[str, Any]:
        process = getattr(_here, "process", None)
        number = 0 if process is None else process.number
        processes[number] = process
        return real_holder() | {"process": number}

    def is_gone(number: int) -> bool:
        process = processes.get(number)
        return process is None or process.seems_dead

    real_holder = lease._holder
    with pytest.MonkeyPatch.context() as patch:
        for module in (planned, names):
            patch.setattr(module, "open_objects", opened)
        patch.setattr(lease, "_holder", holder)
        patch.setattr(lease, "_is_stale", lambda group, other, waits: is_gone(other["process"]))
        patch.setattr(lease, "RENEW_S", NEVER_S)  # who stands still does not notice that it was overtaken
        patch.setattr(lease, "time", SimpleNamespace(sleep=lambda seconds: None))
        for module in (local, verification):
            patch.setattr(module, "ThreadPoolExecutor", _AtOnce)
        for module in (captures, local, loop, progress):
            patch.setattr(module, "log", lambda line: None)
        small_and_quick(patch)
        yield


def small_and_quick(patch: pytest.MonkeyPatch) -> None:
    """Several publications and chunks in a small capture; what is a function of its arguments is computed once."""
    patch.setattr(planning, "PUBLISH_POSITIONS", 96)
    for module in (layout, planned):
        patch.setattr(module, "ROW_CHUNK", 8)
    patch.setattr(workers.replica, "environment", lambda device: {"device": device})
    # The same commit records every time, so that a bit of one is the same bit again.
    patch.setattr(workers.replica, "os", SimpleNamespace(environ={}, getpid=lambda: 1))
    patch.setattr(workers.shard, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    for owner, name in ((PlannedGroup, "identity"), (PlannedGroup, "layout"), (CaptureGroup, "_identity_hash")):
        patch.setattr(owner, name, _Remembered(name, vars(owner)[name].func))
    patch.setattr(Layout, "arrays", _arrays)
    for name in ("encode", "decode", "metadata"):
        patch.setattr(ArraySpec, name, _remembered(name, getattr(ArraySpec, name)))


@cache
def _arrays(of: Layout) -> dict[str, ArraySpec]:
    return _ARRAYS(of)


_ARRAYS = Layout.arrays
_known: dict[Any, Any] = {}


def _remembered(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(spec: ArraySpec, values: Any, *size: int) -> Any:
        if isinstance(values, np.ndarray):
            same = values.dtype.str, values.shape, repr(values.tolist()) if values.dtype.hasobject else values.tobytes()
        else:
            same = values
        if (key := (name, id(spec), same, *size)) not in _known:
            _known[key] = method(spec, values, *size)
        return _known[key]

    return call


def capture(fill: Fill = local.capture_here, **options: Any) -> Coverage:
    """Capture the texts, or go on: what a process's work is."""
    run: Any = FakeRun(STORE, fake_layout(vocab_size=12), **options)
    return capture_datasets(run, [(NAME, text_source(TEXTS))], fill)[0]


def undisturbed() -> tuple[dict[str, bytes], Process]:
    """The store of an undisturbed run, in a bucket in memory, and the process that made it."""
    files: dict[str, bytes] = {}
    with simulation(lambda scratch: Bucket(scratch, files)):
        process = Process()
        assert process.run(capture) is None
    return files, process
