"""The loop of a capture: assigns shards to workers, and reports the results to the dispatcher.

The rules are in `jobs.capturing.dispatch`, the work in `workers.replica`. Where workers run is a `Pool`: this process
(`jobs.capturing.local`) or a Ray cluster (`jobs.cluster.ray_workers`).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jobs.capturing.captures import Capture
from jobs.capturing.dispatch import Dispatcher, Unit, WorkerState
from jobs.console.terminal import log
from store.secrets import without_secrets
from store.verification import verify_shard
from workers.replica import Misplaced
from workers.shard import DeviceLost

Call = Unit | str
"""A request to a worker: a unit, or "place", "load" or "routed", which are methods of `workers.replica.Replica`."""


class WorkerGone(Exception):
    """A worker ended without an answer.

    Parameters
    ----------
    reason
        The reason, as far as known.
    with_node
        Whether its machine was lost too.
    """

    def __init__(self, reason: str, *, with_node: bool) -> None:
        super().__init__(reason)
        self.with_node = with_node


@dataclass(frozen=True)
class Event:
    """The result of a call."""

    worker: WorkerState
    call: Call
    value: Any = None
    """The host for "place", the tokens for "routed", the facts of a committed unit."""
    error: Exception | None = None
    """The error, if the call failed."""


class Pool(Protocol):
    """Where workers run."""

    stall_s: float
    """See `jobs.capturing.dispatch.Dispatcher`."""

    def most_workers(self, units: int) -> int:
        """The number of workers to run while so many units are left."""
        ...

    def start(self, worker: WorkerState) -> None:
        """Start a worker, and ask it for its place."""
        ...

    def ask(self, worker: WorkerState, call: Call) -> None:
        """Send a request to a worker; the answer is an event."""
        ...

    def listen(self, report: Callable[[Event], None]) -> None:
        """Report what has happened; if nothing has, wait a little."""
        ...

    def stop(self, worker: WorkerState) -> None:
        """End a worker, whatever it does."""
        ...


class Watcher(Protocol):
    """Shows the progress of a capture."""

    def finished(self, worker: WorkerState, unit: Unit, facts: Mapping[str, Any]) -> None:
        """A worker has committed a shard."""
        ...

    def show(self, dispatcher: Dispatcher) -> None:
        """Show the progress of the capture."""
        ...


class CaptureLoop:
    """Fills the missing shards of captures.

    Parameters
    ----------
    pool
        Where workers run.
    captures
        The data sets.
    all_planned
        Whether every plan is complete.
    watchers
        Objects that show the progress.
    """

    def __init__(
        self, pool: Pool, captures: Sequence[Capture], all_planned: Callable[[], bool], watchers: Sequence[Watcher]
    ) -> None:
        self.pool, self.all_planned, self.watchers = pool, all_planned, watchers
        self.captures = {capture.name: capture for capture in captures}
        self.dispatcher = Dispatcher(
            pool.most_workers,
            lambda unit: self.captures[unit.dataset].group.committed(unit.shard),
            self._quarantine,
            stall_s=pool.stall_s,
        )
        self._added = dict.fromkeys(self.captures, 0)

    def run(self) -> None:
        """Run until nothing is left to do.

        Raises
        ------
        RuntimeError, ValueError
            When continuing is useless, or another job has taken over a capture.
        """
        dispatcher = self.dispatcher
        try:
            looked = time.monotonic()
            self._add_planned()
            while not dispatcher.finished:
                if time.monotonic() - looked > dispatcher.stall_s / 2:
                    dispatcher.stood_still(time.monotonic())
                looked = time.monotonic()
                self._act(looked)
                self.pool.listen(self._report)
                self._add_planned()
                self._show()
                self._raise_if_over()
        finally:
            for worker in list(dispatcher.workers.values()):
                self.pool.stop(worker)
        for unit in sorted(
            dispatcher.copied
        ):  # two workers may have computed differently, for example one with less memory
            if reason := verify_shard(self.captures[unit.dataset].group, unit.shard):
                log(
                    f"{unit} was written by two workers and is damaged: {reason}; running the same command again"
                    " redoes it"
                )

    def _add_planned(self) -> None:
        complete = self.all_planned()  # asked first: what is planned later is handled the next time
        for name, capture in self.captures.items():
            planned = capture.planned_shards  # asked once: it grows
            self.dispatcher.add(Unit(name, shard) for shard in capture.missing(self._added[name], planned))
            self._added[name] = planned
        self.dispatcher.all_added = complete

    def _act(self, now: float) -> None:
        for worker, reason in self.dispatcher.stalled(now):
            self._replace(worker, reason)
            self.dispatcher.died(worker, reason, now)
        for worker, unit in self.dispatcher.assign(now):
            self.pool.ask(worker, unit)
        for worker in self.dispatcher.surplus():
            self.pool.stop(worker)
        for worker in self.dispatcher.start(now):
            self.pool.start(worker)

    def _show(self) -> None:
        for watcher in self.watchers:
            watcher.show(self.dispatcher)

    def _raise_if_over(self) -> None:
        for capture in self.captures.values():
            capture.check_lease()
        if self.dispatcher.should_abort:
            raise self.dispatcher.abort_reason

    # What happened

    def _report(self, event: Event) -> None:
        now, worker = time.monotonic(), event.worker
        if worker.number not in self.dispatcher.workers:  # stopped: its answers are no longer needed
            return
        if isinstance(event.error, WorkerGone):
            self._gone(worker, event.error, now)
        elif event.error is not None:
            self._failed(worker, event.call, event.error, now)
        else:
            self._answered(worker, event.call, event.value, now)
        self._show()

    def _answered(self, worker: WorkerState, call: Call, value: Any, now: float) -> None:
        if isinstance(call, Unit):
            if self.dispatcher.finish(worker, call, now):
                for watcher in self.watchers:
                    watcher.finished(worker, call, value)
        elif call == "routed":
            self.dispatcher.routed(worker, value, now)
        elif call == "load":
            self.dispatcher.ready(worker, now)
        elif worker.stage == "waiting":
            self.dispatcher.placed(worker, value, now)
            self.pool.ask(worker, "load")
        else:  # it was unreachable, and earlier requests are lost
            self.pool.stop(worker)
            self.dispatcher.lost(worker)

    def _failed(self, worker: WorkerState, call: Call, error: Exception, now: float) -> None:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(call, Unit) and not isinstance(error, OSError | DeviceLost):
            log(f"{call} failed on worker {worker.number}, {worker.host}: {reason}")
            self.dispatcher.fail(worker, call, reason, now)
            return
        self._replace(worker, reason)
        if isinstance(error, DeviceLost):
            self.dispatcher.died(worker, reason, now)
        elif isinstance(error, Misplaced):
            self.dispatcher.refused(worker, reason, now)
        else:
            self.dispatcher.broke(worker, reason, now)

    def _gone(self, worker: WorkerState, error: WorkerGone, now: float) -> None:
        self.pool.stop(worker)
        if error.with_node:
            log(f"worker {worker.number} was lost with its node {worker.host}")
            self.dispatcher.lost(worker)
        else:
            log(f"worker {worker.number} on {worker.host or 'its node'} ended: {error}")
            self.dispatcher.died(worker, str(error), now)

    def _replace(self, worker: WorkerState, reason: str) -> None:
        self.pool.stop(worker)
        log(f"worker {worker.number} on {worker.host} is replaced: {reason}")

    def _quarantine(self, unit: Unit, errors: list[str]) -> None:
        group = self.captures[unit.dataset].group
        names = group.document_names(unit.shard)
        group.quarantine(unit.shard, {"errors": list(map(without_secrets, errors)), "documents": names})
        log(f"{unit} is quarantined after {len(errors)} failures, the last one: {errors[-1]}; documents: {_few(names)}")


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + f" and {len(names) - 3:,} more" * (len(names) > 3)
