"""The rules for assigning shards to workers: each rule alone, then all of them in worlds where everything fails."""

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from more import MORE

from jobs.capturing.dispatch import LOSSES, Dispatcher, Unit, WorkerState

UNITS = [Unit("prose", shard) for shard in range(40)]
STALL_S, LOAD_STALL_S = 30.0, 100.0
WAYS_TO_GO: dict[str, Callable[[Dispatcher, WorkerState], None]] = {
    "dies": lambda job, worker: job.died(worker, "out of memory", 1),
    "is lost with its node": lambda job, worker: job.lost(worker),
    "loses its storage": lambda job, worker: job.broke(worker, "OSError", 1),
}


class Job(Dispatcher):
    """A dispatcher whose commits and quarantine are in memory."""

    def __init__(self, units: int = 0, workers: int = 1, *, all_added: bool = True) -> None:
        self.commits: set[Unit] = set()
        self.given_up: dict[Unit, list[str]] = {}
        super().__init__(
            lambda left: workers, self.commits.__contains__, self.quarantine, stall_s=STALL_S, load_stall_s=LOAD_STALL_S
        )
        self.add(UNITS[:units])
        self.all_added = all_added

    def quarantine(self, unit: Unit, errors: list[str]) -> None:
        assert unit not in self.given_up
        self.given_up[unit] = errors

    def up(self, now: float = 0) -> list[WorkerState]:
        """Start the needed workers, and let them get ready."""
        new = self.start(now)
        for worker in new:
            self.placed(worker, "host", now)
            self.ready(worker, now)
        return new

    def give(self, now: float = 0) -> list[tuple[int, int]]:
        """Workers and shards of the current assignments."""
        return [(worker.number, unit.shard) for worker, unit in self.assign(now)]

    def finish_one(self, worker: WorkerState) -> None:
        self.finish(worker, worker.units[0], 1)


def at_work(units: int, workers: int) -> tuple[Job, list[WorkerState]]:
    """A job whose workers have their first units."""
    job = Job(units, workers)
    started = job.up()
    job.assign(0)
    return job, started


def test_a_worker_gets_nothing_before_it_is_ready() -> None:
    job = Job(4, 1)
    (worker,) = job.start(0)
    assert job.give() == []
    job.placed(worker, "host", 1)
    assert (worker.stage, worker.host, job.give()) == ("loading", "host", [])
    job.ready(worker, 2)
    assert job.give() == [(1, 0), (1, 1)]


def test_every_worker_has_one_unit_before_any_has_two_and_none_has_three() -> None:
    job = Job(7, 2)
    one, _ = job.up()
    assert job.give() == [(1, 0), (2, 1), (1, 2), (2, 3)]
    assert job.give() == []
    job.finish_one(one)
    assert job.give() == [(1, 4)]


@pytest.mark.parametrize("way", WAYS_TO_GO)
def test_a_unit_whose_commit_stands_is_not_given_again_when_its_worker(way: str) -> None:
    job, (worker,) = at_work(2, 1)
    job.commits.add(UNITS[0])
    WAYS_TO_GO[way](job, worker)
    job.up(1)
    assert job.give() == [(max(job.workers), 1)]
    assert (job.done, job.retries) == ({UNITS[0]}, 1)


def test_an_error_of_a_unit_whose_commit_stands_is_of_no_interest() -> None:
    job, (worker,) = at_work(1, 1)
    job.commits.add(UNITS[0])
    job.fail(worker, UNITS[0], "RoutingError", 1)
    assert (job.finished, job.done, job.retries) == (True, {UNITS[0]}, 0)


def test_a_suspect_runs_alone_and_not_where_it_failed() -> None:
    job, (one, two) = at_work(9, 2)  # 0 and 2 on the first worker, 1 and 3 on the second
    job.fail(one, UNITS[0], "RoutingError", 1)
    job.finish_one(one)
    assert job.give() == [(1, 4), (1, 5)], "the first worker is idle, but it is the one that failed"
    job.finish_one(two)
    assert job.give() == [], "the second worker is drained"
    job.finish_one(two)
    assert job.give() == [(2, 0)]
    assert job.give() == [], "nobody beside the suspect"
    job.fail(two, UNITS[0], "RoutingError", 1)
    assert job.give() == [(2, 6), (2, 7)], "nor has it to be where it failed the last time"
    for _ in range(2):
        job.finish_one(one)
    assert job.give() == [(1, 0)]


