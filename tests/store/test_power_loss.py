"""Power fails at any point: no commit names missing data, and a capture that was reported as complete is complete."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_model import store_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from law import Files, Law
from more import MORE
from power import Choose, Disk
from simulated import STORE, Killed, Process, capture, simulation, undisturbed

from store import objects
from store.objects import LocalObjects

CALLS = 520
"""About as many as an undisturbed run makes."""


class Machine:
    """A machine with a disk and a store on it; processes are killed, and its power fails."""

    def __init__(self, folder: Path, clean: Files) -> None:
        folder.mkdir(parents=True)
        self.disk, self.store = Disk(folder), folder / STORE
        self.law = Law(lambda: store_files(self.store) if self.store.exists() else {}, clean)

    def run(self, dies_at: int | None = None) -> bool:
        """Capture or resume; returns whether it finished before it was killed at that call."""
        self.disk.begin(dies_at)
        with simulation(lambda scratch: LocalObjects(self.store, scratch)), self.disk.watched():
            error = Process().run(capture)
        assert error is None or isinstance(error, Killed), error
        return error is None

    def lose_power(self, choose: Choose = lambda states: states[0]) -> None:
        """The remaining store is consistent: each commit has its data, and the plan has everything that it counts."""
        self.disk.fail(choose)
        with simulation(lambda scratch: LocalObjects(self.store, scratch)):
            self.law.holds()
            if (state := self.law.state()) is not None:
                assert state.wrong == {}

    def ends_clean(self) -> None:
        """The remaining store is the clean run's."""
        self.law.equals(self.law.snapshot())


@pytest.fixture(scope="module")
def clean() -> Files:
    """The store of an undisturbed run."""
    files, _ = undisturbed()
    return files


@pytest.fixture
def machines(tmp_path: Path, clean: Files) -> Iterator[Callable[[], Machine]]:
    """New machines, each with an empty disk."""
    numbers = iter(range(10**6))
    return lambda: Machine(tmp_path / str(next(numbers)), clean)


def test_what_a_whole_run_wrote_is_there_after_the_power_failed(machines: Callable[[], Machine]) -> None:
    machine = machines()
    assert machine.run()
    assert 0.9 * CALLS < len(machine.disk.calls) < 1.1 * CALLS
    machine.lose_power()
    machine.ends_clean()


def killed_then_resumed(machine: Machine, dies_at: int) -> None:
    """Killed, resumed to the end, and then all unsynced data are lost: nothing of the store is."""
    assert not machine.run(dies_at)
    assert machine.run()
    machine.lose_power()
    machine.ends_clean()


@pytest.mark.parametrize("offset", range(3))
def test_what_a_killed_process_did_not_sync_the_next_one_does(machines: Callable[[], Machine], offset: int) -> None:
    for dies_at in range(offset, 490, 45):
        killed_then_resumed(machines(), dies_at)


KILLED_AFTER = (
    "mkdir fake/weight/c",  # all weights were lost, but all commits remained
    "mkdir fake/expert/c/3/0/0",
    "link fake/expert/c/0/0/0/0",  # the next process found it there, and did not sync its name
    "replace fake/length/zarr.json",
    "link fake/expert/commits/4.json",  # nothing was left to do
    "mkdir fake/expert/commits",
    "replace fake/token/plan.json",
    "link fake/zarr.json",
)


def killed_after(call: str, machines: Callable[[], Machine]) -> None:
    """Killed after a call, the last one of its kind, and resumed; then the power fails."""
    undisturbed = machines()
    undisturbed.run()
    what, key = call.split()
    [*_, last] = [n for n, call in enumerate(undisturbed.disk.calls) if call == f"{what} {STORE}/{key}"]
    killed_then_resumed(machines(), last + 1)


@pytest.mark.parametrize("call", KILLED_AFTER)
def test_a_process_killed_between_a_name_and_its_sync_loses_nothing_to_a_later_loss_of_power(
    machines: Callable[[], Machine], call: str
) -> None:
    killed_after(call, machines)


LIVES = st.lists(st.tuples(st.integers(0, CALLS) | st.integers(0, 60), st.booleans()), min_size=1, max_size=4)
"""For each process, the call at which it is killed, and whether by a power failure."""


def survive(machine: Machine, lives: Sequence[tuple[int, bool]], choose: Choose) -> None:
    """Processes are killed one after the other, some by a power failure; the last one finishes."""
    for dies_at, by_power in lives:
        machine.run(dies_at)
        if by_power:
            machine.lose_power(choose)
    assert machine.run()
    machine.lose_power()
    machine.ends_clean()


@settings(max_examples=30 * MORE, derandomize=MORE == 1, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lives=LIVES, data=st.data())
def test_whatever_is_lost_at_any_point_no_commit_stands_without_its_data_and_resuming_ends_clean(
    machines: Callable[[], Machine], lives: list[tuple[int, bool]], data: st.DataObject
) -> None:
    survive(machines(), lives, lambda states: states[data.draw(st.integers(0, len(states) - 1))])


def _without_a_sync_of_files(self: LocalObjects, data: bytes) -> Path:
    partial: Path = self._parent_made(f"{self.scratch}/{random.random()}")
    partial.write_bytes(data)
    return partial


def _put_new_without_a_look_at_names(self: LocalObjects, key: str, data: bytes) -> bool:
    if (self.root / key).exists():
        return False
    self.put(key, data)
    return True


FAULTS: list[tuple[Any, str, Any]] = [
    (objects, "_sync_folder", lambda folder: None),
    (LocalObjects, "_write_partial", _without_a_sync_of_files),
    (LocalObjects, "put_new", _put_new_without_a_look_at_names),
    (LocalObjects, "_is_ours", lambda self, folder: False),
    (LocalObjects, "settle", lambda self, prefix: None),
]


@pytest.mark.parametrize(("owner", "name", "fault"), FAULTS, ids=[name for _, name, _ in FAULTS])
def test_a_sync_that_is_left_out_is_found(
    machines: Callable[[], Machine], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, fault: Any
) -> None:
    monkeypatch.setattr(owner, name, fault)

    def all_of_them() -> None:
        for call in KILLED_AFTER:
            killed_after(call, machines)

    with pytest.raises((AssertionError, KeyError, ValueError)):
        all_of_them()
