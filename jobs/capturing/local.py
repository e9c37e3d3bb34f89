"""Capture in this process: one worker, on one device, under the rules of `jobs.capturing.dispatch`.

Computes in the calling thread, so that Ctrl-C ends it at once, and writes in another: while one shard is encoded and
written, the next one is computed. At most one shard waits to be written, so memory is bounded.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jobs.capturing.captures import Capture
from jobs.capturing.dispatch import Unit, WorkerState
from jobs.capturing.loop import Call, CaptureLoop, Event
from jobs.capturing.progress import Progress
from jobs.console.terminal import log, reporting
from workers.replica import Replica
from workers.shard import DeviceLost

if TYPE_CHECKING:
    from jobs.capturing.run import Run


def capture_here(run: "Run", captures: Sequence[Capture]) -> None:
    """Plan the captures, then fill their missing shards: a `jobs.capturing.captures.Fill`."""
    for capture in captures:
        if not capture.planner.plan.complete:  # no bar if there is nothing to show
            with reporting(f"plan {capture.name}", done=capture.planner.plan.tokens) as report:
                capture.planner.run(lambda plan: report.to(plan.tokens, f"{plan.documents:,} documents"))
        capture.log_planned()
    with Progress(captures) as progress:
        CaptureLoop(ThisProcess(run, captures), captures, lambda: True, [progress]).run()


class ThisProcess:
    """A pool of one worker, which is this process: a `jobs.capturing.loop.Pool`.

    It cannot be replaced, so fatal errors end the capture: a model that does not load, storage that fails, a lost
    device.
    """

    stall_s = math.inf

    def __init__(self, run: "Run", captures: Sequence[Capture]) -> None:
        self.run, self._leases = run, {capture.name: capture.lease.token for capture in captures}
        self._calls: deque[tuple[WorkerState, Call]] = deque()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: deque[tuple[WorkerState, Unit, Future[dict[str, Any]]]] = deque()

    def most_workers(self, units: int) -> int:
        """One."""
        return 1

    def start(self, worker: WorkerState) -> None:
        """Start; nothing is loaded yet."""
        self._replica = Replica(lambda tokens: self._routed(worker))
        self.ask(worker, "place")

    def ask(self, worker: WorkerState, call: Call) -> None:
        """Ask the worker to do something; `listen` does it."""
        self._calls.append((worker, call))

    def stop(self, worker: WorkerState) -> None:
        """Wait for pending writes."""
        self._writer.shutdown()

    def listen(self, report: Callable[[Event], None]) -> None:
        """Do one requested thing and report it; a shard is reported once it is written.

        Raises
        ------
        OSError
            When the store cannot be read or written.
        RuntimeError
            When the device is lost.
        """
        self._report = report
        if not self._calls:
            self._report_written()
            return
        worker, call = self._calls.popleft()
        if isinstance(call, Unit):
            self._compute(worker, call)
        elif call == "load":
            log(f"loading {self.run.config.model} ({self.run.quantization}) on {self.run.device}")
            report(Event(worker, call, self._replica.load(self.run.assignment(self._leases))))
        else:
            report(Event(worker, call, self._replica.place()))

    def _routed(self, worker: WorkerState) -> None:
        self._report(Event(worker, "routed", self._replica.routed()))

    def _compute(self, worker: WorkerState, unit: Unit) -> None:
        try:
            commit = self._replica.compute(unit.dataset, unit.shard)
        except Exception as error:
            self._report(_failed(worker, unit, error))
            return
        self._writing.append((worker, unit, self._writer.submit(commit)))  # first in line: computed shards are written
        if len(self._writing) > 1:
            self._report_written()

    def _report_written(self) -> None:
        worker, unit, written = self._writing.popleft()
        try:
            event = Event(worker, unit, written.result())
        except Exception as error:
            event = _failed(worker, unit, error)
        self._report(event)


def _failed(worker: WorkerState, unit: Unit, error: Exception) -> Event:
    """The event for a shard's own error; other errors are raised."""
    if isinstance(error, DeviceLost):
        raise RuntimeError(
            f"the device failed and this process can no longer use it: {error}. Run the same command again to"
            " resume with the missing shards"
        ) from error
    if isinstance(error, OSError):
        raise error
    return Event(worker, unit, error=error)
