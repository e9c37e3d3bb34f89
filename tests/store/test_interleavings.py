"""Whatever happens in any order, the store equals a clean serial run, byte for byte, or says what is missing.

`interleavings` has the state machine. `make test` runs the same short search every time. `make chaos` runs a long
search that differs each time, and prints the steps that fail. Faults that it found are kept here by name.
"""

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from bucket import Bucket
from fake_model import store_files
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from interleavings import Interleavings
from law import Files
from more import MORE
from s3_server import bucket_files, new_store, server_address  # noqa: F401
from simulated import Process, capture, undisturbed

import store.group
from store import CaptureGroup
from store.objects import LocalObjects, open_objects
from store.planned import PlannedGroup

STEPS = 165
"""Numbers of an undisturbed capture: its changes to the store and its reads."""
ACTS = 75
"""Its changes to the store."""


@pytest.fixture(scope="module")
def clean() -> Files:
    """The store of a clean serial run."""
    files, process = undisturbed()
    assert 0.9 * STEPS < process.steps < 1.1 * STEPS
    assert 0.9 * ACTS < process.acts < 1.1 * ACTS
    return files


@pytest.fixture
def in_memory(clean: Files) -> Callable[[], Interleavings]:
    """Makes machines over a bucket in memory."""

    def make() -> Interleavings:
        files: dict[str, bytes] = {}
        return Interleavings(lambda scratch: Bucket(scratch, files), lambda: dict(files), clean)

    return make


def search(make: Callable[[], Interleavings], examples: int, shrink: bool = True) -> int:
    """Run a number of examples, the same ones in every `make test`. Returns how many machines ran."""
    made = itertools.count()

    def counted() -> Interleavings:
        next(made)
        return make()

    phases = [Phase.generate] + [Phase.shrink] * shrink
    run_state_machine_as_test(
        counted,
        settings=settings(
            max_examples=examples, stateful_step_count=20, phases=phases, derandomize=MORE == 1, database=None,
            deadline=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
        ),
    )  # fmt: skip
    return next(made)


@pytest.mark.slow
def test_every_interleaving_leaves_the_clean_store_or_says_what_is_missing_in_a_bucket(
    in_memory: Callable[[], Interleavings], record_property: Callable[[str, object], None]
) -> None:
    record_property("examples", search(in_memory, 50 * MORE))


@pytest.fixture
def on_disk(clean: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Interleavings]:
    """Makes machines over folders; power failures are tested in `test_power_loss.py`."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    numbers = iter(range(10**6))

    def make() -> Interleavings:
        root = tmp_path / f"{next(numbers)}.zarr"
        snapshot = lambda: store_files(root) if root.exists() else {}
        return Interleavings(lambda scratch: LocalObjects(root, scratch), snapshot, clean)

    return make


@pytest.fixture
def on_s3(clean: Files, s3: str) -> Callable[[], Interleavings]:
    """Makes machines over a server that speaks S3's protocol."""
    numbers = iter(range(10**6))

    def make() -> Interleavings:
        url = f"{s3}{next(numbers)}"
        return Interleavings(lambda scratch: open_objects(url, scratch), lambda: bucket_files(url), clean)

    return make


@pytest.mark.slow
def test_so_it_does_on_a_disk(
    on_disk: Callable[[], Interleavings], record_property: Callable[[str, object], None]
) -> None:
    record_property("examples", search(on_disk, 10 * MORE))


@pytest.mark.slow
def test_so_it_does_on_s3(on_s3: Callable[[], Interleavings], record_property: Callable[[str, object], None]) -> None:
    record_property("examples", search(on_s3, min(2 * MORE, 20)))  # ten seconds each


# --- Faults that were found ---------------------------------------------------------------------------------------

Machine = Interleavings


def overtaken(machine: Machine, stops_at: int, acts: int | None = None) -> None:
    """A process is stopped and considered dead; another one does everything; then the first one continues."""
    machine.stand_still(stops_at=stops_at, shards=None, verifies=False)
    machine.be_taken_for_dead(0)
    machine.capture(dies_at=None, retry=False)
    machine.go_on(0, steps=None, acts=acts)
    machine.the_store_equals_the_clean_run_or_says_what_is_missing()


def overtaken_for_one_act(machine: Machine, stops_at: int) -> None:
    """As before, but it dies after one more act: a creator left arrays without rows after a complete plan."""
    overtaken(machine, stops_at, acts=1)


def answer_lost(machine: Machine, loses_at: int) -> None:
    """A put takes effect and its answer is lost: the second try finds the job's own object, and the job succeeds."""
    machine.run(Process(loses_at=loses_at), capture)
    machine.law.equals(machine.law.snapshot())


def answered_after_a_takeover(machine: Machine, loses_at: int) -> None:
    """As before, but another driver has done everything before the second try, and the first one dies after it."""
    machine.lose_the_lease_while_an_answer_is_out(loses_at, stops_at=2 * STEPS, shards=None)
    while machine.zombies:
        machine.go_on(0, steps=None, acts=0)
    machine.the_store_equals_the_clean_run_or_says_what_is_missing()


