"""`--local` when something fails: the rules of a cluster, with one worker that cannot be replaced.

`test_ray_workers.py` tests that a shard which always fails is quarantined, for this process and for a cluster.
"""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_model import FakeEngine, FakeRun, fake_layout, store_files, text_source
from faulty_model import TOKENS_A_SHARD, Script, faulty_run, numbered_texts

from jobs.capturing import local
from jobs.capturing.captures import capture_datasets, exit_status
from jobs.capturing.dispatch import Unit, WorkerState
from jobs.capturing.local import ThisProcess, capture_here
from jobs.capturing.loop import Event
from store import Coverage, coverage
from workers.shard import Routes, RoutingError


def captured(folder: Path, shards: int, *names: str) -> list[Coverage]:
    """The coverage after a capture of the faulty model."""
    run: Any = faulty_run(str(folder / "s.zarr"), folder / "script", seconds=0)
    return capture_datasets(
        run, [(name, text_source(numbered_texts(shards))) for name in names or ("fake",)], capture_here
    )


def attempts(script: Script, shard: int) -> int:
    return sum(attempt.what == str(shard) for attempt in script.attempts())


def test_a_shard_that_fails_twice_is_done_alone_the_third_time_and_nothing_else_is_done_again(tmp_path: Path) -> None:
    script = Script(tmp_path / "script")
    script.write(2, "raise", "raise")
    [state] = captured(tmp_path, 6)
    assert (state.complete, exit_status([state])) == (True, 0)
    assert [attempts(script, shard) for shard in range(6)] == [1, 1, 3, 1, 1, 1]


def test_a_shard_that_fails_in_one_data_set_keeps_no_other_one_from_being_done(tmp_path: Path) -> None:
    script = Script(tmp_path / "script")
    script.write(3, *["raise"] * 6)  # of both
    states = captured(tmp_path, 4, "one", "two")
    assert [(state.missing, list(state.quarantined)) for state in states] == [([3], [3])] * 2
    assert exit_status(states) == 3


def test_eight_shards_that_fail_one_after_the_other_end_the_capture_with_what_to_do(tmp_path: Path) -> None:
    script = Script(tmp_path / "script")
    for shard in range(2, 20):
        script.write(shard, *["raise"] * 3)
    with pytest.raises(ValueError, match=r"8 consecutive shards failed 3 times each, .* with --retry_quarantined"):
        captured(tmp_path, 20)
    state = coverage(tmp_path / "s.zarr", "fake")
    assert (state.shards_done, len(state.quarantined)) == (2, 8)


def test_storage_that_fails_ends_the_capture_and_blames_no_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script(tmp_path / "script")
    script.write(2, "storage")
    with pytest.raises(RuntimeError, match=r"the capture ended early and can be resumed when .*: .*No space"):
        captured(tmp_path, 6)
    assert "(2 shards done; 4 not done)" in capsys.readouterr().err
    assert [attempts(script, shard) for shard in range(6)] == [1, 1, 1, 0, 0, 0]
    assert captured(tmp_path, 6)[0].complete


def test_a_device_that_is_lost_ends_the_capture_with_what_to_do_and_blames_no_shard(tmp_path: Path) -> None:
    script = Script(tmp_path / "script")
    script.write(2, "device")
    with pytest.raises(RuntimeError, match=r"the device failed .*: the device is gone. Run the same command again"):
        captured(tmp_path, 6)
    state = coverage(tmp_path / "s.zarr", "fake")
    assert (state.shards_done, state.quarantined) == (2, {})
    assert captured(tmp_path, 6)[0].complete


def test_a_model_that_does_not_load_ends_the_capture_with_its_error(tmp_path: Path) -> None:
    Script(tmp_path / "script").write("load", "raise")
    with pytest.raises(RoutingError, match="as the script says"):
        captured(tmp_path, 6)


@pytest.mark.parametrize("early", [True, False], ids=["at once", "when it is fetched"])
def test_an_error_of_the_last_micro_batch_is_the_shard_s_own_too(tmp_path: Path, early: bool) -> None:
    """The writing thread raises it while the next shard is computed."""
    left = [3]

    class LateEngine(FakeEngine):
        def start(self, token: np.ndarray, length: np.ndarray) -> Callable[[], Routes]:
            finish = super().start(token, length)
            if token[0, 0] != 4:  # which begins shard 2
                return finish

            def fail() -> Routes:
                left[0] -= 1
                raise RoutingError("chosen otherwise")

            return fail() if early else fail

    run: Any = FakeRun(tmp_path / "s.zarr", fake_layout(), batch_tokens=TOKENS_A_SHARD)
    run.make_engine = LateEngine
    [state] = capture_datasets(run, [("fake", text_source(numbered_texts(6)))], capture_here)
    assert (state.missing, left) == ([2], [0])
    assert state.quarantined[2]["errors"] == ["RoutingError: shard 2 of fake: chosen otherwise"] * 3


def test_what_is_computed_is_written_though_the_shard_before_it_could_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica does not keep waiting for it."""
    computed, calls = local.Replica.compute, list[str]()

    def compute(replica: Any, dataset: str, shard: int) -> Any:
        calls.append(f"compute {shard}")
        commit = computed(replica, dataset, shard)

        def written() -> dict[str, Any]:
            if shard == 0:
                commit()
                raise OSError("disk full")
            facts = commit()
            calls.append(f"commit {shard}")
            return facts

        return written

    monkeypatch.setattr(local.Replica, "compute", compute)
    with pytest.raises(RuntimeError, match="disk full"):
        captured(tmp_path, 5)
    assert calls == ["compute 0", "compute 1", "commit 1"]
    assert "fake/expert/commits/1.json" in store_files(tmp_path / "s.zarr")


def test_two_shards_are_in_work_at_most_one_of_them_being_written() -> None:
    """The next one is computed before the first one is waited for."""
    steps: list[str] = []

    class Written(Future[dict[str, Any]]):
        def __init__(self, shard: int) -> None:
            super().__init__()
            self.shard = shard

        def result(self, timeout: float | None = None) -> dict[str, Any]:
            steps.append(f"{self.shard} is waited for")
            return {}

    run: Any = SimpleNamespace(assignment=None)
    pool, worker, events = ThisProcess(run, []), WorkerState(1), list[Event]()
    pool._replica = SimpleNamespace(compute=lambda _, shard: steps.append(f"{shard} is computed") or shard)  # type: ignore
    pool._writer = SimpleNamespace(submit=Written)  # type: ignore[assignment]
    for shard in range(3):
        pool.ask(worker, Unit("fake", shard))
    for _ in range(4):
        pool.listen(events.append)
    computed, waited = (f"{{}} is {what}".format for what in ("computed", "waited for"))
    assert steps == [computed(0), computed(1), waited(0), computed(2), waited(1), waited(2)]
    assert [event.call for event in events] == [Unit("fake", shard) for shard in range(3)]
