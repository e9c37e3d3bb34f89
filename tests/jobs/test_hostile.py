"""Mistakes of users and faulty data sets: one clear line, the right exit status, and nothing half done."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from fake_model import fake_capture, fake_layout, word_id, words
from patience import HUNG_S

import store
from workers.text.tokenizer import load_tokenizer
from workers.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
Command = Callable[..., Any]


@pytest.fixture
def options(tmp_path: Path) -> tuple[str, ...]:
    """A small capture into `s.zarr`."""
    return (
        *("--local", "--model", "tiny", "--device", "cpu", "--quantization", "none"),
        *("--sequence_length", "16", "--rows_per_shard", "4", "--store", str(tmp_path / "s.zarr")),
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("some words to route, " * 40)
    return file


# --- Texts ------------------------------------------------------------------------------------------------


def test_empty_and_blank_documents_are_kept_and_counted(
    command: Command, options: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in {"a": "", "b": " \n\t  ", "c": "word", "d": ""}.items():
        (folder / f"{name}.txt").write_text(content)
    ran = command("--dataset", folder, *options)
    assert ran.status == 0, ran.err
    assert "4 documents, 2 of them empty" in ran.err
    data = store.open_capture(tmp_path / "s.zarr", "texts")
    assert data["name"].values.tolist() == ["a.txt", "b.txt", "c.txt", "d.txt"]
    assert sorted(set(data["document_id"].values.tolist())) == [1, 2]


def test_a_data_set_of_empty_documents_only_is_complete_with_no_row(
    command: Command, options: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "void"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).touch()
    for _ in range(2):
        ran = command("--dataset", folder, *options)
        assert ran.status == 0, ran.err
        assert "2 documents, 2 of them empty, 0 rows, 0 tokens" in ran.err
    data = store.open_capture(tmp_path / "s.zarr", "void")
    assert (data.sizes["doc"], data.sizes["document"]) == (0, 2)
    dry = command("--dataset", folder, *options, "--dry_run")
    assert dry.status == 0, dry.err


def test_a_table_without_a_row_is_refused(command: Command, options: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "none.jsonl"
    file.write_text("")
    expect_line(command("--dataset", file, *options), 2, "none")
    assert not (tmp_path / "s.zarr").exists()


def test_a_document_of_a_million_tokens_is_cut_with_every_token_in_its_place(tmp_path: Path) -> None:
    text = words(1_000_000)
    state = fake_capture(
        tmp_path / "s.zarr", ["short one", text, "end"], layout=fake_layout(sequence_length=512, rows_per_shard=256),
        batch_tokens=32_768,
    )  # fmt: skip
    assert state.complete
    assert state.tokens_done == 1_000_003
    data = store.open_capture(tmp_path / "s.zarr", "fake")
    rows = np.flatnonzero(data["document_id"].values == 1)
    assert data["offset"].values[rows].tolist() == list(range(0, 1_000_000, 512))
    tokens = data["token"].isel(doc=rows).values.ravel()[:1_000_000]
    np.testing.assert_array_equal(tokens, [word_id(word) for word in text.split()])


def test_bytes_that_are_no_text_are_replaced_and_counted_and_markup_stays_text(
    command: Command, options: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "bad.jsonl"
    markup = "<script>alert('x')</script> </script><s> </s>[INST] <unk><|im_end|>"
    lines = [json.dumps({"text": "lone \ud800 surrogate"}).encode(), b'{"text": "in\xffvalid \xc3("}']
    file.write_bytes(b"\n".join([*lines, json.dumps({"text": markup, "id": "<script>"}).encode()]))
    ran = command("--dataset", file, *options)
    assert ran.status == 0, ran.err
    assert "2 with invalid bytes replaced" in ran.err
    data = store.open_capture(tmp_path / "s.zarr", "bad").load()
    tokenizer = load_tokenizer(tiny_checkpoint())
    wanted = ["lone \ufffd surrogate", "in\ufffdvalid \ufffd(", markup]
    for document, (ids, content) in enumerate(zip(tokenizer.encode_batch(wanted), wanted, strict=True)):
        of = data["document_id"].values == document
        found = data["token"].values[of]
        assert found[found >= 0].tolist() == ids.tolist(), content
        assert not set(ids.tolist()) & set(tokenizer.special_ids), "a special token out of text"
    assert data["name"].values[2] == "<script>"


# --- Places -----------------------------------------------------------------------------------------------

WITHOUT_RIGHTS = """
import ctypes
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
rights = (ctypes.c_uint32 * 6)()  # twice: effective, permitted, inheritable
libc = ctypes.CDLL(None, use_errno=True)
assert libc.capget(header, rights) == 0
rights[0] &= ~0b110  # not bound by modes of files: to read, write and search all, and to read all
assert libc.capset(header, rights) == 0
import jobs.capture, jobs.console.terminal
jobs.console.terminal.run_job(jobs.capture.main)
"""
"""Only a capability is dropped, not the user: the interpreter may be readable only by its owner."""


def expect_line(ran: Any, status: int, *said: str) -> None:
    """One line that starts with "error:" and contains these words, without a traceback."""
    assert ran.status == status, ran.err
    assert "Traceback" not in ran.err
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ran.err
    for part in said:
        assert part in ran.err, ran.err


@pytest.mark.parametrize("closed", ["text", "store", "folder of the store"])
def test_what_may_not_be_read_or_written_is_named(
    options: tuple[str, ...], text: Path, tmp_path: Path, closed: str
) -> None:
    path = tmp_path / "s.zarr"
    if closed == "text":
        text.chmod(0)
    elif closed == "store":
        path.mkdir(mode=0o555)
    else:
        tmp_path.chmod(0o555)
    script = [sys.executable, "-W", "error", "-c", WITHOUT_RIGHTS, "--dataset", str(text), *options]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=HUNG_S)
    tmp_path.chmod(0o755)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert "ermission denied" in lines[0]
    assert str(text if closed == "text" else path) in lines[0]
    assert closed == "store" or not path.exists()


class FullDisk:
    """Fails the `at`-th write from now on with ENOSPC, after writing a part of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.left = at
        real = os.fsync

        def fsync(handle: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError(28, "No space left on device")
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_ends_the_job_with_nothing_half_committed_and_it_goes_on_when_there_is_room(
    command: Command, options: tuple[str, ...], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, full = tmp_path / "s.zarr", 0
    assert command("--dataset", text, *options, "--name", "whole").status == 0
    for room in (0, 3, 40, 90, 130, 140):
        with monkeypatch.context() as patch:
            FullDisk(patch, room)
            ran = command("--dataset", text, *options)
        full += ran.status != 0
        if ran.status:
            assert ran.status in (1, 2), "1 once the capture has begun: the same command may be given again"
            expect_line(ran, ran.status, "No space left on device")
        else:  # there was room, or only the lease was left to be removed
            assert store.coverage(path, "text").complete
        if (path / "text" / "zarr.json").exists():
            assert not store.coverage(path, "text").wrong
    assert full >= 3, "the disk was never full"
    ran = command("--dataset", text, *options)
    assert ran.status == 0, ran.err
    tree = store.open_tree(path)
    for name in ("expert", "weight", "token", "length"):
        np.testing.assert_array_equal(tree["text"][name], tree["whole"][name])
    assert not list((path / "text/token/partial").glob("*")), "a partial file was left"


def test_a_limit_on_the_size_of_files_ends_the_job_as_a_full_disk_does(
    options: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    text.write_text("".join(chr(0x4E00 + n % 5000) for n in range(4000)))
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import jobs.capture, jobs.console.terminal\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); jobs.console.terminal.run_job(jobs.capture.main)"
    )
    command = [sys.executable, "-c", script, "--dataset", str(text), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HUNG_S)
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("store_path", "said"),
    [
        ("gs://bucket/routes.zarr", "gs:// is not supported; use a folder or s3://bucket/prefix"),
        ("file:///tmp/routes.zarr", "file:// is not supported"),
        ("s3:///routes.zarr", "is not a store: a bucket's name has 3 to 63"),
        ("text.txt", "text.txt"),
        ("text.txt/deeper.zarr", "text.txt"),
    ],
)
def test_a_store_that_cannot_be_one_is_refused(
    command: Command, options: tuple[str, ...], text: Path, store_path: str, said: str
) -> None:
    before = text.read_bytes()
    place = store_path if ":" in store_path else text.parent / store_path
    expect_line(command("--dataset", text, *options, "--store", place), 2, said)
    assert text.read_bytes() == before


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "", "Größe", "x" * 129, "/abs", "a\nb"])
def test_a_group_name_that_leaves_the_store_or_cannot_be_one_is_refused(
    command: Command, options: tuple[str, ...], text: Path, name: str
) -> None:
    expect_line(command("--dataset", text, *options, f"--name={name}"), 2, "is not a valid name of a data set")
    assert sorted(path.name for path in text.parent.iterdir()) == ["text.txt"]