def test_the_only_worker_is_drained_for_a_suspect_which_then_runs_alone_on_it() -> None:
    job, (worker,) = at_work(4, 1)
    job.fail(worker, UNITS[0], "RoutingError", 1)
    assert job.give() == []
    job.finish_one(worker)
    assert job.give() == [(1, 0)]
    assert job.give() == []
    job.finish_one(worker)
    assert job.give() == [(1, 2), (1, 3)]


def test_for_every_suspect_that_is_next_one_worker_is_drained() -> None:
    job, (one, two, three) = at_work(20, 3)
    job.died(one, "killed", 1)  # with 0 and 3 in flight
    job.finish_one(three)
    assert job.give() == [], "the one with the least to do waits for the suspects"
    job.finish_one(two)
    assert job.give() == [(3, 6)], "and no other"
    job.finish_one(two)
    assert job.give() == [(2, 0)]
    job.finish_one(three)
    assert job.give() == [], "while the first suspect runs, the second one waits"
    job.finish_one(three)
    assert job.give() == [(3, 3)]


def test_three_strikes_put_a_unit_into_quarantine_and_who_died_beside_it_is_cleared() -> None:
    job, _ = at_work(3, 1)
    reasons = iter(["killed", "out of memory", "killed again"])
    while not job.finished:
        (worker,) = job.workers.values()
        if UNITS[0] in worker.units:
            job.died(worker, next(reasons), 1)
        else:
            job.finish_one(worker)
        job.up(1)
        job.assign(1)
    assert job.given_up == {UNITS[0]: ["killed", "out of memory", "killed again"]}
    assert (job.done, job.quarantined, job.should_abort) == ({*UNITS[1:3]}, [UNITS[0]], False)
    assert (job.retries, job.lost_workers) == (3, 3)


@pytest.mark.parametrize(("way", "times"), [("is lost with its node", LOSSES - 1), ("loses its storage", 20)])
def test_nobody_is_blamed_however_often_a_worker(way: str, times: int) -> None:
    job, (worker,) = at_work(3, 1)
    for time in range(times):
        WAYS_TO_GO[way](job, worker)
        assert job.workers == {}
        if way == "loses its storage":
            job.failures.clear()  # like a shard that is finished elsewhere
        (worker,) = job.up(1)
        assert job.give() == [(time + 2, 0), (time + 2, 1)], "side by side, in their order"
    assert (job.given_up, job.lost_workers, job.retries) == ({}, times, 2 * times)


def test_a_shard_that_always_takes_its_node_with_it_is_done_alone_in_the_end_and_given_up() -> None:
    job, (worker,) = at_work(4, 1)

    def after_the_node_is_lost() -> list[int]:
        nonlocal worker
        job.lost(worker)
        (worker,) = job.up(1)
        return [shard for _, shard in job.give()]

    assert [after_the_node_is_lost() for _ in range(LOSSES - 1)] == [[0, 1]] * (LOSSES - 1)
    assert after_the_node_is_lost() == [0]
    assert after_the_node_is_lost() == [1], "which was always beside it, and is well"
    job.finish_one(worker)
    assert job.give() == [(worker.number, 0)]
    assert after_the_node_is_lost() == [0]
    assert after_the_node_is_lost() == [2, 3]
    [errors] = job.given_up.values()
    assert [error.partition(",")[0] for error in errors] == ["its node was lost while it ran alone"] * 3
    assert (job.quarantined, job.done) == ([UNITS[0]], {UNITS[1]})


def test_a_suspect_that_is_lost_with_its_node_is_next_again_and_alone() -> None:
    job, (worker,) = at_work(3, 1)
    job.died(worker, "killed", 1)
    for _ in range(5):
        (worker,) = job.up(1)
        assert job.give() == [(worker.number, 0)]
        job.lost(worker)


def test_a_broken_worker_is_replaced_at_once_then_after_a_pause_then_only_when_another_finished_a_shard() -> None:
    job = Job(9, 2)
    broken, other = job.start(0)
    job.broke(broken, "no GPU", 0)
    (broken,) = job.start(0)
    job.broke(broken, "no GPU", 0)
    assert not job.start(14.9)
    (broken,) = job.start(15)
    job.broke(broken, "no GPU", 15)
    assert not job.start(1e9)
    assert not job.should_abort, "one worker is left, and may get ready"
    job.placed(other, "host", 20)
    job.ready(other, 20)
    ((_, unit), _) = job.assign(20)
    job.finish(other, unit, 21)
    assert len(job.start(21)) == 1


