"""The command line of a capture, from text to store, with the tiny model."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fake_hub import COMMIT, TOKEN, FakeHub
from fake_model import store_files
from patience import HUNG_S

import store
from analysis.report.command import command as reproducing
from jobs import status
from jobs.capturing.options import MIXTRAL, PRESETS, CaptureConfig, parse_capture
from store import CaptureGroup
from store.identity import MODEL, TEXT
from store.lease import lease
from workers import engine, environment
from workers.models.footprint import operations_per_token
from workers.models.stored import default_quantization
from workers.text.tokenizer import TextTokenizer, load_tokenizer
from workers.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
Command = Callable[..., Any]
TEXTS = {
    "a.txt": "The expert that a token meets depends on the token.\n" * 9,
    "b.txt": "def route(x):\n    return sorted(x)[:2]  # <s> is text\n" * 5,
    "c.txt": "",
    "d.txt": "日本語 и кириллица, naïve café 🙂" * 4,
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write(tmp_path / "texts")


def write(folder: Path, texts: dict[str, str] = TEXTS) -> Path:
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def options(tmp_path: Path) -> tuple[str, ...]:
    """A small capture into `s.zarr`."""
    return (
        *("--local", "--model", "tiny", "--device", "cpu", "--quantization", "none"),
        *("--sequence_length", "32", "--rows_per_shard", "4", "--store", str(tmp_path / "s.zarr")),
    )


def without_times(path: Path) -> dict[str, Any]:
    """Every file of a store; of records and attributes only the parts that are promised to be equal."""
    files: dict[str, Any] = dict(store_files(path))
    for name in files:
        if "/commits/" in name:
            record = json.loads(files[name])
            files[name] = {key: value for key, value in record.items() if key not in ("seconds", "worker")}
        elif name.count("/") == 1 and name.endswith("zarr.json"):
            metadata = json.loads(files[name])
            del metadata["attributes"]["configuration"], metadata["attributes"]["git_commit"]
            files[name] = metadata
    return files


# --- Options of a capture ---------------------------------------------------------------------------------


def test_one_or_several_data_sets_become_groups_of_one_store(
    command: Command, options: tuple[str, ...], tmp_path: Path
) -> None:
    one, two = write(tmp_path / "First Book"), write(tmp_path / "second")
    assert command("--dataset", one, *options).status == 0
    assert store.dataset_names(tmp_path / "s.zarr") == ["first-book"]
    hyphens = [option.replace("_", "-") if option.startswith("--") else option for option in options]
    several = command("--dataset", one, f"--dataset={two}", *hyphens)
    assert several.status == 0, several.err
    assert "first-book: complete" in several.err
    assert store.dataset_names(tmp_path / "s.zarr") == ["first-book", "second"]
    named = command("--dataset", one, "--dataset", two, "--name", "x", "--name", "y", *options)
    assert named.status == 0, named.err
    tree = store.open_tree(tmp_path / "s.zarr")
    assert sorted(tree) == ["first-book", "second", "x", "y"]
    np.testing.assert_array_equal(tree["x"]["expert"], tree["second"]["expert"])
    clash = command("--dataset", one, "--dataset", one, *options)
    assert (clash.status, clash.err.count("\n")) == (2, 1)
    assert "2 data sets would be named 'first-book': give them different names with --name" in clash.err
    unequal = command("--dataset", one, "--dataset", two, "--name", "x", *options)
    assert unequal.status == 2
    assert "--name is given 1 times and --dataset 2 times" in unequal.err


def test_the_defaults_are_mixtral_in_nf4_on_a_gpu_and_unquantized_on_a_cpu() -> None:
    config = parse_capture(["--dataset", "wikitext-103", "--local"])
    assert (config.dataset, config.local, config.quantization, config.bos) == (("wikitext-103",), True, None, "none")
    tiny = tiny_checkpoint()
    assert [default_quantization(tiny, None, device) for device in ("cuda", "cpu")] == ["nf4", "none"]
    assert config.model == MIXTRAL == "mistralai/Mixtral-8x7B-Instruct-v0.1"


def test_a_shard_on_a_cpu_is_so_large_that_a_slow_one_takes_seconds_and_resumes_at_its_size(
    tmp_path: Path, command: Command
) -> None:
    facts = json.loads((tiny_checkpoint() / "config.json").read_text(encoding="utf-8"))
    hidden, inner, heads = facts["hidden_size"], facts["intermediate_size"], facts["num_attention_heads"]
    head = facts.get("head_dim") or hidden // heads
    attention = 2 * hidden * head * (heads + facts["num_key_value_heads"])
    experts = hidden * facts["num_local_experts"] + facts["num_experts_per_tok"] * 3 * hidden * inner
    operations = 2 * facts["num_hidden_layers"] * (attention + experts)
    assert operations_per_token(tiny_checkpoint()) == operations
    text = tmp_path / "text.txt"
    text.write_text("one two three", encoding="utf-8")
    options = ["--local", "--device", "cpu", "--model", "tiny", "--dataset", text, "--store", tmp_path / "s"]
    assert command(*options, "--sequence_length", "64").status == 0
    group = CaptureGroup(tmp_path / "s", "text")
    assert group.layout.rows_per_shard == 2**36 // operations // 64 // 64 * 64  # whole inner chunks
    assert group.identity["quantization"] == "none"
    assert command(*options, "--sequence_length", "64").status == 0


def test_what_print_config_prints_config_takes_and_the_command_line_goes_before_it(
    command: Command, tmp_path: Path
) -> None:
    printed = command(
        "--dataset", "a", "--dataset", "b c", "--local", "--bos", "row", "--batch-tokens", 99, "--print_config"
    )
    assert printed.status == 0
    options = yaml.safe_load(printed.out)
    assert options["dataset"] == ["a", "b c"]
    file = tmp_path / "options.yaml"
    file.write_text(printed.out)
    again = command("--config", file, "--print-config")
    assert again.out == printed.out
    assert parse_capture(["--config", str(file)]) == parse_capture(
        ["--dataset", "a", "--dataset", "b c", "--local", "--bos", "row", "--batch-tokens", "99", "--config", str(file)]
    )
    over = yaml.safe_load(command(f"--config={file}", "--dataset", "z", "--batch_tokens", 7, "--print_config").out)
    assert over == options | {"dataset": ["z"], "batch_tokens": 7}
    assert parse_capture(["--config", str(file), "--no-local"]).local is False
    for text, said in {
        "dataset: [a]\nsequence_lenght: 3\nbatchtokens: 2": "unknown batchtokens, sequence_lenght; known options are",
        "- a": "contains list, but must contain option: value lines",
        "bos: {a: 1}": "bos is {'a': '1'}, but must be one value",
        "a: [": "is not YAML",
    }.items():
        file.write_text(text)
        refused = command("--config", file, "--local")
        assert refused.status == 2, text
        assert f"error: --config {file}" in refused.err
        assert said in refused.err


NOTEBOOK: dict[str, Any] = {
    "model": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "quantization": "fp4",
    "dtype": "float16",
    "quantize_gates": True,
    "bos": "none",
    "dataset": ("Salesforce/wikitext:wikitext-2-raw-v1",),
    "split": "test",
    "limit_documents": 8,
    "limit_tokens": 128,
    "sequence_length": 128,
}


def test_a_preset_is_its_table_and_nothing_else(command: Command, tmp_path: Path) -> None:
    (names,) = (arms for arms in get_args(get_type_hints(CaptureConfig)["preset"]) if arms is not type(None))
    assert set(get_args(names)) == PRESETS.keys()
    assert parse_capture(["--preset", "notebook"]) == CaptureConfig(preset="notebook", **NOTEBOOK)
    printed = command("--preset", "notebook", "--print_config")
    (tmp_path / "notebook.yaml").write_text(printed.out)
    from_file = parse_capture(["--config", str(tmp_path / "notebook.yaml")])
    assert replace(from_file, config=None) == CaptureConfig(**NOTEBOOK), "a file holds what a preset comes to"
    unknown = command("--preset", "paper")
    assert unknown.status == 2
    assert "'notebook'" in unknown.err
    (tmp_path / "preset.yaml").write_text("preset: notebook")
    assert "unknown preset" in command("--config", tmp_path / "preset.yaml").err


def test_whatever_is_given_goes_before_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(*arguments: str) -> CaptureConfig:
        return parse_capture(["--preset", "notebook", *arguments])

    notebook = CaptureConfig(preset="notebook", **NOTEBOOK)
    assert given("--model", "tiny", "--no-quantize-gates", "--limit_tokens", "64") == replace(
        notebook, model="tiny", quantize_gates=False, limit_tokens=64
    )
    assert given("--name", "x", "--split", "train") == replace(notebook, name=("x",), split="train")
    other = replace(notebook, dataset=("demo:prose",), split=None)
    assert given("--dataset", "demo:prose") == given("--dataset=demo:prose") == other, "a split belongs to a data set"
    assert given("--dataset", "demo:prose", "--split", "train") == replace(other, split="train")
    file = tmp_path / "options.yaml"
    file.write_text("dataset: [a, b]\nquantization: nf4\nlimit_documents: null")
    both = replace(notebook, dataset=("a", "b"), split=None, quantization="nf4", config=file)
    assert given("--config", str(file)) == both
    assert given("--config", str(file), "--dataset", "c") == replace(both, dataset=("c",))
    monkeypatch.setenv("EXPERT_ATLAS_STORE", "/elsewhere")
    assert given() == replace(notebook, store="/elsewhere")


def test_what_is_no_capture_is_refused_with_what_to_give(command: Command, texts: Path) -> None:
    assert "give at least one --dataset" in command("--local").err
    for option in ("--sequence_length", "--rows_per_shard", "--batch_tokens", "--limit_documents", "--limit_tokens"):
        refused = command("--dataset", texts, "--local", option, 0)
        assert refused.status == 2
        assert f"{option} is 0, but must be more than 0" in refused.err


# --- Dry run ----------------------------------------------------------------------------------------------


def said(out: str, label: str) -> str:
    found = re.search(rf"│ {label} +│ (.*?) *│", out)
    assert found, out
    return found[1]


def test_a_dry_run_estimates_within_its_spread_and_writes_nothing(
    command: Command, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.capturing import estimate

    random = np.random.default_rng(4)
    words = ["the", "expert", "def", "0x7f3a", "  ", "Καλημέρα", "routing", "\n"]
    many = {
        f"{n:03}.txt": " ".join(random.choice(words, random.integers(1, 90), p=random.dirichlet(np.ones(8))))
        for n in range(200)
    }
    folder = write(tmp_path / "many", many)
    monkeypatch.setattr(estimate, "SAMPLE_DOCUMENTS", 40)
    monkeypatch.setattr(engine, "load_model", None)  # no weights are needed
    dry = command("--dataset", folder, *options, "--dry_run", "--rate", 100)
    assert dry.status == 0, dry.err
    assert not (tmp_path / "s.zarr").exists()
    numbers = re.match(r"([\d,]+) ± ([\d,]+) \(95 %, from 40 documents tokenized\)", said(dry.out, "tokens"))
    assert numbers, dry.out
    tokens, spread = (int(number.replace(",", "")) for number in numbers.groups())
    monkeypatch.undo()
    truth = [len(ids) for ids in load_tokenizer(tiny_checkpoint()).encode_batch(list(many.values()))]
    assert 0 < spread < sum(truth) / 5
    assert abs(tokens - sum(truth)) <= spread
    rows = sum(-(-count // 32) for count in truth)
    assert int(re.findall(r"[\d,]+", said(dry.out, "rows"))[0]) == pytest.approx(rows, rel=0.1)
    assert int(re.findall(r"[\d,]+", said(dry.out, "shards"))[0]) == pytest.approx(rows / 4, rel=0.1)
    assert float(said(dry.out, "filled").split("%")[0]) == pytest.approx(100 * sum(truth) / rows / 32, abs=8)
    assert said(dry.out, "documents") == "200"
    assert str(tmp_path / "s.zarr") in said(dry.out, "store")
    assert "bytes of weights on cpu" in said(dry.out, "device memory")
    assert "bytes" in said(dry.out, "host memory")
    assert said(dry.out, "time") == f"{round(tokens / 100) // 60} min {round(tokens / 100) % 60} s"


def test_a_dry_run_of_every_document_is_exact_and_warns_of_empty_rows(
    command: Command, options: tuple[str, ...], texts: Path
) -> None:
    dry = command("--dataset", texts, *options, "--sequence_length", 1024, "--dry_run")
    count = sum(len(ids) for ids in load_tokenizer(tiny_checkpoint()).encode_batch(list(TEXTS.values())))
    assert said(dry.out, "tokens") == f"{count:,} ± 0 (95 %, from 4 documents tokenized)"
    assert said(dry.out, "time") == "unknown (use --rate TOKENS_PER_SECOND)"
    assert "rows are mostly empty" in dry.out


def test_a_dry_run_counts_no_more_tokens_of_a_document_than_are_captured(
    command: Command, options: tuple[str, ...], texts: Path
) -> None:
    dry = command("--dataset", texts, *options, "--limit_tokens", 40, "--dry_run")
    counts = [min(40, len(ids)) for ids in load_tokenizer(tiny_checkpoint()).encode_batch(list(TEXTS.values()))]
    assert said(dry.out, "tokens") == f"{sum(counts):,} ± 0 (95 %, from 4 documents tokenized)"
    assert said(dry.out, "rows") == f"about {sum(-(-count // 32) for count in counts)} of 32 positions"


# --- Captures that are repeated or changed ----------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_capture_holds_the_text_and_the_same_command_again_does_nothing(
    command: Command, options: tuple[str, ...], texts: Path, tmp_path: Path, quantization: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    arguments = ("--dataset", texts, *options, "--quantization", quantization)
    assert command(*arguments).status == 0
    data = store.open_capture(tmp_path / "s.zarr", "texts").load()
    ids = load_tokenizer(tiny_checkpoint()).encode_batch(list(TEXTS.values()))
    assert data["name"].values.tolist() == list(TEXTS)
    for document, (wanted, text) in enumerate(zip(ids, TEXTS.values(), strict=True)):
        rows = np.flatnonzero(data["document_id"].values == document)
        parts = [data["token"].values[row, : data["length"].values[row]] for row in rows]
        assert np.concatenate([*parts, []]).tolist() == wanted.tolist()
        assert data["offset"].values[rows].tolist() == list(range(0, len(wanted), 32))
        pieces = "".join(data["piece"].values[wanted]).replace("▁", " ")
        raw = re.sub(r"<0x(..)>", lambda byte: chr(int(byte[1], 16)), pieces).removeprefix(" ")
        spelled = b"".join(c.encode("latin-1") if ord(c) < 256 and c not in text else c.encode() for c in raw)
        assert spelled.decode() == text
    before = store_files(tmp_path / "s.zarr")
    monkeypatch.setattr(engine, "load_model", None)
    again = command(*arguments)
    assert again.status == 0, again.err
    assert "nothing to do" in again.err
    assert store_files(tmp_path / "s.zarr") == before


def test_of_each_document_only_the_first_tokens_are_captured_and_the_rest_is_no_row(
    command: Command, options: tuple[str, ...], texts: Path, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "What routes tokens? " * 9}, {"role": "assistant", "content": "A gate."}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    arguments = ("--dataset", texts, "--dataset", tmp_path / "chat.jsonl", *options)
    assert command(*arguments).status == 0
    limited = command(*arguments, "--name", "few", "--name", "chat-few", "--limit_tokens", 40)
    assert limited.status == 0, limited.err
    for whole, few in (("texts", "few"), ("chat", "chat-few")):
        all_of_it, first = (store.open_capture(tmp_path / "s.zarr", name).load() for name in (whole, few))
        kept = all_of_it["offset"].values < 40
        for name in ("document_id", "offset", "name"):
            np.testing.assert_array_equal(first[name], all_of_it[name].values[kept if name != "name" else ...])
        inside = np.arange(32) + all_of_it["offset"].values[kept, None] < 40
        for name in ("token", "expert", "role") if whole == "chat" else ("token", "expert"):
            fill = {"token": -1}.get(name, 255)
            wanted = all_of_it[name].values[kept]
            shape = inside.reshape(inside.shape + (1,) * (wanted.ndim - 2))
            np.testing.assert_array_equal(first[name], np.where(shape, wanted, fill))
        assert first.attrs["tokens"] == int(first["length"].sum()) < all_of_it.attrs["tokens"]
        assert first.attrs["window_rule"].endswith("of each document its first 40 tokens only")


def test_two_runs_in_different_folders_give_equal_bytes(
    command: Command, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("here", "there/deeper"):
        write(tmp_path / place / "texts")
        monkeypatch.chdir(tmp_path / place)
        assert command("--dataset", "texts", *options, "--store", "s.zarr").status == 0
    here, there = (without_times(tmp_path / place / "s.zarr") for place in ("here", "there/deeper"))
    assert here == there
    assert len([name for name in here if "/commits/" in name]) >= 3


REFUSED = (
    (("--sequence_length", "16"), "sequence_length", "32", "16"),
    (("--limit_documents", "2"), "limit_documents", "None", "2"),
    (("--limit_tokens", "9"), "limit_tokens", "None", "9"),
    (("--quantization", "nf4"), "quantization", "'none'", "'nf4'"),
    (("--quantization", "fp8", "--matmul", "fp8"), "matmul", "'bf16'", "'fp8'"),
    (("--batch_tokens", "64"), "batch_tokens", "8192", "64"),
    (("--bos", "row"), "bos", "'none'", "'row'"),
    (("--rows_per_shard", "8"), "rows_per_shard", "4", "8"),
)
"""Options of another capture, and the field with both values."""


def test_another_capture_of_the_same_name_is_refused_with_field_and_both_values(
    command: Command, options: tuple[str, ...], texts: Path, tmp_path: Path
) -> None:
    assert command("--dataset", texts, *options).status == 0
    before = store_files(tmp_path / "s.zarr")
    for change, field, stored, wanted in REFUSED:
        refused = command("--dataset", texts, *options, *change)
        assert refused.status == 2, change
        assert f"{tmp_path}/s.zarr/texts holds another capture" in refused.err, change
        assert f"  {field}: the store has {stored}, this run has {wanted}\n" in refused.err
        assert "--name" in refused.err
        assert ("cannot grow" in refused.err) == (field == "limit_documents")
        assert store_files(tmp_path / "s.zarr") == before, change


def test_a_changed_text_and_another_environment_are_refused_the_latter_unless_allowed(
    command: Command, options: tuple[str, ...], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("--dataset", texts, *options).status == 0
    (texts / "a.txt").write_text(TEXTS["a.txt"] + "!")
    refused = command("--dataset", texts, *options)
    assert refused.status == 2
    assert re.search(r"text_sha256: the store has '\w{64}', this run has '\w{64}'", refused.err)
    (texts / "a.txt").write_text(TEXTS["a.txt"])
    store.CaptureGroup(tmp_path / "s.zarr", "texts").discard(1)
    real = environment.version
    monkeypatch.setattr(environment, "version", lambda name: "9.9" if name == "torch" else real(name))
    refused = command("--dataset", texts, *options)
    assert refused.status == 2
    assert f"torch: the store has {real('torch')!r}, this run has '9.9'" in refused.err
    assert "--allow_mixed" in refused.err
    assert command("--dataset", texts, *options, "--allow_mixed").status == 0
    record = json.loads((tmp_path / "s.zarr/texts/expert/commits/1.json").read_text())
    assert record["versions"]["torch"] == "9.9", "a commit says with what it was made"


def test_a_second_job_is_told_who_holds_the_group(
    command: Command, options: tuple[str, ...], texts: Path, tmp_path: Path
) -> None:
    assert command("--dataset", texts, *options).status == 0
    with lease(store.CaptureGroup(tmp_path / "s.zarr", "texts")):
        second = command("--dataset", texts, *options)
    assert (second.status, second.err.count("\n")) == (1, 1)
    assert re.search(r"s\.zarr/texts is being captured by process \d+ of \S+ on \S+ since 20", second.err)


def test_status_tells_complete_from_incomplete_also_while_a_job_runs(
    command: Command, options: tuple[str, ...], texts: Path, tmp_path: Path
) -> None:
    path = tmp_path / "s.zarr"
    assert command("--dataset", texts, *options).status == 0
    done = command(path, main=status.main)
    state = store.coverage(path, "texts")
    assert done.status == 0
    row = next(line for line in done.out.splitlines() if "texts" in line)
    cells = re.split(" {2,}", row)
    total = state.shards_total
    assert total >= 3
    wanted = ["texts", f"{total}/{total}", "0", "4", f"{state.tokens_done:,}", "100.0%", f"{state.bytes_done:,}"]
    assert cells[:7] == wanted
    group = store.CaptureGroup(path, "texts")
    group.discard(1)
    with lease(group):
        missing = command(path, main=status.main)
    assert missing.status == 1
    assert f"texts: {total - 1} of {total} shards are committed; missing shards: 1\n" in missing.out
    assert command(f"{path}/texts", main=status.main).status == 1
    assert command(tmp_path / "nothing.zarr", main=status.main).status == 2
    assert command(f"{path}/other", main=status.main).status == 2


@pytest.mark.parametrize("bos", ["none", "document", "row"])
def test_a_bos_stands_where_it_was_asked_for_and_offsets_count_document_tokens(
    command: Command, options: tuple[str, ...], texts: Path, tmp_path: Path, bos: str
) -> None:
    assert command("--dataset", texts, *options, "--bos", bos).status == 0
    data = store.open_capture(tmp_path / "s.zarr", "texts").load()
    first = data["offset"].values == 0
    has_bos = data["token"].values[:, 0] == 1
    assert has_bos.tolist() == {"none": first & False, "document": first, "row": first | True}[bos].tolist()
    assert not (data["token"].values[:, 1:] == 1).any()
    assert data.attrs["bos"] == bos
    assert 1 in data.attrs["special_token_ids"]
    for document in set(data["document_id"].values.tolist()):
        rows = data["document_id"].values == document
        text_tokens = (data["length"].values - has_bos)[rows]
        assert data["offset"].values[rows].tolist() == np.cumsum([0, *text_tokens[:-1]]).tolist()


def test_conversations_have_a_role_for_every_token(command: Command, options: tuple[str, ...], tmp_path: Path) -> None:
    lines = [
        [{"role": "user", "content": "What routes tokens?"}, {"role": "assistant", "content": "A gate. " * 20}],
        [{"role": "user", "content": "Why?"}],
    ]
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in lines))
    ran = command("--dataset", file, *options)
    assert ran.status == 0, ran.err
    data = store.open_capture(tmp_path / "s.zarr", "talk").load()
    assert (data["role"].dims, data["role"].dtype) == (("doc", "position"), np.uint8)
    assert data["role"].attrs["flag_meanings"] == "system user assistant tool template"
    filled = np.arange(32) < data["length"].values[:, None]
    assert (data["role"].values[~filled] == 255).all()
    speaker = {1: "", 2: ""}
    for token, role in zip(data["token"].values[filled], data["role"].values[filled], strict=True):
        if role in speaker:
            speaker[role] += str(data["piece"].values[token])
    assert speaker[1].replace("▁", "") == "Whatroutestokens?Why?"
    assert speaker[2].replace("▁", " ").strip() == ("A gate. " * 20).strip()
    refused = command("--dataset", file, *options, "--bos", "row", "--name", "other")
    assert refused.status == 2
    assert "--bos row: the chat template determines how conversations begin" in refused.err


IDENTITY = {
    *("model", "model_revision", "quantization", "compute_dtype", "gate_precision", "expert_backend", "attention"),
    *("tokenizer", "text_sha256", "text_split", "text_field", "sequence_length", "rows_per_shard", "bos"),
    *("batch_tokens", "limit_documents", "limit_tokens", "schema_version", "layers", "num_experts"),
    "experts_per_token",
}
PROVENANCE = {
    *("schema_version", "identity", "model", "quantization", "sequence_length", "rows_per_shard", "window_rule"),
    *("special_token_ids", "environment", "git_commit", "configuration", "layers", "num_experts"),
    *("documents", "documents_empty", "documents_repaired", "pairs_cut", "tokens", "convention"),
}


def test_the_provenance_is_complete_and_holds_no_secret(
    command: Command, options: tuple[str, ...], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert command("--dataset", texts, *options).status == 0
    group = store.CaptureGroup(tmp_path / "s.zarr", "texts")
    attrs = group.attrs
    assert attrs.keys() >= PROVENANCE
    assert attrs["identity"].keys() >= IDENTITY
    told = {name for name in attrs["identity"] if not name.startswith("text_")}
    assert told <= {*MODEL, *TEXT}, "a new field decides the model's choices, or the text: say which"
    versions = {"torch", "transformers", "bitsandbytes", "zarr", "python"}
    assert attrs["environment"].keys() >= versions, "of the planner"
    assert group.environment is not None
    assert group.environment.keys() >= {*versions, "device"}, "of the workers"
    assert store.attributes(store.open_capture(tmp_path / "s.zarr", "texts"))["environment"] == group.environment
    assert (attrs["documents"], attrs["documents_empty"], attrs["documents_repaired"]) == (4, 1, 0)
    assert attrs["configuration"]["dataset"] == [str(texts)]
    record = json.loads((tmp_path / "s.zarr/texts/expert/commits/0.json").read_text())
    assert record.keys() >= {"identity", "tokens", "token_crc32c", "expert", "weight", "seconds", "worker", "versions"}
    assert not [name for name, data in store_files(tmp_path / "s.zarr").items() if TOKEN.encode() in data]


# --- Hub --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_model_and_data_set_come_from_a_hub_with_the_token_of_a_env_file_and_again_offline(tmp_path: Path) -> None:
    model = {file.name: file.read_bytes() for file in tiny_checkpoint().iterdir()}
    data = {"data.jsonl": b'{"text": "one two three"}\n{"text": "four five"}\n'}
    work = tmp_path / "work"
    work.mkdir()
    script = [sys.executable, "-W", "error", str(ROOT / "jobs" / "capture.py")]
    command = [*script, "--local", "--model", "org/tiny", "--dataset", "org/words", "--device", "cpu"]
    command += ["--quantization", "none", "--store", "s.zarr"]

    def run(environment: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], env=environment, cwd=work, capture_output=True, text=True, timeout=HUNG_S
        )

    names = ("org/tiny", "datasets/org/words")
    with FakeHub({"org/tiny": model, "datasets/org/words": data}, private=names) as hub:
        environment = hub.environment(tmp_path / "home")
        refused = run(environment)
        assert refused.returncode == 2, refused.stderr
        assert "HF_TOKEN" in refused.stderr
        (work / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
        online = run(environment)
        assert online.returncode == 0, online.stderr
    identity = store.CaptureGroup(work / "s.zarr", "words").identity
    assert (identity["model"], identity["model_revision"]) == ("org/tiny", COMMIT)
    assert (identity["text_data"], identity["text_revision"]) == ("org/words", COMMIT)
    offline = run(environment | {"HF_HUB_OFFLINE": "1"}, "--revision", COMMIT, "--name", "again")
    assert offline.returncode == 0, offline.stderr
    tree = store.open_tree(work / "s.zarr")
    np.testing.assert_array_equal(tree["words"]["expert"], tree["again"]["expert"])
    assert not [name for name, content in store_files(work / "s.zarr").items() if TOKEN.encode() in content]


WIKITEXT_ROWS = ["", " = Robert = \n", "", " words " * 200, " one two \n", "", " = = Career = = \n", "", " ninth \n"]
WIKITEXT_CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
---
"""


