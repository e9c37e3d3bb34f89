"""Killed anywhere, then the same command again: the store equals that of an undisturbed run, byte for byte."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_model import TEXTS, fake_capture, fake_layout, store_files, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from more import MORE
from patience import HUNG_S

from store import coverage, dataset_names, open_capture

ROOT = Path(__file__).parents[2]


class Driver:
    """The process of `crash_driver.py`."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(ROOT / "tests" / "crash_driver.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd="/",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def run(self, store: Path, step: int | None = None) -> int:
        """Capture; returns the exit status, -9 if it was killed at its step number `step`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"store": str(store), "step": step}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


class Truth:
    """An undisturbed run: its files, and the steps at which it could have died."""

    def __init__(self, driver: Driver, store: Path) -> None:
        assert driver.run(store) == 0, store.with_suffix(".zarr.log").read_text()
        self.store, self.files = store, comparable(store)
        self.steps: list[str] = json.loads(Path(f"{store}.trace").read_text())

    def numbers(self, wanted: Callable[[str], bool]) -> list[int]:
        """Numbers of the steps whose description is wanted."""
        return [number for number, step in enumerate(self.steps) if wanted(step)]


def comparable(store: Path) -> dict[str, Any]:
    """Every file of a store; of commit records only the parts that do not depend on their writer and its speed."""
    files: dict[str, Any] = dict(store_files(store))
    for key in [key for key in files if "/commits/" in key]:
        record = json.loads(files[key])
        files[key] = {name: value for name, value in record.items() if name not in ("seconds", "worker")}
    return files


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    driver = Driver()
    with driver.process:
        yield driver
        assert driver.process.stdin is not None
        driver.process.stdin.close()


@pytest.fixture(scope="module")
def truth(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth(driver, tmp_path_factory.mktemp("truth") / "routes.zarr")


def assert_kill_leaves_no_lie(store: Path, truth: Truth) -> None:
    """The visible part of a killed capture: each commit names complete objects, and each existing object is
    complete."""
    found = comparable(store)
    for key, content in found.items():
        if "/commits/" in key:
            shard = Path(key).stem
            assert content == truth.files[key]
            assert found[f"fake/expert/c/{shard}/0/0/0"] == truth.files[f"fake/expert/c/{shard}/0/0/0"]
            assert found[f"fake/weight/c/{shard}/0/0/0"] == truth.files[f"fake/weight/c/{shard}/0/0/0"]
        if key.startswith(("fake/token/c", "fake/expert/c/", "fake/weight/c/")):
            assert content == truth.files[key], key
    if (store / "fake/zarr.json").exists():
        state = coverage(store, "fake")
        assert not state.wrong
        assert state.shards_done == sum("/commits/" in key for key in found)


def assert_killed_and_resumed(driver: Driver, truth: Truth, store: Path, *steps: int) -> None:
    """Kill a capture at its step, the resumed one at its own, and so on; then resume to the end."""
    for step in steps:
        status = driver.run(store, step)
        assert status == -signal.SIGKILL or (status == 0 and len(steps) > 1), (status, steps)
        assert_kill_leaves_no_lie(store, truth)
    assert driver.run(store) == 0, Path(f"{store}.log").read_text()
    assert comparable(store) == truth.files, [truth.steps[step] for step in steps if step < len(truth.steps)]
    shutil.rmtree(store)


def made(truth: Truth) -> int:
    """Number of the first step after the group is made, its own metadata last."""
    return truth.steps.index("before put_new fake/zarr.json") + 3


def some(steps: range) -> list[int]:
    """Every third step and the last, or all steps with more examples: an object has three steps, before, torn and
    invisible."""
    return list(steps) if MORE > 1 else sorted({*steps[::9], *steps[4::9], *steps[8::9], steps[-1]})


def planned(truth: Truth) -> int:
    """Number of the first step after planning."""
    return truth.steps.index("before put_new fake/expert/c/0/0/0/0")


def test_an_undisturbed_run_leaves_no_lease_and_no_partial_file(truth: Truth) -> None:
    assert not [key for key in truth.files if "partial" in key or "lease" in key]
    assert coverage(truth.store, "fake").shards_total == 5
    assert coverage(truth.store, "fake").tokens_done == sum(len(text.split()) for text in TEXTS)
    assert len([key for key in truth.files if "/commits/" in key]) == 5


@pytest.mark.slow
def test_killed_while_the_group_is_created(driver: Driver, truth: Truth, tmp_path: Path) -> None:
    steps = range(made(truth))
    assert sum("zarr.json" in truth.steps[step] for step in steps) > 30
    for step in some(steps):
        assert_killed_and_resumed(driver, truth, tmp_path / f"{step}.zarr", step)


@pytest.mark.slow
def test_killed_while_the_text_is_planned(driver: Driver, truth: Truth, tmp_path: Path) -> None:
    steps = range(made(truth), planned(truth))
    assert {"before put_over fake/token/plan.json", "torn fake/length/c/0", "invisible fake/token/c/4/0"} <= {
        truth.steps[step] for step in steps
    }
    for step in some(steps):
        assert_killed_and_resumed(driver, truth, tmp_path / f"{step}.zarr", step)


@pytest.mark.slow
def test_killed_before_between_and_after_the_arrays_of_a_shard_and_its_commit(
    driver: Driver, truth: Truth, tmp_path: Path
) -> None:
    steps = range(planned(truth), len(truth.steps))
    for shard in range(5):
        for key in (f"expert/c/{shard}/0/0/0", f"weight/c/{shard}/0/0/0", f"expert/commits/{shard}.json"):
            for stage in ("before put_new", "torn", "invisible"):
                assert f"{stage} fake/{key}" in [truth.steps[step] for step in steps]
    for step in some(steps):
        assert_killed_and_resumed(driver, truth, tmp_path / f"{step}.zarr", step)


@settings(max_examples=12 * MORE, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(0, 300), min_size=2, max_size=5))
def test_killed_again_and_again(driver: Driver, truth: Truth, tmp_path: Path, steps: list[int]) -> None:
    assert_killed_and_resumed(driver, truth, tmp_path / "again.zarr", *steps)


CAPTURE = ["--dataset", "texts", "--store", "routes.zarr", "--local", "--model", "tiny", "--quantization", "none"]
CAPTURE += ["--device", "cpu", "--sequence_length", "64", "--rows_per_shard", "16", "--batch_tokens", "256"]
SCRIPT = [sys.executable, "-W", "error", str(ROOT / "jobs" / "capture.py")]


@pytest.mark.slow
def test_ctrl_c_and_sigterm_in_a_real_capture_exit_130_and_143_and_the_same_command_goes_on(
    tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(words(1200, number))  # 34 shards
    # The identity of the code must not change during the test if someone commits.
    monkeypatch.setenv("GIT_DIR", "/nonexistent")

    def heeds_ctrl_c() -> None:
        """Background processes of a shell ignore Ctrl-C, and so would their children."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def interrupted(folder: Path, number: int, at_commits: int) -> subprocess.CompletedProcess[str]:
        commits = folder / "routes.zarr" / "texts" / "expert" / "commits"
        with subprocess.Popen(
            [*SCRIPT, *CAPTURE],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heeds_ctrl_c,
        ) as process:
            while process.poll() is None and (not commits.exists() or len(os.listdir(commits)) < at_commits):
                time.sleep(0.005)
            process.send_signal(number)
            return subprocess.CompletedProcess(
                [], process.wait(HUNG_S), stderr=process.stderr and process.stderr.read()
            )

    truth, folder = tmp_path / "truth", tmp_path / "stopped"
    for path in (truth, folder):
        path.mkdir()
        (path / "texts").symlink_to(tmp_path / "texts")
    done = 0
    for number, status, word in ((signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")):
        ended = interrupted(folder, number, done + 3)
        assert ended.returncode == status, ended.stderr
        assert ended.stderr.splitlines()[-1].startswith(f"error: {word}: finished work is kept")
        assert "Traceback" not in ended.stderr
        state = coverage(folder / "routes.zarr", "texts")
        assert done + 3 <= state.shards_done < state.shards_total
        assert not (folder / "routes.zarr" / "texts" / "token" / "lease.json").exists()
        done = state.shards_done
    for path in (folder, truth):
        monkeypatch.chdir(path)
        assert command(*CAPTURE).status == 0
    assert comparable(folder / "routes.zarr") == comparable(truth / "routes.zarr")


def test_a_group_whose_creation_was_killed_is_no_capture_yet_and_may_become_another(
    driver: Driver, truth: Truth, tmp_path: Path
) -> None:
    store = tmp_path / "routes.zarr"
    assert driver.run(store, made(truth) - 1) == -signal.SIGKILL
    assert dataset_names(store) == []
    with pytest.raises(FileNotFoundError, match="no data set 'fake'"):
        open_capture(store, "fake", allow_incomplete=True)
    other = fake_capture(store, TEXTS, layout=fake_layout(sequence_length=16))
    assert other.complete
    assert open_capture(store, "fake").sizes["position"] == 16