def test_a_place_where_a_worker_was_refused_is_asked_for_again_only_after_ten_minutes() -> None:
    job = Job(40, 3)
    wrong, *others = job.start(0)
    for worker in others:
        job.placed(worker, "host", 0)
        job.ready(worker, 0)
    job.assign(0)
    job.refused(wrong, "Misplaced", 8)
    for second in range(9, 608):
        job.finish_one(others[0])
        job.add([Unit("more", second)])
        job.assign(second)
        assert job.start(second) == []
    assert len(job.start(608)) == 1


def test_one_worker_is_wanted_however_many_were_refused() -> None:
    job = Job(40, 3)
    for worker in job.start(0):
        job.refused(worker, "Misplaced", 0)
    assert len(job.start(0)) == 1


def test_time_in_which_the_driver_stood_still_makes_no_worker_hung() -> None:
    job, (worker,) = at_work(4, 1)
    assert job.stalled(1 + STALL_S) != []
    job.stood_still(1 + STALL_S)
    assert job.stalled(1 + STALL_S) == []
    assert job.stalled(2 + 2 * STALL_S) == [(worker, "it routed no token for 30 s")]


def test_a_third_worker_in_a_row_that_breaks_ends_the_job_once_none_is_left() -> None:
    job = Job(9, 2)
    broken, other = job.start(0)
    for breaks in (job.broke, job.died):
        breaks(broken, "no GPU", 0)
        (broken,) = job.start(1000)
    job.broke(broken, "no GPU", 1000)
    assert not job.should_abort
    job.broke(other, "no driver", 0)
    assert job.should_abort
    assert job.start(1e9) == []
    assert str(job.abort_reason) == "3 consecutive workers failed, the last one: no GPU"


def test_workers_that_break_together_break_once() -> None:
    job = Job(40, 8)
    for time in range(3):
        assert not job.should_abort
        for worker in job.start(time * 1000):
            job.broke(worker, "the store is out of reach", time * 1000)
    assert job.should_abort
    assert job.lost_workers == 24


def test_a_finished_shard_and_not_a_ready_worker_ends_the_pause_and_the_count() -> None:
    job = Job(9, 2)
    broken, works = job.up()
    job.assign(0)
    for _ in range(2):
        job.broke(broken, "the store is full", 1000)
        (broken,) = job.up(1015)
    job.broke(broken, "the store is full", 1015)
    assert (len(job.failures), job.start(1016)) == (3, [])
    job.finish_one(works)
    assert (len(job.failures), len(job.start(1016))) == (0, 1)


def test_a_worker_that_routes_no_token_is_hung_and_so_is_one_that_never_loads() -> None:
    job = Job(4, 2)
    loads, captures = job.start(0)
    for worker in (loads, captures):
        job.placed(worker, "host", 500)
    assert job.stalled(500 + LOAD_STALL_S) == []
    job.ready(captures, 501)
    assert job.stalled(501 + LOAD_STALL_S) == [(loads, "its model was not loaded within 100 s")]
    job.ready(loads, 602)
    job.assign(1000)
    job.routed(loads, 7, 1020)
    job.routed(captures, 0, 1020)
    assert job.stalled(1000 + STALL_S) == []
    assert job.stalled(1001 + STALL_S) == [(captures, "it routed no token for 30 s")]
    job.finish(captures, captures.units[0], 1025)
    assert job.stalled(1020 + STALL_S) == []
    job.routed(loads, 7, 1050)
    assert job.stalled(1021 + STALL_S) == [(loads, "it routed no token for 30 s")], "the same count is no token"


def test_a_worker_without_a_place_or_a_unit_is_not_hung_and_a_second_unit_gives_no_more_time() -> None:
    job = Job(0, 2, all_added=False)
    _, worker = job.start(0)
    job.placed(worker, "host", 0)
    job.ready(worker, 0)
    assert job.stalled(1000) == []
    job.add(UNITS[:1])
    job.assign(1000)
    job.add(UNITS[1:2])
    job.assign(1020)
    assert len(worker.units) == 2
    assert job.stalled(1031) == [(worker, "it routed no token for 30 s")]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_sick_worker_is_replaced_before_anything_is_given_up_for_it(workers: int) -> None:
    job, _ = at_work(12, workers)
    sick = job.workers[1]
    for _ in range(4):
        assert job.stalled(1) == []
        job.fail(sick, sick.units[0], "RoutingError", 1)
        job.assign(1)
    assert job.stalled(1) == [(sick, "4 consecutive shards failed on it")]
    assert [hung.number for hung, _ in job.stalled(1e6)].count(1) == 1, "that it hangs too is not told"
    job.died(sick, "sick", 1)
    assert job.failures == [], "it was not broken"
    while not job.finished:
        job.up(1)
        job.assign(1)
        job.finish_one(next(worker for worker in job.workers.values() if worker.units))
    assert (job.given_up, job.done) == ({}, set(UNITS[:12]))


