"""Storage that fails during a capture: one clear line, nothing half committed, and the same command resumes afterwards.

The capture is that of `simulated`, run like its script, with an exit status and messages. Errors are injected into the
calls of `store.objects`, from any call on. A disk that is really full and one that really becomes read-only are small
disks in their own namespace, if the kernel allows it. S3: `test_s3_faults.py`.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_model import store_files
from law import Files, Law, differing
from simulated import NAME, STORE, capture, simulation, undisturbed

from jobs.capturing.captures import exit_status
from store.objects import LocalObjects

ROOT = Path(__file__).parents[2]
CALLS = 440
"""About the number of calls of an undisturbed capture that can fail here."""
FAILURES = {
    errno.ENOSPC: "No space left on device",
    errno.EDQUOT: "Disk quota exceeded",
    errno.EROFS: "Read-only file system",
    errno.EACCES: "Permission denied",
    errno.EIO: "Input/output error",
}
READ_ONLY = (errno.EROFS, errno.EACCES)


class Failing:
    """From one call on, every call fails that creates, writes or names a file or, if nothing can be changed, removes
    one.

    Parameters
    ----------
    at
        The first call that fails, counted from 0.
    number
        The number of the error.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int, number: int) -> None:
        self.calls, self.at, self.number = 0, at, number
        for name in ("mkdir", "link", "replace", *(("unlink",) if number in READ_ONLY else ())):
            patch.setattr(os, name, self._call(getattr(os, name)))
        patch.setattr(os, "fsync", self._call(lambda handle: None))
        patch.setattr(Path, "open", self._call(Path.open, only="xb"))

    def _call(self, real: Callable[..., Any], only: str = "") -> Callable[..., Any]:
        def call(first: Any, *others: Any, **named: Any) -> Any:
            self.calls += 1 if not only or only in others else 0
            if self.calls > self.at and (not only or only in others):
                names = () if isinstance(first, int) else (str(first),)  # of an open file the kernel names none
                raise OSError(self.number, os.strerror(self.number), *names)
            return real(first, *others, **named)

        return call


class Folder:
    """A store in a folder, and the command that captures into it."""

    def __init__(self, root: Path, command: Callable[..., Any], clean: Files) -> None:
        self.root, self.command, self.law = root / STORE, command, Law(self.files, clean)

    def files(self) -> Files:
        """Every file of the store."""
        return store_files(self.root) if self.root.exists() else {}

    def capture(self) -> Any:
        """Run the command; returns its status and messages. The law must hold afterwards."""
        with simulation(lambda scratch: LocalObjects(self.root, scratch)):
            ran = self.command(main=lambda _: exit_status([capture()]))
        assert "Traceback" not in ran.err
        self.holds()
        return ran

    def holds(self) -> None:
        """The store is consistent, and nothing is half committed."""
        with simulation(lambda scratch: LocalObjects(self.root, scratch)):
            self.law.holds()
            state = self.law.state()
            assert state is None or state.wrong == {}

    def goes_on(self) -> None:
        """The same command again ends with the clean run's store."""
        ran = self.capture()
        assert ran.status == 0, ran.err
        self.law.equals(self.files())


def only_error(err: str) -> str:
    """The one line that says what is wrong."""
    [error] = [line for line in err.splitlines() if line.startswith("error: ")]
    return error


@pytest.fixture(scope="module")
def clean() -> Files:
    """The store of an undisturbed run."""
    files, _ = undisturbed()
    return files


@pytest.fixture
def folder(tmp_path: Path, command: Callable[..., Any], clean: Files) -> Folder:
    """An empty one."""
    return Folder(tmp_path, command, clean)


