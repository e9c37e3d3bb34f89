"""What a cluster's capture says of itself: the lines of a log, and the picture in a terminal; without a cluster."""

from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from jobs.capturing import progress
from jobs.capturing.dispatch import Dispatcher, Unit
from jobs.capturing.progress import Progress


class Clock:
    """Stands in for `time.monotonic`."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Reported:
    """A capture of ten shards of 100 tokens, of which two were committed before, on two workers."""

    def __init__(self) -> None:
        plan = SimpleNamespace(tokens=1000)
        before = SimpleNamespace(tokens_done=200, shards_done=2)
        capture: Any = SimpleNamespace(before=before, planned_shards=10, planner=SimpleNamespace(plan=plan))
        self.job = Dispatcher(lambda units: 2, lambda unit: False, lambda unit, errors: None)
        self.shown = Progress([capture])
        self.job.add(Unit("prose", shard) for shard in range(2, 10))
        self.one, self.two = self.job.start(0)

    def up(self) -> None:
        for worker in (self.one, self.two):
            self.job.placed(worker, f"host-{worker.number}[bold]", 0)
            self.job.ready(worker, 0)
        self.job.assign(0)
        self.shown.show(self.job)

    def finish(self) -> None:
        unit = self.one.units[0]
        self.job.finish(self.one, unit, 0)
        self.shown.finished(self.one, unit, {"tokens": 100})


def test_while_the_text_is_planned_nobody_says_how_long_it_takes(clock: Clock) -> None:
    reported = Reported()
    reported.job.placed(reported.one, "host", 0)
    assert reported.shown.line(reported.job) == (
        "2 of 10 shards; 200 of 1,000 tokens planned so far; 0 tokens/s; workers: 1 loading, 1 waiting for a place"
    )


def test_the_rate_counts_this_job_s_tokens_since_the_first_worker_was_ready_and_those_in_work(clock: Clock) -> None:
    reported = Reported()
    clock.now += 500
    reported.up()
    reported.job.all_added = True
    clock.now += 10
    reported.job.routed(reported.one, 130, 0)
    reported.job.routed(reported.two, 70, 0)
    reported.finish()
    assert reported.shown.line(reported.job) == (
        "3 of 10 shards; 400 of 1,000 tokens; 20 tokens/s; 30 s left; workers: 2 capturing"
    )


def test_what_went_wrong_is_in_the_line(clock: Clock) -> None:
    reported = Reported()
    reported.up()
    reported.job.fail(reported.two, reported.two.units[0], "RoutingError", 0)
    reported.job.lost(reported.one)
    reported.job.quarantined.append(Unit("prose", 9))
    assert reported.shown.line(reported.job).endswith("workers: 1 capturing; 1 workers lost; 3 retries; 1 quarantined")


def test_a_log_gets_a_line_every_ten_seconds_and_a_last_one_with_the_rate(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    reported = Reported()
    with reported.shown:
        reported.up()
        for _ in range(101):
            clock.now += 0.25
            reported.shown.show(reported.job)
        reported.finish()
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == ["capture", "capture"]
    assert lines[-1] == "captured 100 tokens in 25 s, 4 tokens/s"


def test_the_picture_names_each_worker_its_host_what_it_does_and_its_shards(clock: Clock) -> None:
    reported = Reported()
    reported.up()
    reported.job.routed(reported.one, 1234, 0)
    console = Console(width=120)
    with console.capture() as drawn:
        console.print(reported.shown._picture(reported.job))
    rows = [line.rstrip().split(maxsplit=4) for line in drawn.get().splitlines()]
    assert ["1", "host-1[bold]", "capturing", "1,234", "prose shard 2, prose shard 4"] in rows
    assert ["2", "host-2[bold]", "capturing", "0", "prose shard 3, prose shard 5"] in rows


def test_the_time_left_is_never_less_than_none(clock: Clock) -> None:
    reported = Reported()
    reported.up()
    reported.job.all_added = True
    clock.now += 10
    reported.job.routed(reported.one, 5000, 0)  # tokens of shards that failed are routed, and routed again
    assert "; 0 s left; " in reported.shown.line(reported.job)