def test_the_notebooks_rows_are_the_hubs_first_ones_cut_at_128_tokens(tmp_path: Path) -> None:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": WIKITEXT_ROWS}), stream)
    files = {"README.md": WIKITEXT_CARD.encode(), "wikitext-2-raw-v1/test-0.parquet": stream.getvalue()}
    command = [sys.executable, "-W", "error", str(ROOT / "jobs" / "capture.py"), "--preset", "notebook"]
    command += ["--local", "--model", "tiny", "--device", "cpu", "--store", str(tmp_path / "s.zarr")]
    with FakeHub({"datasets/Salesforce/wikitext": files}) as hub:
        ran = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, timeout=HUNG_S)
    assert ran.returncode == 0, ran.stderr
    assert "8 documents, 4 of them empty, 4 rows" in ran.stderr
    data = store.open_capture(tmp_path / "s.zarr", "wikitext-wikitext-2-raw-v1").load()
    ids = load_tokenizer(tiny_checkpoint()).encode_batch(WIKITEXT_ROWS[:8])
    assert data["name"].values.tolist() == [f"test:{row}" for row in range(1, 9)]
    assert data["document_id"].values.tolist() == [1, 3, 4, 6]
    assert data.sizes["position"] == 128 < len(ids[3])
    for row, document in enumerate(data["document_id"].values.tolist()):
        assert data["token"].values[row, : data["length"].values[row]].tolist() == ids[document][:128].tolist()
    identity = store.attributes(data)["identity"]
    wanted = {"quantization": "fp4", "compute_dtype": "float16", "gate_precision": "fp4", "bos": "none"}
    wanted |= {"text_split": "test", "text_document": "row", "limit_documents": 8, "limit_tokens": 128}
    assert identity.items() >= wanted.items()


