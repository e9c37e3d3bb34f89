"""Which worker does which shard, and what happens on failures: the rules of a capture, on one worker or many.

Knows neither Ray nor the clock: `jobs.capturing.loop` reports what happened and when, and asks what to do. Promises:

- a worker gets shards only after it has reported that it is ready, and at most two: the current and the next one;
- a shard is requested again only after checking for its commit in the store;
- a shard that may have broken a worker, or raised an error, is a suspect: it runs alone, so that it cannot affect
  others and the cause is certain. After three strikes it is quarantined;
- if a worker is lost with its node, or its storage fails, or it fails with every shard, the shards in flight get no
  strike; only a shard that was in flight on many lost nodes becomes a suspect;
- if workers keep breaking without finishing a shard, or shards keep failing for good one after the other, the job ends
  and reports the reason;
- a host that rejected a worker is not used again for ten minutes, and time in which the driver itself was suspended
  does not make a worker count as hung;
- near the end, a shard that waits behind another one, or takes twice as long as usual, is also given to an idle worker:
  the first commit wins, so one slow worker does not delay the job;
- a worker with nothing left to do is released.
"""

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

STRIKES = 3
LOSSES = 8  # with their nodes; no shard has so many by chance, even on spot machines (arbitrary)
UNITS_A_WORKER = 2
BROKEN_IN_A_ROW = 3  # consecutive broken workers without a finished shard in between
ERRORS_IN_A_ROW = (STRIKES - 1) * UNITS_A_WORKER  # a worker counts as faulty before its two shards have three strikes
QUARANTINED_IN_A_ROW = 8  # consecutive quarantined shards without a finished one: the shards are not the cause
REFUSED_S = 600.0  # a host that rejected a worker is not used again for so long (arbitrary)
LATE = 2.0  # times the median seconds of a shard, after which it is also given to another worker (arbitrary)
RECENT = 65  # number of finished shards for the median (arbitrary)
PAUSES_S = (0.0, 15.0)  # before a broken worker is replaced, by the number of consecutive failures (arbitrary)

Stage = Literal["waiting", "loading", "ready"]


@dataclass(frozen=True, order=True)
class Unit:
    """One shard of one data set."""

    dataset: str
    shard: int

    def __str__(self) -> str:
        return f"{self.dataset} shard {self.shard}"


@dataclass
class WorkerState:
    """The state of one worker."""

    number: int
    stage: Stage = "waiting"
    """Waiting for a place in the cluster, loading its model, or ready."""
    host: str = ""
    units: list[Unit] = field(default_factory=list)
    """Units in flight, in the given order."""
    alone: bool = False
    """Whether it runs a suspect, and gets nothing else."""
    moved: float = 0.0
    """The time of its last progress: it changed its stage, got its first unit, routed a token or finished a shard."""
    tokens: int = 0
    """Tokens that it has routed, including those of unfinished shards."""
    errors: int = 0
    """Shards that raised an error on it since it last finished one."""
    after: int = 0
    """Consecutive failures of workers when it was started."""