def test_errors_with_a_finished_shard_between_them_make_no_worker_sick() -> None:
    job, (worker,) = at_work(12, 1)
    for _ in range(5):
        job.fail(worker, worker.units[0], "RoutingError", 1)
        while not job.assign(1):
            job.finish_one(worker)
        job.finish_one(worker)  # the suspect
        job.assign(1)
        assert job.stalled(1) == []


@pytest.mark.parametrize("finished_after", [None, 7])
def test_eight_shards_given_up_with_none_finished_between_them_end_the_job(finished_after: int | None) -> None:
    job, (worker,) = at_work(40, 1)
    while len(job.quarantined) < 8:
        assert not job.should_abort
        if len(job.quarantined) == finished_after and not job.done:
            job.finish_one(worker)
        else:
            job.fail(worker, worker.units[0], f"error {len(job.quarantined)}", 1)
        job.assign(1)
    assert job.should_abort is (finished_after is None)
    if job.should_abort:
        assert isinstance(job.abort_reason, ValueError), "someone must put something right first"
        assert str(job.abort_reason).startswith("8 consecutive shards failed 3 times each")
        said = "the last error: error 7. Fix it and run this again with --retry_quarantined"
        assert said in str(job.abort_reason)


def test_idle_workers_are_let_go_once_everything_is_planned_and_nothing_waits() -> None:
    job = Job(2, 4, all_added=False)
    job.up()
    assert job.surplus() == [], "the queue waits"
    assert job.give() == [(1, 0), (2, 1)]
    assert job.surplus() == [], "more may be planned"
    job.all_added = True
    assert [worker.number for worker in job.surplus()] == [3, 4]
    assert [*job.workers] == [1, 2]
    job.fail(job.workers[1], UNITS[0], "RoutingError", 1)
    assert job.surplus() == [], "the suspect waits"
    assert job.lost_workers == 0, "who is let go is not lost"


def test_no_more_workers_are_wanted_than_units_wait_or_are_in_work() -> None:
    job = Job(3, 8)
    assert len(job.start(0)) == 3
    job, (one, _) = at_work(4, 2)
    for _ in range(2):
        job.finish_one(one)
    assert (job.outstanding, job.start(1)) == (2, []), "both are in work on the second worker"


def test_one_worker_loads_while_the_first_shard_is_planned() -> None:
    job = Dispatcher(lambda units: min(units, 4), lambda unit: False, lambda unit, errors: None)
    assert len(job.start(0)) == 1
    assert not job.finished
    job.add(UNITS[:3])
    assert len(job.start(1)) == 2


def test_a_unit_that_fails_after_the_others_were_let_go_gets_a_new_worker() -> None:
    job, (one, two, three) = at_work(3, 3)
    job.finish_one(one)
    job.finish_one(two)
    assert job.surplus() == [two], "one idle worker is kept for the shard in flight, should it be late"
    job.lost(one)
    job.died(three, "killed", 1)
    assert [worker.number for worker in job.up(1)] == [4]
    assert job.give() == [(4, 2)]


def test_at_the_tail_what_waits_behind_another_shard_is_given_to_an_idle_worker_and_the_first_commit_wins() -> None:
    job, (one, two) = at_work(4, 2)  # 0 and 2 on the first worker, 1 and 3 on the second
    for _ in range(2):
        job.finish_one(one)
    assert job.give() == [(1, 3)], "the second worker is still at shard 1"
    assert (job.copied, job.outstanding, job.give()) == ({UNITS[3]}, 2, [])
    assert job.finish(one, UNITS[3], 2)
    assert two.units == [UNITS[1]], "it has one thing less to do"
    assert not job.finish(two, UNITS[3], 3), "it had begun, and its commit came to nothing"
    job.fail(two, UNITS[3], "RoutingError", 3)
    assert (job.retries, job.given_up, job.lost_workers) == (0, {}, 0)
    job.finish_one(two)
    assert job.finished
    assert job.done == set(UNITS[:4])