# --- Faults that a review found -------------------------------------------------------------------------------------


def test_conversations_that_begin_with_a_null_keep_their_roles(
    command: Command, tmp_path: Path, options: tuple[str, ...]
) -> None:
    lines = [{"messages": None}, {"messages": [{"role": "user", "content": "hello"}]}]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert command("--dataset", tmp_path / "chat.jsonl", *options).status == 0
    data = store.open_capture(tmp_path / "s.zarr", "chat")
    assert "role" in data
    assert store.attributes(data)["identity"]["chat_template"]
    assert data.attrs["documents_empty"] == 1


def test_of_a_dotenv_file_only_the_token_is_taken(
    command: Command, texts: Path, tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text("HF_TOKEN=from-the-file\nHF_ENDPOINT=http://127.0.0.1:9\n")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for name in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert command("--dataset", texts, *options).status == 0
    assert os.environ.pop("HF_TOKEN") == "from-the-file"
    assert "HF_ENDPOINT" not in os.environ


def test_another_bos_token_is_another_capture(
    command: Command, texts: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    copies = [tmp_path / "one" / "model", tmp_path / "two" / "model"]
    for folder in copies:
        folder.parent.mkdir()
        subprocess.run(["cp", "-r", tiny_checkpoint(), folder], check=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):  # the second one takes precedence over the first
        settings = json.loads((copies[1] / name).read_text())
        (copies[1] / name).write_text(json.dumps(settings | {"bos_token": "</s>"}))
    assert command("--dataset", texts, *options, "--model", copies[0], "--bos", "row").status == 0
    refused = command("--dataset", texts, *options, "--model", copies[1], "--bos", "row")
    assert refused.status == 2
    assert "bos_id: the store has 1, this run has 2" in refused.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("limit_documents: [1, 2]", "limit_documents is ['1', '2'], but must be one value"),
        ("dataset: a\ndataset: b", "gives dataset more than once"),
        ("limit-documents: 1\nlimit_documents: 2", "gives limit_documents more than once"),
        ('local: "no"', "local is 'no', but must be true or false"),
        ("store: {a: b}", "but must be one value"),
    ],
)
def test_a_config_file_that_says_two_things_is_refused(command: Command, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    refused = command("--config", tmp_path / "c.yaml", "--print_config")
    assert refused.status == 2
    assert said in refused.err


def test_a_commit_of_digits_in_a_config_file_stays_what_it_is(command: Command, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("revision: 0123456\nlocal: true\nsplit: null\ndataset: [a, b]")
    printed = yaml.safe_load(command("--config", tmp_path / "c.yaml", "--print_config").out)
    assert (printed["revision"], printed["local"], printed["split"]) == ("0123456", True, None)
    assert printed["dataset"] == ["a", "b"]


@pytest.mark.parametrize("name", ["zarr.json", "__x"])
def test_a_name_that_zarr_needs_is_refused(
    command: Command, texts: Path, tmp_path: Path, options: tuple[str, ...], name: str
) -> None:
    refused = command("--dataset", texts, *options, "--name", name)
    assert refused.status == 2
    assert "is not a valid name of a data set" in refused.err
    assert not (tmp_path / "s.zarr").exists()


def test_a_folder_of_other_things_is_no_place_for_a_store(
    command: Command, texts: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    refused = command("--dataset", texts, *options[:-2], "--store", texts)
    assert refused.status == 2
    assert "is not a store and contains" in refused.err
    empty = command("--dataset", texts, *options[:-2], "--store", "")
    assert empty.status == 2
    assert "--store is empty" in empty.err


def test_files_that_were_left_out_are_told(
    command: Command, texts: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    (texts / ".hidden.txt").write_text("not read")
    assert "left out" in command("--dataset", texts, *options).err


def test_one_bad_group_does_not_hide_the_others(
    command: Command, texts: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert command("--dataset", texts, *options, "--name", "good").status == 0
    (tmp_path / "s.zarr" / "bad").mkdir()
    (tmp_path / "s.zarr" / "bad" / "zarr.json").write_text('{"attributes": {"schema_version": 0}}')
    ran = command(tmp_path / "s.zarr", main=status.main)
    assert ran.status == 1
    assert "good" in ran.out
    assert "schema_version is 0" in ran.err


def test_brackets_in_a_path_are_no_markup(
    command: Command, texts: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    ran = command("--dataset", texts, *options[:-2], "--store", tmp_path / "a [/c]" / "s.zarr", "--dry_run")
    assert ran.status == 0
    assert "a [/c]" in ran.out


def test_going_on_tokenizes_nothing_again_not_even_for_the_default_length(
    command: Command, texts: Path, tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--dataset", texts, *options[:7], "--store", tmp_path / "s.zarr")
    assert command(*asked).status == 0
    length = store.open_capture(tmp_path / "s.zarr", "texts").attrs["sequence_length"]
    assert length not in (32, 2048)
    monkeypatch.setattr(TextTokenizer, "encode_batch", lambda *_: pytest.fail("tokenized again"))
    again = command(*asked)
    assert (again.status, "nothing to do" in again.err) == (0, True)
    refused = command(*asked, "--sequence_length", "32")
    assert refused.status == 2
    assert f"sequence_length: the store has {length}, this run has 32" in refused.err


def test_a_length_that_was_asked_for_is_not_taken_for_the_default(
    command: Command, texts: Path, options: tuple[str, ...]
) -> None:
    assert command("--dataset", texts, *options).status == 0
    without = [option for option in options if option not in ("--sequence_length", "32")]
    refused = command("--dataset", texts, *without)
    assert refused.status == 2
    assert "sequence_length: the store has 32" in refused.err


def test_fp8_products_are_told_before_and_after_and_two_runs_of_them_are_equal_to_the_byte(
    command: Command, options: tuple[str, ...], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = (*options, "--quantization", "nf4", "--matmul", "fp8")
    dry = command("--dataset", texts, *how, "--dry_run")
    assert said(dry.out, "precision") == "weights in nf4, their products in fp8"
    for store_path in ("one.zarr", "two.zarr"):
        assert command("--dataset", texts, *how, "--store", tmp_path / store_path).status == 0
    assert without_times(tmp_path / "one.zarr") == without_times(tmp_path / "two.zarr")
    group = store.CaptureGroup(tmp_path / "one.zarr", "texts")
    assert (group.identity["matmul"], group.attrs["matmul"]) == ("fp8", "fp8")
    assert "nf4, fp8 products" in command(tmp_path / "one.zarr", main=status.main).out
    told = json.loads(command(tmp_path / "one.zarr", "--json", main=status.main).out)["data_sets"][0]
    assert (told["quantization"], told["matmul"]) == ("nf4", "fp8")
    assert "--matmul fp8" in str(reproducing(group.attrs))
    refused = command("--dataset", texts, *options, "--quantization", "none", "--matmul", "fp8")
    assert refused.status == 2
    assert "fp8 products are for weights in nf4, fp4 or fp8, but quantization is 'none'" in refused.err