@pytest.mark.parametrize("number", FAILURES, ids=FAILURES.get)
def test_storage_that_fails_from_any_call_on_is_named_with_its_path_and_the_command_goes_on_when_it_is_mended(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    statuses = set()
    for at in range(number % 7, CALLS, 40):
        with monkeypatch.context() as patch:
            failing = Failing(patch, at, number)
            ran = folder.capture()
        assert failing.calls > at, "the storage did not fail"
        said = only_error(ran.err)
        assert FAILURES[number] in said
        assert str(folder.root) in said or str(folder.root.parent) in said
        statuses.add(ran.status)
        folder.goes_on()
        shutil.rmtree(folder.root)
    assert statuses == {1, 2}, "2 before the capture began; then 1: the same command may be given again"


def test_storage_that_fails_only_once_costs_no_shard_that_was_committed(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a disk on which someone frees space at once."""
    ended = 0
    for at in (*range(0, CALLS, 30), CALLS // 2):
        with monkeypatch.context() as patch:
            failing = Failing(patch, 10**9, errno.ENOSPC)
            failing.at = at
            before = {key for key in folder.files() if "/commits/" in key}
            ended += folder.capture().status != 0
        assert before <= {key for key in folder.files() if "/commits/" in key}
    assert ended > 3
    folder.goes_on()


# --- A folder that is removed under a running capture -------------------------------------------------------------


@pytest.mark.parametrize(
    "what", ["", NAME, *(f"{NAME}/{name}" for name in ("expert", "expert/commits", "token", "length"))]
)
def test_a_folder_removed_under_a_running_capture_is_told_and_done_again(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """If more than commits and routes are missing, the message says to remove the rest, which is then done."""
    write, seen = LocalObjects._write_partial, []
    for at in range(4, 62, 7):

        def remove_then_write(objects: LocalObjects, data: bytes, at: int = at) -> Path:
            seen.append(len(data))
            if len(seen) == at:
                shutil.rmtree(folder.root / what, ignore_errors=True)
            return write(objects, data)

        seen.clear()
        folder.law.plan_hurt = True
        with monkeypatch.context() as patch:
            patch.setattr(LocalObjects, "_write_partial", remove_then_write)
            ran = folder.capture()
        assert len(seen) >= at
        assert ran.status in (1, 2) or differing(folder.files(), folder.law.clean) == [], "it was not there yet"
        if (again := folder.capture()).status:
            assert f"remove the folder {NAME}" in only_error(again.err)
            shutil.rmtree(folder.root / NAME)
        folder.law.plan_hurt = False
        folder.goes_on()
        shutil.rmtree(folder.root)


def test_a_plan_whose_description_is_removed_is_planned_anew_and_no_shard_is_captured_again(folder: Folder) -> None:
    """An alternative to removing the folder, which would also remove committed shards."""
    folder.goes_on()
    commits = {key: data for key, data in folder.files().items() if "/commits/" in key}
    for key in ("length/c/0", "token/c/1/0", "piece/zarr.json", "expert/zarr.json", "name/c/0", "layer/c/0"):
        (folder.root / NAME / key).unlink()
        (folder.root / NAME / "zarr.json").unlink()
        folder.goes_on()
        assert {key: data for key, data in folder.files().items() if "/commits/" in key} == commits


# --- Disks that are really full, and really read-only -----------------------------------------------------------


def test_a_disk_that_is_really_full_or_read_only_is_told_and_leaves_what_the_next_run_goes_on_from(
    tmp_path: Path,
) -> None:
    (tmp_path / "disk").mkdir()
    script = [sys.executable, "-W", "error", str(ROOT / "tests" / "small_disk.py"), str(tmp_path / "disk")]
    done = subprocess.run(["unshare", "--mount", *script], capture_output=True, text=True, cwd="/")
    if done.returncode and "small_disk.py" not in done.stderr + done.stdout and not done.stdout:
        assert os.environ.get("REQUIRE_MOUNT") != "1", f"REQUIRE_MOUNT=1, and {done.stderr}"
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    ran = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["what"], one["status"]) for one in ran] == [
        ("full", 2),  # not even the lease
        ("full", 1),
        ("full", 1),
        ("read-only from the fourth commit on", 1),
        ("read-only", 2),
        ("well again", 0),
    ], done.stderr
    for one in ran[:-1]:
        assert FAILURES[errno.ENOSPC if one["what"] == "full" else errno.EROFS] in only_error(one["said"])
        assert str(tmp_path / "disk" / "routes.zarr") in only_error(one["said"])
    for one in ran[1:]:
        assert (one["wrong"], one["lost"]) == ({}, [])
        assert one["partial"] == [] or "read-only" in one["what"]
    assert [one["done"] for one in ran[1:]] == [0, 1, 3, 3, 5]
    assert ran[-1]["complete"]