def test_a_shard_that_takes_twice_as_long_as_shards_do_is_given_to_an_idle_worker() -> None:
    job = Job(5, 3)
    one, two, slow = job.up()
    job.assign(0)  # the third worker has only shard 2
    for now in (10, 20):
        for worker in (one, two):
            job.finish(worker, worker.units[0], now)
    assert job.give(20) == []
    assert job.surplus() == [two], "one is kept, for what is in flight"
    assert job.give(20.1) == [(1, 2)], "shards take 10 s"
    assert (job.surplus(), job.copied) == ([], {UNITS[2]})
    job.finish(slow, UNITS[2], 41)
    assert (job.finished, one.units) == (True, [])


def test_of_two_copies_one_that_is_lost_is_no_loss_and_both_that_fail_are_two_strikes() -> None:
    for end in ("lost", "died"):
        job, (one, two) = at_work(4, 2)
        for _ in range(2):
            job.finish_one(one)
        assert job.give() == [(1, 3)]
        job.lost(one) if end == "lost" else job.died(one, "killed", 2)
        assert (job.outstanding, job.retries) == (2, 0), "the other worker has it still"
        job.fail(two, UNITS[3], "RoutingError", 3)
        assert (job.outstanding, job.retries) == (2, 1)
        job.finish_one(two)
        for strike in range(2 if end == "lost" else 1):
            assert not job.given_up
            job.up(4)
            [(number, shard)] = job.give(4)
            assert shard == 3
            job.fail(job.workers[number], UNITS[3], f"again {strike}", 5)
        assert len(job.given_up[UNITS[3]]) == 3


def test_what_has_failed_before_is_never_given_to_two() -> None:
    job, (one, two) = at_work(2, 2)
    job.fail(one, UNITS[0], "RoutingError", 1)
    job.finish(two, UNITS[1], 10)
    assert job.give(10) == [(2, 0)]
    assert job.give(1000) == []