@pytest.mark.parametrize("dataset", ["no/such/file.txt", "nothing.txt", "text*.nope"])
def test_a_data_set_that_is_not_there_is_refused(
    command: Command, options: tuple[str, ...], tmp_path: Path, dataset: str
) -> None:
    expect_line(command("--dataset", tmp_path / dataset, *options), 2, dataset)


# --- Models and flags -------------------------------------------------------------------------------------


def copied(tmp_path: Path, without: str = "") -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(), folder, ignore=shutil.ignore_patterns(without) if without else None)
    return folder


def test_a_model_folder_without_a_tokenizer_is_refused(
    command: Command, options: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    folder = copied(tmp_path, "*token*")
    expect_line(command("--dataset", text, *options, "--model", folder), 2, str(folder), "tokenizer.json")
    assert not (tmp_path / "s.zarr").exists()


def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(
    command: Command, options: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    folder = copied(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"].append({"id": 32_000, "content": "<more>", **added})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    ran = command("--dataset", text, *options, "--model", folder)
    expect_line(ran, 2, "32001 ids", "32000 embeddings", "do not belong together")


def test_a_dense_model_is_refused(command: Command, options: tuple[str, ...], text: Path, tmp_path: Path) -> None:
    folder = copied(tmp_path, "model*")
    config = transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ran = command("--dataset", text, *options, "--model", folder)
    expect_line(ran, 2, "has no routers: only mixture-of-experts models can be captured")


def test_rows_longer_than_the_models_positions_are_refused_with_both_lengths(
    command: Command, options: tuple[str, ...], text: Path
) -> None:
    ran = command("--dataset", text, *options, "--sequence_length", 32_769)
    expect_line(ran, 2, "--sequence_length is 32769", "32768 positions")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sequence_lenght", "16"), "sequence_lenght"),
        (("--quantization", "nf5"), "nf5"),
        (("--batch_tokens", "many"), "many"),
        (("stray",), "stray"),
    ],
)
def test_a_flag_with_a_typo_is_refused_by_name(
    command: Command, options: tuple[str, ...], text: Path, tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    ran = command("--dataset", text, *options, *flags)
    assert ran.status == 2
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "s.zarr").exists()


def test_a_model_that_is_no_model_is_refused(
    command: Command, options: tuple[str, ...], text: Path, tmp_path: Path
) -> None:
    expect_line(command("--dataset", text, *options, "--model", tmp_path), 2, str(tmp_path))
