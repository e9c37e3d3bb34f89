"""Which worker does which shard, and what happens when something breaks: the rules of a capture, on one worker or many.

It knows no Ray and no clock: `jobs.capturing.loop` reports what happened and when, and asks what to do. Its promises:

- a worker gets shards only once it has reported that it is ready, and at most two: one to compute, one to follow;
- a shard is asked for again only after its commit was looked for in the store;
- whoever may have broken a worker, or raised an error, is a suspect: it runs alone, so that nobody else pays for it
  and the blame is certain. Three strikes put it into quarantine;
- a worker that is lost with its node, or whose storage fails, or that fails with everything, gives what it has in
  flight no strike; only a shard that was in flight on many nodes that were lost is a suspect too;
- workers that break again and again without a shard between them, and shards of which one after the other fails for
  good, end the job with the reason;
- a place where a worker was refused is not asked for again for ten minutes, and time in which the driver itself stood
  still makes no worker hung;
- at the tail, what waits behind another shard, or takes twice as long as shards do, is given to an idle worker too: the
  first commit wins, and one slow worker holds nobody up;
- a worker for which there is nothing left to do is let go.
"""

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

STRIKES = 3
LOSSES = 8  # with their nodes: by chance none has so many, whatever spot machines do (arbitrary)
UNITS_A_WORKER = 2
BROKEN_IN_A_ROW = 3  # workers broken, each started after the one before, with no shard finished between them
ERRORS_IN_A_ROW = (STRIKES - 1) * UNITS_A_WORKER  # a worker is taken for sick before its two shards have three strikes
QUARANTINED_IN_A_ROW = 8  # shards given up with none finished between them: not the shards are at fault
REFUSED_S = 600.0  # for which a place where a worker was refused is not asked for again (arbitrary)
LATE = 2.0  # times the median seconds of a shard, after which one is given to another worker too (arbitrary)
RECENT = 65  # finished shards whose seconds make the median (arbitrary)
PAUSES_S = (0.0, 15.0)  # before a broken worker is replaced, by how many broke in a row (arbitrary)

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
    """What is known of one worker."""

    number: int
    stage: Stage = "waiting"
    """Waiting for a place in the cluster, loading its model, or ready."""
    host: str = ""
    units: list[Unit] = field(default_factory=list)
    """In flight, in the order given."""
    alone: bool = False
    """Whether it runs a suspect, and gets nothing beside it."""
    moved: float = 0.0
    """When it last got on: changed its stage, got its first unit, routed a token or finished a shard."""
    tokens: int = 0
    """Tokens that it has routed, of shards in work too."""
    errors: int = 0
    """Shards that raised an error on it since it last finished one."""
    after: int = 0
    """Workers that had broken in a row when it was started."""