class World:
    """A cluster that fails at random, with its own record of all events.

    It follows the definition of a healthy cluster: a healthy unit gets at most one random strike of its own (another
    may come from the death of another unit's worker), a worker that is started after two failed ones does not fail, and
    fewer than eight units are poison. So no healthy unit may be given up, and the job may not be aborted.
    """

    def __init__(self, seed: int, units: int, workers: int, poison: dict[Unit, str], faults: int) -> None:
        self.chance, self.units, self.workers, self.poison, self.faults = Random(seed), units, workers, poison, faults
        self.job = Job(0, workers, all_added=False)
        self.now = 0.0
        self.planned = self.started = self.gone = 0
        self.given: Counter[Unit] = Counter()
        self.in_vain: Counter[Unit] = Counter()
        self.strikes: Counter[Unit] = Counter()
        self.losses: Counter[Unit] = Counter()
        self.unlucky: set[Unit] = set()
        self.hung: set[int] = set()
        self.late: list[Unit] = []  # on workers that were considered lost but are alive

    def turn(self) -> None:
        """One pass through the loop of `jobs.cluster.ray_workers`; then something happens to the workers."""
        planned = min(self.units, self.planned + self.chance.randrange(10))
        self.job.add(UNITS[self.planned : planned])
        self.planned, self.job.all_added = planned, planned == self.units
        self.started += len(self.job.start(self.now))
        copied = set(self.job.copied)
        for _, unit in self.job.assign(self.now):
            self.given[unit] += unit in copied or unit not in self.job.copied  # a copy is listed apart
        self.job.surplus()
        for worker, reason in self.job.stalled(self.now):
            self.leave(worker, blame="failed on it" not in reason)
            self.job.died(worker, reason, self.now)
        self.check()
        for worker in [*self.job.workers.values()]:
            if worker.number not in self.hung and self.chance.random() < 0.7:
                self.happen(worker)
        if self.late and self.chance.random() < 0.3:
            self.job.commits.add(self.late.pop())
        self.now += 1 if self.job.workers else 300

    def happen(self, worker: WorkerState) -> None:
        if self.faults and self.chance.random() < 0.2:
            self.faults -= 1
            self.fault(worker, self.chance.choice(["node", "storage", "process", "error", "hang", "silence"]))
        elif worker.stage == "waiting":
            self.job.placed(worker, "host", self.now)
        elif worker.stage == "loading":
            self.job.ready(worker, self.now)
        elif worker.units:
            self.job.routed(worker, worker.tokens + 1, self.now)
            self.end(worker, self.chance.choice(worker.units))

    def end(self, worker: WorkerState, unit: Unit) -> None:
        match self.poison.get(unit):
            case "kills":
                self.leave(worker, blame=True)
                self.job.died(worker, "killed", self.now)
            case "raises":
                self.fail(worker, unit)
            case "hangs":
                self.hung.add(worker.number)
            case "takes its node":
                self.lose_node(worker)
            case _:
                self.job.commits.add(unit)
                self.job.finish(worker, unit, self.now)

    def fault(self, worker: WorkerState, kind: str) -> None:
        healthy = [unit for unit in worker.units if unit not in self.poison]
        may_break, may_strike = worker.after < 2, not self.unlucky.intersection(healthy)
        may_end = may_strike if worker.units else may_break
        if kind == "node":
            self.late += healthy[: self.chance.randrange(3)]
            self.lose_node(worker)
        elif kind == "storage" and may_break:
            self.leave(worker)
            self.job.broke(worker, "OSError", self.now)
        elif kind == "process" and may_end:
            self.unlucky.update(healthy)
            self.leave(worker, blame=True)
            self.job.died(worker, "killed", self.now)
        elif kind == "hang" and may_end and (worker.units or worker.stage == "loading"):
            self.unlucky.update(healthy)
            self.hung.add(worker.number)
        elif kind == "error" and may_strike and healthy:
            self.unlucky.add(healthy[-1])
            self.fail(worker, healthy[-1])
        elif kind == "silence":  # the answer is late or never arrives
            self.job.commits.update(healthy[:1])

    def lose_node(self, worker: WorkerState) -> None:
        self.losses.update(worker.units)
        self.leave(worker, blame=worker.alone and self.losses[worker.units[0]] > LOSSES)
        self.job.lost(worker)

    def fail(self, worker: WorkerState, unit: Unit) -> None:
        self.account([unit], blame=True)
        self.job.fail(worker, unit, "RoutingError", self.now)

    def leave(self, worker: WorkerState, *, blame: bool = False) -> None:
        self.gone += 1
        self.account(worker.units, blame=blame)

    def account(self, units: list[Unit], *, blame: bool) -> None:
        held = Counter(unit for worker in self.job.workers.values() for unit in worker.units)
        for unit in set(units) - self.job.commits:
            self.in_vain[unit] += held[unit] == 1
            self.strikes[unit] += blame

    def check(self) -> None:
        """The laws that hold at any time."""
        job = self.job
        in_flight = Counter(unit for worker in job.workers.values() for unit in worker.units)
        twice = {unit for unit, times in in_flight.items() if times > 1}
        assert twice <= job.copied
        assert set(in_flight.values()) <= {1, 2}
        assert not job.done.intersection(in_flight)
        assert job.done <= job.commits
        assert len(job.workers) <= self.workers
        for worker in job.workers.values():
            assert not worker.units or worker.stage == "ready"
            struck = any(self.strikes[unit] for unit in worker.units if unit not in twice | job.copied)
            assert len(worker.units) <= (1 if struck else 2)
        for unit, times in self.given.items():
            assert times <= 1 + self.in_vain[unit], f"{unit} was given again for no reason"
        assert self.started <= self.workers + self.gone + job.retries, "workers start for nothing"
        assert (job.lost_workers, job.retries) == (self.gone, self.in_vain.total() - len(job.quarantined))
        assert job.outstanding == self.planned - len(job.done) - len(job.quarantined)
        assert not job.should_abort


@settings(max_examples=100 * MORE)
@given(
    seed=st.integers(0, 2**32),
    units=st.integers(1, 40),
    workers=st.integers(1, 6),
    poison=st.dictionaries(
        st.sampled_from(UNITS), st.sampled_from(["kills", "raises", "hangs", "takes its node"]), max_size=7
    ),
    faults=st.integers(0, 30),
)
def test_whatever_breaks_all_that_is_healthy_is_done_and_nothing_else_given_up(
    seed: int, units: int, workers: int, poison: dict[Unit, str], faults: int
) -> None:
    world = World(seed, units, workers, poison, faults)
    for _ in range(2000):
        if world.job.finished:
            break
        world.turn()
    ill = poison.keys() & set(UNITS[:units])
    assert world.job.finished
    assert world.job.done == set(UNITS[:units]) - ill
    assert world.job.given_up.keys() == ill == set(world.job.quarantined)
    assert all(len(world.job.given_up[unit]) == world.strikes[unit] == 3 for unit in ill)
