"""The command that a report shows makes the same capture again."""

import html
import re
import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from analysis.report.command import HOW, made
from analysis.report.command import command as command_of
from analysis.report.page import write_report
from jobs.capturing.options import CaptureConfig, parse_capture
from store.group import CaptureGroup

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = "--local --model tiny --device cpu --quantization none --sequence_length 32 --rows_per_shard 4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts in a folder whose name a shell would split."""
    folder = tmp_path / "my texts; it's $HOME"
    folder.mkdir()
    (folder / "a.txt").write_text("The expert that a token meets depends on the token.\n" * 9)
    (folder / "b.txt").write_text("def route(x):\n    return sorted(x)[:2]\n" * 5)
    return folder


def shown(page: str) -> list[list[str]]:
    """The commands of a report, as parsed by a shell."""
    return [shlex.split(html.unescape(text)) for text in re.findall(r'<pre class="command">(.*?)</pre>', page, re.S)]


def test_the_command_on_the_page_makes_the_same_capture_again(
    folder: Path, tmp_path: Path, command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws_secret")
    old, new, page = tmp_path / "old store.zarr", tmp_path / "new.zarr", tmp_path / "report.html"
    given = ["--dataset", str(folder), "--name", "texts", "--limit_documents", "2", "--store", str(old), *TINY.split()]
    assert command(*given).status == 0
    write_report([old], page)
    assert "secret" not in page.read_text()
    [[python, script, *arguments]] = shown(page.read_text())
    assert (python, script) == ("python", "jobs/capture.py")
    again = command(*arguments)
    assert again.status == 0
    assert "nothing to do" in again.err, "it is the same capture"
    arguments[arguments.index("--store") + 1] = str(new)
    assert command(*arguments).status == 0
    assert CaptureGroup(new, "texts").identity == CaptureGroup(old, "texts").identity
    routes = [path.relative_to(old) for path in old.glob("texts/expert/c/**/*") if path.is_file()]
    assert routes
    for path in routes:
        assert (new / path).read_bytes() == (old / path).read_bytes()


def test_two_data_sets_of_one_command_have_that_command(
    folder: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    store, page = tmp_path / "s.zarr", tmp_path / "report.html"
    pair = [f"--dataset={folder / name}" for name in ("a.txt", "b.txt")]
    assert command(*pair, "--store", store, *TINY.split()).status == 0
    write_report([store], page)
    [[_, _, *arguments]] = shown(page.read_text())
    assert command(*arguments).err.count("nothing to do") == 2


CONFIGS = [
    CaptureConfig(dataset=("wikitext-103",), store="s3://bucket/a prefix"),
    CaptureConfig(dataset=("-odd", "org/name:config"), name=("one", "two"), bos="document", dtype="float16"),
    CaptureConfig(dataset=("x\ny",), local=True, quantize_gates=True, gpus_per_worker=0.5, split="a b", device="cuda"),
    CaptureConfig(dataset=("demo:code",), model="/models/it's", quantization="fp4", limit_documents=3, workers=9),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_command_is_read_as_the_options_that_it_was_made_of(config: CaptureConfig) -> None:
    told = command_of({"configuration": config.as_options(), "identity": {}})
    assert told is not None
    default = CaptureConfig()
    same = {name: getattr(default, name) for name in HOW}
    assert parse_capture(shlex.split(told)[2:]) == replace(config, **same)


def test_only_options_that_change_no_byte_are_left_out() -> None:
    assert set(HOW) <= {field.name for field in fields(CaptureConfig)}
    identity = {"dtype", "batch_tokens", "bos", "limit_documents", "quantization", "quantize_gates", "sequence_length"}
    assert not identity & set(HOW)


def test_what_was_left_open_is_said_as_it_came_out() -> None:
    config = CaptureConfig(dataset=("org/name",), model="org/model", model_revision="main", revision="v1")
    identity = {
        "model_revision": COMMIT, "compute_dtype": "bfloat16", "batch_tokens": 32768, "sequence_length": 128,
        "rows_per_shard": 2048, "text_revision": COMMIT[::-1],
    }  # fmt: skip
    attrs = {"configuration": config.as_options(), "identity": identity}
    read = parse_capture(shlex.split(command_of(attrs) or "")[2:])
    assert (read.model_revision, read.revision) == (COMMIT, COMMIT[::-1])
    assert (read.dtype, read.batch_tokens, read.sequence_length, read.rows_per_shard) == ("bfloat16", 32768, 128, 2048)
    folder = {**identity, "model_revision": "sha256:1234", "text_revision": None}
    read = parse_capture(shlex.split(command_of({**attrs, "identity": folder}) or "")[2:])
    assert (read.model_revision, read.revision) == ("main", "v1")
    several = replace(config, dataset=("org/name", "org/other"), revision=None).as_options()
    read = parse_capture(shlex.split(command_of({**attrs, "configuration": several}) or "")[2:])
    assert (read.sequence_length, read.rows_per_shard, read.revision) == (None, None, None)


def test_captures_of_one_command_and_one_environment_are_told_together() -> None:
    one, other = (
        {
            "configuration": CaptureConfig(dataset=(name,)).as_options(),
            "environment": {"torch": "2"},
            "git_commit": "ab+",
        }
        for name in ("x", "y")
    )
    [old, new] = made({"a": one, "b": one, "c": other, "d": {**other, "environment": {"torch": "3"}}, "e": {}})
    assert [names for names, _ in old.commands] == [["a", "b"], ["c"]]
    assert [names for names, _ in new.commands] == [["d"]]
    assert old.versions == "code ab with uncommitted changes; torch 2"
    assert made({"e": {"model": "m"}}) == []
