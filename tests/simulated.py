"""Simulated processes over one store, without real processes: each can die, fail or stop before any of its acts.

A process here is the code that `jobs/capture.py --local` runs, in this interpreter. It accesses the store through
objects that count its steps: an act changes the store, a look reads it. A process dies before an act, and everything
that its `finally` blocks still try is rejected; on a disk, half an object remains in the scratch folder. A stopped
process waits in a thread and continues when it is told to, however long others have considered it dead.

The answer to a put may be lost although the put took effect. Then the storage's client retries, at once or after the
process was stopped, or it gives up.
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
    """The process is dead: it does nothing more, whatever its code tries."""


class Process:
    """One process.

    Parameters
    ----------
    dies_at, fails_at
        The act, counted from 0, before which it dies, or before which storage fails once.
    stops_at
        The step (act or look) before which it stops.
    loses_at
        The act whose answer is lost, if it is a put. The put has taken effect and is retried.
    late
        Whether it stops before the retry.
    gives_up
        Whether it does not retry: storage seems to fail.
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
        """Whether others consider its lease stale."""
        self.error: BaseException | None = None
        self._reports: queue.Queue[str] = queue.Queue()
        self._go_on = threading.Event()

    def look(self) -> None:
        """Called before every read of the store."""
        if self.steps == self.stops_at:
            self._stand_still()
        self.steps += 1
        if self.dead:
            raise Killed

    def act(self, last_act: Callable[[], object] = lambda: None) -> None:
        """Called before every change of the store."""
        self.look()
        number, self.acts = self.acts, self.acts + 1
        if number == self.dies_at:
            self.dead = self.seems_dead = True
            last_act()
            raise Killed
        if number == self.fails_at:
            self._fail()

    def answered(self, put: Callable[[], Any]) -> Any:
        """Put something and learn the result: from the answer, or from the answer to a second try."""
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
        """Do the work until it ends or the process dies; returns what ended it."""
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
        """Do the work in a thread until it ends or stops; returns whether it stopped."""

        def whole() -> None:
            self.run(work)
            self._reports.put("has ended")

        threading.Thread(target=whole, daemon=True).start()
        return self._stands_still()

    def go_on(self, *, steps: int | None = None, acts: int | None = None) -> bool:
        """Continue: for a number of steps, or until it dies before its act number `acts` from here; otherwise to the
        end."""
        self.stops_at = None if steps is None else self.steps + 1 + steps
        self.dies_at = None if acts is None else self.acts + acts
        self._go_on.set()
        return self._stands_still()

    def end(self) -> None:
        """Die at the current step."""
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
    """Objects as seen by one process."""

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
    """Remains of a write during which a process died: on a disk, half of it without a key."""
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
        """Do it now; its result or error is available later."""
        future: Future[Any] = Future()
        try:
            future.set_result(work())
        except (Killed, Exception) as error:
            future.set_exception(error)
        return future


class _Remembered:
    """A `cached_property` without a lock: in Python 3.11 all instances share the lock, which a zombie may hold."""

    def __init__(self, name: str, function: Callable[[Any], Any]) -> None:
        self.name, self.function = name, function

    def __get__(self, instance: Any, owner: type) -> Any:
        return instance.__dict__.setdefault(self.name, self.function(instance))


@contextmanager
def simulation(make: Callable[[str], Objects]) -> Iterator[None]:
    """All stores are one store, created by `make` from a scratch key. Code that opens it inside a process is counted
    and may die."""
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
        patch.setattr(lease, "RENEW_S", NEVER_S)  # a stopped process does not notice that it was overtaken
        patch.setattr(lease, "time", SimpleNamespace(sleep=lambda seconds: None))
        for module in (local, verification):
            patch.setattr(module, "ThreadPoolExecutor", _AtOnce)
        for module in (captures, local, loop, progress):
            patch.setattr(module, "log", lambda line: None)
        small_and_quick(patch)
        yield


def small_and_quick(patch: pytest.MonkeyPatch) -> None:
    """Several publications and chunks in a small capture; pure functions are computed once."""
    patch.setattr(planning, "PUBLISH_POSITIONS", 96)
    for module in (layout, planned):
        patch.setattr(module, "ROW_CHUNK", 8)
    patch.setattr(workers.replica, "environment", lambda device: {"device": device})
    # The same commit records every time, so that the same bits can be flipped again.
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
    """Capture the texts, or resume: the work of a process."""
    run: Any = FakeRun(STORE, fake_layout(vocab_size=12), **options)
    return capture_datasets(run, [(NAME, text_source(TEXTS))], fill)[0]


def undisturbed() -> tuple[dict[str, bytes], Process]:
    """The store of an undisturbed run, in a bucket in memory, and its process."""
    files: dict[str, bytes] = {}
    with simulation(lambda scratch: Bucket(scratch, files)):
        process = Process()
        assert process.run(capture) is None
    return files, process