def healing_killed(machine: Machine, dies_at: int) -> None:
    """A repair dies, and so does the next one: the note of a fault remained although its commit was gone."""
    machine.capture(dies_at=None, retry=False)
    machine.damage_a_shard(shard=2, of="weight", how="a bit flipped", at=77)
    machine.verify(dies_at=None)
    machine.capture(dies_at=dies_at, retry=False)
    machine.capture(dies_at=None, retry=False)
    machine.law.equals(machine.law.snapshot())


def given_up_and_committed(machine: Machine, stops_at: int) -> None:
    """A shard is given up while a stopped process later commits it: its quarantine remained forever."""
    machine.stand_still(stops_at=stops_at, shards=None, verifies=False)
    machine.be_taken_for_dead(0)
    machine.capture_some(shards=[0], dies_at=None)
    machine.give_up(shard=4)
    machine.go_on(0, steps=None, acts=None)
    machine.capture(dies_at=None, retry=False)
    machine.capture(dies_at=None, retry=True)
    machine.law.equals(machine.law.snapshot())


def removed(machine: Machine, stops_at: int) -> None:
    """The folder is removed while a process runs, as advised for a damaged plan, and another process starts again."""
    machine.capture(dies_at=STEPS // 3, retry=False)
    machine.stand_still(stops_at=stops_at, shards=None, verifies=False)
    machine.be_taken_for_dead(0)
    machine.law.plan_hurt = True
    machine.begin_anew()
    machine.capture(dies_at=None, retry=False)
    machine.go_on(0, steps=None, acts=None)
    machine.the_store_equals_the_clean_run_or_says_what_is_missing()


def damaged_meanwhile(machine: Machine, stops_at: int) -> None:
    """A commit and another shard are damaged while a process is stopped, which then could not do them again."""
    machine.capture(dies_at=None, retry=False)
    machine.stand_still(stops_at=stops_at, shards=None, verifies=False)
    machine.damage_a_shard(shard=1, of="commit", how="a bit flipped", at=0)
    machine.damage_a_shard(shard=0, of="expert", how="cut", at=0)
    if machine.zombies:
        machine.go_on(0, steps=None, acts=None)
    machine.the_store_equals_the_clean_run_or_says_what_is_missing()


KEPT: dict[Callable[[Machine, int], None], range] = {
    overtaken: range(1, STEPS, 6),
    overtaken_for_one_act: range(2, STEPS, 6),
    answer_lost: range(0, ACTS, 6),
    answered_after_a_takeover: range(1, ACTS, 6),
    healing_killed: range(20),
    given_up_and_committed: range(110, STEPS, 9),
    removed: range(1, 90, 9),
    damaged_meanwhile: range(1, 40),
}


def ends_well(make: Callable[[], Machine], steps: Callable[[Machine, int], None], at: int) -> None:
    """Take the steps, and then those that end every example."""
    machine = make()
    try:
        steps(machine, at)
    finally:
        machine.teardown()


@pytest.mark.parametrize(("steps", "points"), KEPT.items(), ids=lambda of: getattr(of, "__name__", ""))
def test_it_holds_wherever_it_happens(
    in_memory: Callable[[], Machine], steps: Callable[[Machine, int], None], points: range
) -> None:
    for at in points:
        ends_well(in_memory, steps, at)


# --- That it can fail --------------------------------------------------------------------------------------------


def _put_whatever_stands(group: PlannedGroup, changes: Mapping[str, bytes], still: Callable[[], bool]) -> None:
    for name, data in changes.items():
        group.objects.put(f"{group.dataset}/{name}", data)


def _put_and_believe_the_answer(group: PlannedGroup, seen: bytes | None, key: str, data: bytes) -> bool:
    return group.objects.put_new(key, data) if seen is None else group.objects.put_over(key, seen, data)


FAULTS: list[tuple[Any, str, Any, Callable[[Machine, int], None] | None]] = [
    (PlannedGroup, "_change", _put_whatever_stands, overtaken_for_one_act),
    (PlannedGroup, "_change", _put_whatever_stands, answered_after_a_takeover),
    (PlannedGroup, "_put_where", _put_and_believe_the_answer, answer_lost),
    (CaptureGroup, "drop_void", lambda group: None, healing_killed),
    (CaptureGroup, "drop_void", lambda group: None, given_up_and_committed),
    (store.group, "_noted", lambda commit, note: None, healing_killed),
    (CaptureGroup, "discard", lambda group, shard, record=None: True, healing_killed),
    (store.group, "_misfit", lambda record, have: None, None),
]


@pytest.mark.parametrize(("owner", "name", "fault", "steps"), FAULTS, ids=[f"{fault[1]}" for fault in FAULTS])
def test_a_fault_of_the_store_is_found(
    in_memory: Callable[[], Machine],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    fault: Any,
    steps: Callable[[Machine, int], None] | None,
) -> None:
    monkeypatch.setattr(owner, name, fault)

    def look() -> None:
        if steps is None:
            search(in_memory, 200, shrink=False)
        else:
            test_it_holds_wherever_it_happens(in_memory, steps, KEPT[steps])

    with pytest.raises((AssertionError, RuntimeError)):
        look()
