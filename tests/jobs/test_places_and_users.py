"""Users without a name, a home or a writable folder, and names that mean nothing: one line with the reason."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import Ran
from numba.core.dispatcher import Dispatcher

from analysis.scanning import kernel
from jobs.capturing.options import parse_capture
from jobs.cluster import connection
from jobs.console import terminal
from store import CaptureGroup
from workers.tiny import model_path

Command = Callable[..., Ran]
ROOT = Path(__file__).parents[2]


def test_a_kernel_compiles_where_no_folder_for_its_cache_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritable(self: Dispatcher) -> None:
        raise RuntimeError("cannot cache function: no locator available")

    with monkeypatch.context() as patch:
        patch.setattr(Dispatcher, "enable_caching", unwritable)
        assert kernel(lambda number: number + 1)(2) == 3


def test_a_user_without_a_home_is_given_a_name_for_it_and_asked_for_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", nobody)
        monkeypatch.setenv("HOME", "/somewhere")
        terminal._name_a_home()
    assert Path.home() == Path(terminal.NO_HOME)
    monkeypatch.delenv("EXPERT_ATLAS_STORE", raising=False)
    with pytest.raises(ValueError, match="this user has no home folder; use another --store"):
        _ = parse_capture(["--dataset", "x"]).store_path


def test_a_ray_that_a_user_without_a_writable_home_starts_has_its_token_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens: list[str | None] = []

    def init(**_: Any) -> None:
        tokens.append(os.environ.get("RAY_AUTH_TOKEN"))
        if tokens[-1] is None:
            raise PermissionError(13, "Permission denied", "/nonexistent")  # where Ray would store its new token

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(os, "environ", {})
    connection._connect()
    connection._connect()
    first, second, third = tokens
    assert first is None
    assert second == third
    assert len(bytes.fromhex(str(second))) == 32


def test_a_folder_that_ray_cannot_write_is_named_with_the_variable_that_sets_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/tmp/ray")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(connection, "catch_sigterm", lambda: None)
    monkeypatch.setattr(os, "environ", {})
    with (
        pytest.raises(ValueError, match=r"cannot write its files .*'/tmp/ray'.*: set RAY_TMPDIR to a writable folder"),
        connection.connection(),
    ):
        raise AssertionError("connected")


@pytest.mark.parametrize("script", ["capture", "quantize"])
def test_a_model_s_name_with_a_typo_is_an_error_before_torch_is_imported(script: str, tmp_path: Path) -> None:
    arguments = {"capture": ["--local", "--dataset", "x"], "quantize": []}[script]
    given = ["--model", "tinny", *arguments] if script == "capture" else ["tinny", str(tmp_path / "out")]
    code = f"import sys\nfrom jobs import {script}\ntry:\n    {script}.main({given!r})\nexcept ValueError as error:\n"
    code += "    print(error, '|', 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "there is no model 'tinny'" in done.stdout
    assert done.stdout.endswith("| False\n")


def test_a_model_in_the_home_folder_is_found_wherever_its_name_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "mx").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_path("~/models/mx") == tmp_path / "models" / "mx"


def test_the_root_of_a_bucket_is_no_store() -> None:
    for place in ("s3://bucket", "s3://bucket/"):
        with pytest.raises(ValueError, match=r"s3://bucket is a bucket's root.*use s3://bucket/prefix"):
            CaptureGroup(place, "a")