class Dispatcher:
    """The state of all units and workers.

    Parameters
    ----------
    most_workers
        The number of workers to run, given the units left.
    committed
        Whether a unit is committed in the store.
    quarantine
        Called with a unit that is quarantined, and the error of each strike.
    stall_s, load_stall_s
        Seconds after which a worker that routes no token, or does not finish loading, counts as hung. Infinite if a
        worker cannot be replaced: then none counts as hung or faulty.
    """

    def __init__(
        self,
        most_workers: Callable[[int], int],
        committed: Callable[[Unit], bool],
        quarantine: Callable[[Unit, list[str]], None],
        *,
        stall_s: float = 600.0,
        load_stall_s: float = 3600.0,
    ) -> None:
        self._most_workers, self._committed, self._quarantine = most_workers, committed, quarantine
        self.stall_s, self._load_stall_s = stall_s, load_stall_s
        self.workers: dict[int, WorkerState] = {}
        self.done: set[Unit] = set()
        """Units finished by this job."""
        self.quarantined: list[Unit] = []
        """Units quarantined by this job."""
        self.copied: set[Unit] = set()
        """Units given to a second worker near the end."""
        self.retries = 0
        self.lost_workers = 0
        self.all_added = False
        """Whether no more units will come."""
        self.failures: list[str] = []
        """Why workers broke, since the last finished shard."""
        self._queue: deque[Unit] = deque()
        self._suspects: deque[Unit] = deque()
        self._strikes: dict[Unit, list[str]] = {}
        self._quarantined_in_a_row = 0  # units, since the last finished one
        self._last_error = ""
        self._losses: Counter[Unit] = Counter()  # with nodes
        self._last_suspect: dict[Unit, int] = {}  # the worker on which it last failed
        self._resume_at = 0.0
        self._refused: list[float] = []  # when workers were rejected on their hosts
        self._numbers = 0
        self._seconds: deque[float] = deque(maxlen=RECENT)  # durations of the last finished units
        self._begun: dict[tuple[int, Unit], float] = {}  # when a worker started a unit

    # State

    @property
    def outstanding(self) -> int:
        """Units that are neither finished nor quarantined."""
        in_flight = {unit for worker in self.workers.values() for unit in worker.units}
        return len(self._queue) + len(self._suspects) + len(in_flight)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.all_added and not self.outstanding

    @property
    def should_abort(self) -> bool:
        """Whether to stop: workers keep breaking and none is left, or shards keep failing."""
        broken = len(self.failures) >= BROKEN_IN_A_ROW and not self.workers
        return broken or self._quarantined_in_a_row >= QUARANTINED_IN_A_ROW

    @property
    def abort_reason(self) -> Exception:
        """Why to stop: a ValueError if something must be fixed first."""
        if self._quarantined_in_a_row >= QUARANTINED_IN_A_ROW:
            return ValueError(
                f"{self._quarantined_in_a_row} consecutive shards failed {STRIKES} times each, so the shards are"
                f" probably not the cause; the last error: {self._last_error}. Fix it and run this again with"
                " --retry_quarantined"
            )
        return RuntimeError(f"{len(self.failures)} consecutive workers failed, the last one: {self.failures[-1]}")

    # What to do

    def add(self, units: Iterable[Unit]) -> None:
        """Add units to do."""
        self._queue.extend(units)

    def start(self, now: float) -> list[WorkerState]:
        """New workers to start."""
        wanted = self._most_workers(max(1, self.outstanding))  # one worker loads while the first shard is planned
        if self.all_added:  # one worker for each waiting unit, none for the second unit of a busy one
            busy = sum(bool(worker.units) for worker in self.workers.values())
            wanted = min(wanted, busy + len(self._queue) + len(self._suspects))
        refused = sum(now - when < REFUSED_S for when in self._refused)
        wanted = min(wanted, max(1, wanted - refused))
        too_many = len(self.failures) >= BROKEN_IN_A_ROW  # no more until an existing one finishes a shard
        if too_many or self.should_abort or (self.failures and now < self._resume_at):
            return []
        new = []
        while len(self.workers) < wanted:
            self._numbers += 1
            state = WorkerState(self._numbers, after=len(self.failures))
            new.append(self.workers.setdefault(self._numbers, state))
        return new

    def assign(self, now: float) -> list[tuple[WorkerState, Unit]]:
        """Units to give to workers."""
        ready = sorted((w for w in self.workers.values() if w.stage == "ready"), key=lambda w: (len(w.units), w.number))
        given: list[tuple[WorkerState, Unit]] = []
        for unit in list(self._suspects):
            if idle := [worker for worker in self._fit(unit, ready) if not worker.units]:
                self._suspects.remove(unit)
                idle[0].alone = True
                given.append((idle[0], self._give(idle[0], unit, now)))
        # While a suspect waits, one worker that may run it gets no new units until it is idle.
        fit = self._fit(self._suspects[0], ready) if self._suspects else []
        drained = [worker for worker in fit if not worker.alone][:1]
        open_to = [worker for worker in ready if not worker.alone and worker not in drained]
        for place in range(UNITS_A_WORKER):
            for worker in open_to:
                if self._queue and len(worker.units) == place:
                    given.append((worker, self._give(worker, self._queue.popleft(), now)))
        return given + self._copies(ready, now)

    def _copies(self, ready: list[WorkerState], now: float) -> list[tuple[WorkerState, Unit]]:
        """The units that idle workers repeat near the end."""
        if not self._at_the_tail:
            return []
        idle = [worker for worker in ready if not worker.units]
        held_up = [unit for worker, unit in self._single() if unit != worker.units[0] or self._is_late(worker, now)]
        copies = list(zip(idle, held_up, strict=False))
        self.copied.update(unit for _, unit in copies)
        return [(worker, self._give(worker, unit, now)) for worker, unit in copies]

    @property
    def _at_the_tail(self) -> bool:
        """Whether all remaining units are in flight."""
        return self.all_added and not self._queue and not self._suspects

    def _single(self) -> list[tuple[WorkerState, Unit]]:
        """Units in flight on one worker that may be given to another, without failed ones, which run alone."""
        return [
            (worker, unit)
            for worker in self.workers.values()
            for unit in worker.units
            if not worker.alone and unit not in self.copied and unit not in self._strikes
        ]

    def _is_late(self, worker: WorkerState, now: float) -> bool:
        """Whether a worker's first unit takes much longer than usual."""
        begun = self._begun[worker.number, worker.units[0]]
        return bool(self._seconds) and now - begun > LATE * statistics.median(self._seconds)

    def stalled(self, now: float) -> list[tuple[WorkerState, str]]:
        """Workers that count as hung or faulty, and why; the caller kills them and reports them as `died`."""
        if math.isinf(self.stall_s):
            return []
        hung = []
        for worker in self.workers.values():
            idle_s = now - worker.moved
            if worker.errors >= ERRORS_IN_A_ROW:
                hung.append((worker, f"{worker.errors} consecutive shards failed on it"))
            elif worker.stage == "loading" and idle_s > self._load_stall_s:
                hung.append((worker, f"its model was not loaded within {self._load_stall_s:,.0f} s"))
            elif worker.units and idle_s > self.stall_s:
                hung.append((worker, f"it routed no token for {self.stall_s:,.0f} s"))
        return hung

    def surplus(self) -> list[WorkerState]:
        """Workers with nothing left to do, removed here; the caller kills them."""
        if not self._at_the_tail:
            return []
        idle = [worker for worker in self.workers.values() if not worker.units]
        standby = len(self._single()) if self._seconds else 0  # for units that may turn out to be late
        for worker in idle[standby:]:
            del self.workers[worker.number]
        return idle[standby:]

    # Reports

    def stood_still(self, now: float) -> None:
        """The driver itself was suspended: it cannot know what the workers did meanwhile."""
        for worker in self.workers.values():
            worker.moved = now

    def placed(self, worker: WorkerState, host: str, now: float) -> None:
        """The worker runs on a host, and loads its model."""
        worker.stage, worker.host, worker.moved = "loading", host, now

    def ready(self, worker: WorkerState, now: float) -> None:
        """The worker has loaded its model and can access the store."""
        worker.stage, worker.moved = "ready", now

    def routed(self, worker: WorkerState, tokens: int, now: float) -> None:
        """The worker has routed so many tokens in total."""
        if tokens != worker.tokens:
            worker.tokens, worker.moved = tokens, now

    def finish(self, worker: WorkerState, unit: Unit, now: float) -> bool:
        """The unit is committed; returns False for the slower of two copies."""
        worker.errors = 0
        if unit not in worker.units:
            return False
        if unit == worker.units[0]:
            self._seconds.append(now - self._begun[worker.number, unit])
        self._take(worker, unit, now)
        self._settle(unit)
        return True

    def fail(self, worker: WorkerState, unit: Unit, reason: str, now: float) -> None:
        """The unit raised its own error; the worker continues."""
        if unit not in worker.units:  # a copy of a committed unit
            return
        self._take(worker, unit, now)
        worker.errors += 1
        self._strike(worker, unit, reason)

    def refused(self, worker: WorkerState, reason: str, now: float) -> None:
        """The worker cannot access the store, or has different packages or a different GPU; the next one there would
        too."""
        self._refused.append(now)
        self.broke(worker, reason, now)

    def broke(self, worker: WorkerState, reason: str, now: float) -> None:
        """The worker cannot continue, but not because of its units: it did not start, or its storage fails."""
        if len(self.failures) <= worker.after:  # otherwise others started with it broke too, which counts once
            self.failures.append(reason)
        self._resume_at = now + PAUSES_S[min(len(self.failures), len(PAUSES_S)) - 1]
        self._forget(worker)

    def lost(self, worker: WorkerState) -> None:
        """The worker was lost with its node, or was unreachable: its units are redone without strikes.

        After `LOSSES` losses a unit is run alone, and each further loss is a strike.
        """
        self._losses.update(worker.units)
        if worker.alone and self._losses[worker.units[0]] > LOSSES:
            self._blame(worker, f"its node was lost while it ran alone, after {LOSSES} or more earlier losses")
        else:
            self._forget(worker)

    def died(self, worker: WorkerState, reason: str, now: float) -> None:
        """The worker's process ended or hung on a live node: the units in flight may be the cause."""
        if worker.errors >= ERRORS_IN_A_ROW:  # the worker is faulty, not its units
            self._forget(worker)
        elif worker.units:
            self._blame(worker, reason)
        else:
            self.broke(worker, reason, now)

    def _forget(self, worker: WorkerState) -> None:
        """Remove the worker and redo its units in flight."""
        del self.workers[worker.number]
        self.lost_workers += 1
        for unit in reversed(worker.units):
            if self._committed(unit):
                self._settle(unit)
            elif not self._is_held(unit):
                self.retries += 1
                again = self._suspects if worker.alone or self._losses[unit] >= LOSSES else self._queue
                again.appendleft(unit)

    def _blame(self, worker: WorkerState, reason: str) -> None:
        """Remove the worker and treat its units in flight as suspects."""
        del self.workers[worker.number]
        self.lost_workers += 1
        for unit in worker.units:
            self._strike(worker, unit, reason)

    def _fit(self, unit: Unit, ready: list[WorkerState]) -> list[WorkerState]:
        """The workers that a suspect may run on: not the one on which it last failed, unless that is the only one."""
        return [worker for worker in ready if worker.number != self._last_suspect.get(unit)] or ready

    def _give(self, worker: WorkerState, unit: Unit, now: float) -> Unit:
        if not worker.units:
            worker.moved = self._begun[worker.number, unit] = now
        worker.units.append(unit)
        return unit

    def _take(self, worker: WorkerState, unit: Unit, now: float) -> None:
        self._begun.pop((worker.number, unit), None)
        worker.units.remove(unit)
        worker.alone = False
        worker.moved = now
        if worker.units:
            self._begun.setdefault((worker.number, worker.units[0]), now)

    def _is_held(self, unit: Unit) -> bool:
        """Whether another worker still has it in flight."""
        return any(unit in worker.units for worker in self.workers.values())

    def _settle(self, unit: Unit) -> None:
        for worker in self.workers.values():
            if unit in worker.units:  # the slower copy
                self._take(worker, unit, worker.moved)
        self.done.add(unit)
        self._strikes.pop(unit, None)
        self._losses.pop(unit, None)
        self.failures.clear()
        self._quarantined_in_a_row = 0

    def _strike(self, worker: WorkerState, unit: Unit, reason: str) -> None:
        if self._committed(unit):
            self._settle(unit)
            return
        strikes = self._strikes.setdefault(unit, [])
        strikes.append(reason)
        self._last_error = reason
        self._last_suspect[unit] = worker.number
        if self._is_held(unit):
            return
        if len(strikes) >= STRIKES:
            self.quarantined.append(unit)
            self._quarantined_in_a_row += 1
            self._quarantine(unit, self._strikes.pop(unit))
        else:
            self.retries += 1
            self._suspects.append(unit)