class Dispatcher:
    """The state of all units and workers.

    Parameters
    ----------
    most_workers
        Workers wanted at a time, given the units left.
    committed
        Whether a unit's commit stands in the store.
    quarantine
        Called with a unit that is given up, and the error of each strike.
    stall_s, load_stall_s
        Seconds after which a worker that routes no token, or does not finish loading, is taken for hung. Without end
        where a worker cannot be replaced: then none is taken for hung or sick.
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
        """Finished by this job."""
        self.quarantined: list[Unit] = []
        """Given up by this job."""
        self.copied: set[Unit] = set()
        """Given to a second worker at the tail."""
        self.retries = 0
        self.lost_workers = 0
        self.all_added = False
        """Whether no more units will come."""
        self.failures: list[str] = []
        """Why workers broke, since a shard was last finished."""
        self._queue: deque[Unit] = deque()
        self._suspects: deque[Unit] = deque()
        self._strikes: dict[Unit, list[str]] = {}
        self._quarantined_in_a_row = 0  # units, since one was last finished
        self._last_error = ""
        self._losses: Counter[Unit] = Counter()  # with nodes
        self._last_suspect: dict[Unit, int] = {}  # the worker on which it last failed
        self._resume_at = 0.0
        self._refused: list[float] = []  # when workers were refused where they were placed
        self._numbers = 0
        self._seconds: deque[float] = deque(maxlen=RECENT)  # of the last finished units
        self._begun: dict[tuple[int, Unit], float] = {}  # when a worker came to a unit

    # What there is

    @property
    def outstanding(self) -> int:
        """Units that are known and neither finished nor given up."""
        in_flight = {unit for worker in self.workers.values() for unit in worker.units}
        return len(self._queue) + len(self._suspects) + len(in_flight)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.all_added and not self.outstanding

    @property
    def should_abort(self) -> bool:
        """Whether going on makes no sense: workers only break, and none is left, or shards only fail."""
        broken = len(self.failures) >= BROKEN_IN_A_ROW and not self.workers
        return broken or self._quarantined_in_a_row >= QUARANTINED_IN_A_ROW

    @property
    def abort_reason(self) -> Exception:
        """Why going on makes no sense: a ValueError where someone must put something right first."""
        if self._quarantined_in_a_row >= QUARANTINED_IN_A_ROW:
            return ValueError(
                f"{self._quarantined_in_a_row} shards in a row failed {STRIKES} times each, so that not they are at"
                f" fault; the last error: {self._last_error}. Put it right and run this again with --retry_quarantined"
            )
        return RuntimeError(f"{len(self.failures)} workers in a row could not work, the last one: {self.failures[-1]}")

    # What to do

    def add(self, units: Iterable[Unit]) -> None:
        """More units to do."""
        self._queue.extend(units)

    def start(self, now: float) -> list[WorkerState]:
        """New workers to start."""
        wanted = self._most_workers(max(1, self.outstanding))  # one loads while the first shard is planned
        if self.all_added:  # a worker for each unit that waits, and none for the second unit of a busy one
            busy = sum(bool(worker.units) for worker in self.workers.values())
            wanted = min(wanted, busy + len(self._queue) + len(self._suspects))
        refused = sum(now - when < REFUSED_S for when in self._refused)
        wanted = min(wanted, max(1, wanted - refused))
        too_many = len(self.failures) >= BROKEN_IN_A_ROW  # none more until one of those that are there finishes a shard
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
        # While a suspect waits, one worker that may run it gets nothing new until it is idle.
        fit = self._fit(self._suspects[0], ready) if self._suspects else []
        drained = [worker for worker in fit if not worker.alone][:1]
        open_to = [worker for worker in ready if not worker.alone and worker not in drained]
        for place in range(UNITS_A_WORKER):
            for worker in open_to:
                if self._queue and len(worker.units) == place:
                    given.append((worker, self._give(worker, self._queue.popleft(), now)))
        return given + self._copies(ready, now)

    def _copies(self, ready: list[WorkerState], now: float) -> list[tuple[WorkerState, Unit]]:
        """What idle workers are to do again, at the tail."""
        if not self._at_the_tail:
            return []
        idle = [worker for worker in ready if not worker.units]
        held_up = [unit for worker, unit in self._single() if unit != worker.units[0] or self._is_late(worker, now)]
        copies = list(zip(idle, held_up, strict=False))
        self.copied.update(unit for _, unit in copies)
        return [(worker, self._give(worker, unit, now)) for worker, unit in copies]

    @property
    def _at_the_tail(self) -> bool:
        """Whether all that is left is in flight."""
        return self.all_added and not self._queue and not self._suspects

    def _single(self) -> list[tuple[WorkerState, Unit]]:
        """What is in flight on one worker and may be given to another; not what has failed: that runs alone."""
        return [
            (worker, unit)
            for worker in self.workers.values()
            for unit in worker.units
            if not worker.alone and unit not in self.copied and unit not in self._strikes
        ]

    def _is_late(self, worker: WorkerState, now: float) -> bool:
        """Whether a worker takes much longer for its first unit than units do."""
        begun = self._begun[worker.number, worker.units[0]]
        return bool(self._seconds) and now - begun > LATE * statistics.median(self._seconds)

    def stalled(self, now: float) -> list[tuple[WorkerState, str]]:
        """Workers that are taken for hung or sick, and why; they are to be killed, and reported as `died`."""
        if math.isinf(self.stall_s):
            return []
        hung = []
        for worker in self.workers.values():
            idle_s = now - worker.moved
            if worker.errors >= ERRORS_IN_A_ROW:
                hung.append((worker, f"{worker.errors} shards in a row failed on it"))
            elif worker.stage == "loading" and idle_s > self._load_stall_s:
                hung.append((worker, f"its model was not loaded within {self._load_stall_s:,.0f} s"))
            elif worker.units and idle_s > self.stall_s:
                hung.append((worker, f"it routed no token for {self.stall_s:,.0f} s"))
        return hung

    def surplus(self) -> list[WorkerState]:
        """Workers for which nothing is left to do, forgotten here; they are to be killed."""
        if not self._at_the_tail:
            return []
        idle = [worker for worker in self.workers.values() if not worker.units]
        standby = len(self._single()) if self._seconds else 0  # for what may turn out to be late
        for worker in idle[standby:]:
            del self.workers[worker.number]
        return idle[standby:]

    # What happened

    def stood_still(self, now: float) -> None:
        """The driver itself did not run for a while: what the workers did meanwhile it cannot know."""
        for worker in self.workers.values():
            worker.moved = now

    def placed(self, worker: WorkerState, host: str, now: float) -> None:
        """The worker runs on a host, and loads its model."""
        worker.stage, worker.host, worker.moved = "loading", host, now

    def ready(self, worker: WorkerState, now: float) -> None:
        """The worker's model is loaded, and it sees the store."""
        worker.stage, worker.moved = "ready", now

    def routed(self, worker: WorkerState, tokens: int, now: float) -> None:
        """The worker has routed so many tokens in all."""
        if tokens != worker.tokens:
            worker.tokens, worker.moved = tokens, now

    def finish(self, worker: WorkerState, unit: Unit, now: float) -> bool:
        """The unit's commit stands; whether that is news, and not that of a copy that was slower."""
        worker.errors = 0
        if unit not in worker.units:
            return False
        if unit == worker.units[0]:
            self._seconds.append(now - self._begun[worker.number, unit])
        self._take(worker, unit, now)
        self._settle(unit)
        return True

    def fail(self, worker: WorkerState, unit: Unit, reason: str, now: float) -> None:
        """The unit raised an error that is its own; the worker goes on."""
        if unit not in worker.units:  # a copy of what is committed
            return
        self._take(worker, unit, now)
        worker.errors += 1
        self._strike(worker, unit, reason)

    def refused(self, worker: WorkerState, reason: str, now: float) -> None:
        """The worker does not see the store, or has other packages or another GPU: so would the next one there."""
        self._refused.append(now)
        self.broke(worker, reason, now)

    def broke(self, worker: WorkerState, reason: str, now: float) -> None:
        """The worker cannot go on, through no fault of its units: it did not start, or its storage fails."""
        if len(self.failures) <= worker.after:  # else others that were started with it broke too: that is one time
            self.failures.append(reason)
        self._resume_at = now + PAUSES_S[min(len(self.failures), len(PAUSES_S)) - 1]
        self._forget(worker)

    def lost(self, worker: WorkerState) -> None:
        """The worker is gone with its node, or was out of reach: its units are done again, and nobody is blamed.

        A unit that this happens to `LOSSES` times is done alone, and each time more is a strike.
        """
        self._losses.update(worker.units)
        if worker.alone and self._losses[worker.units[0]] > LOSSES:
            self._blame(worker, f"its node was lost while it ran alone, as {LOSSES} or more were before")
        else:
            self._forget(worker)

    def died(self, worker: WorkerState, reason: str, now: float) -> None:
        """The worker's process ended or hung on a node that lives: whatever it had in flight may have done it."""
        if worker.errors >= ERRORS_IN_A_ROW:  # it is sick, and not what it has in flight
            self._forget(worker)
        elif worker.units:
            self._blame(worker, reason)
        else:
            self.broke(worker, reason, now)

    def _forget(self, worker: WorkerState) -> None:
        """The worker is no more, and what it had in flight is done again."""
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
        """The worker is no more, and what it had in flight may be why."""
        del self.workers[worker.number]
        self.lost_workers += 1
        for unit in worker.units:
            self._strike(worker, unit, reason)

    def _fit(self, unit: Unit, ready: list[WorkerState]) -> list[WorkerState]:
        """Those that a suspect may run on: not the worker that it last failed on, unless that is the only one."""
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
        """Whether another worker has it in flight still."""
        return any(unit in worker.units for worker in self.workers.values())

    def _settle(self, unit: Unit) -> None:
        for worker in self.workers.values():
            if unit in worker.units:  # a copy, which loses
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
