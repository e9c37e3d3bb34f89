"""`jobs/importance.py` from text to effects: killed and resumed, rejected, reported, and read by others."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from test_capture import said, without_times, write

import store
from analysis import importance
from analysis.charts import files
from analysis.report.command import command as reproducing
from jobs import importance as job
from jobs.capturing.importance_options import parse_importance
from jobs.capturing.importance_run import ImportanceRun
from jobs.sources.documents import Document, Source
from jobs.sources.sampled import sampled
from store.lease import lease
from workers.importance import ImportanceEngine

Command = Callable[..., Any]
TEXTS = {
    f"{number}.txt": f"In the year {number} the river rose {'and the road was lost ' * (1 + number % 3)}again."
    for number in range(7)
}
GROUP = "texts-importance"


@pytest.fixture
def base(tmp_path: Path) -> tuple[Any, ...]:
    """The last layer, on a few texts, in two shards."""
    return (
        *("--dataset", write(tmp_path / "texts", TEXTS), "--local", "--model", "tiny", "--device", "cpu"),
        *("--layers", "7", "--rows_per_shard", "4", "--limit_tokens", "16"),
        *("--store", tmp_path / "s.zarr", "--output", tmp_path / "i.zarr"),
    )


@pytest.fixture
def run(command: Command) -> Command:
    return lambda *arguments: command(*arguments, main=job.main)


def test_a_job_that_is_killed_resumes_and_tells_what_an_undisturbed_one_does(
    run: Command, command: Command, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FORMS", {"svg": files.FORMS["svg"]})
    quiet = (*base, "--store", tmp_path / "quiet.zarr", "--output", tmp_path / "quiet_i.zarr")
    whole = run(*quiet, "--figures", tmp_path / "figures", "--write_mask", tmp_path / "mask.json", "--least", "2")
    assert whole.status == 0, whole.err
    start, calls = ImportanceEngine.start, list[int]()

    def counted(engine: ImportanceEngine, *arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return start(engine, *arguments)

    monkeypatch.setattr(ImportanceEngine, "start", counted)
    ended = run(*base)
    assert (ended.status, "finished work is kept" in ended.err) == (130, True)
    assert not (tmp_path / "i.zarr").exists()
    state = store.coverage(tmp_path / "s.zarr", GROUP)
    assert (state.shards_done, state.shards_total) == (1, 2)
    again = run(*base)
    assert (again.status, len(calls)) == (0, 3), "a micro-batch a shard, and none is done again"
    assert without_times(tmp_path / "s.zarr") == without_times(tmp_path / "quiet.zarr")
    assert again.out == whole.out
    third = run(*base, "--json")
    assert "nothing to do" in third.err
    assert len(calls) == 3

    wanted = importance(store.open_capture(tmp_path / "s.zarr", GROUP))
    with xr.open_zarr(tmp_path / "i.zarr", consolidated=False, chunks=None) as stored:
        for name in ("effect", "effect_low", "p", "q", "share", "within_layers"):
            np.testing.assert_array_equal(stored[name].sel(data_set=GROUP), wanted[name])
        assert stored["layer"].values.tolist() == [7]
        assert (stored["documents"].item(), stored.attrs["model"]) == (7, "tiny-mixtral")
    told = json.loads(third.out)
    [rows] = [each["experts"] for each in told["data_sets"].values()]
    assert [row["effect"] for row in rows] == pytest.approx(wanted["effect"].values.ravel().tolist())
    assert told["layers"] == [7]
    assert len(list((tmp_path / "figures").iterdir())) == 1
    worst = min(rows, key=lambda row: row["effect"])
    assert f"{worst['layer']}  {worst['expert']:>6}  {worst['effect']:+.4f}" in " ".join(whole.out.split("\n"))

    least = np.argsort(-wanted["effect"].values[0], kind="stable")[:2].tolist()
    assert json.loads((tmp_path / "mask.json").read_text()) == {"7": least}
    capture = ("--local", "--model", "tiny", "--device", "cpu", "--dataset", tmp_path / "texts", "--name", "masked")
    masked = command(*capture, "--store", tmp_path / "s.zarr", "--mask_file", tmp_path / "mask.json")
    assert masked.status == 0, masked.err
    found = store.open_capture(tmp_path / "s.zarr", "masked").load()
    assert not np.isin(found["expert"].values[found["token"].values >= 0][:, 7], least).any()
    again = str(reproducing(store.CaptureGroup(tmp_path / "s.zarr", GROUP).attrs))
    assert again.startswith("python jobs/importance.py ")
    assert parse_importance(again.split()[2:]).layers == ("7",)


def test_an_assignment_travels_to_other_machines(base: Any) -> None:
    run = ImportanceRun(parse_importance([*map(str, base)]))
    there = pickle.loads(pickle.dumps(run.assignment({})))
    engine = there.make_engine()
    assert isinstance(engine, ImportanceEngine)
    assert (engine.measured, engine.description["effect_layers"], there.batch_tokens) == ((7,), [7], 8192)


def test_what_cannot_be_done_is_refused_before_weights_are_loaded(
    run: Command, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.engine.load_model", None)
    (tmp_path / "other").mkdir()
    for wrong, why in (
        (("--layers", "9"), "there is no layer 9; the layers with experts are 0 to 7"),
        (("--output", tmp_path / "other"), "exists and is not a result of this job"),
        (("--output", tmp_path / "s.zarr"), "neither may be inside the other; use another folder"),
        (("--output", tmp_path), "neither may be inside the other; use another folder"),
        (("--output", tmp_path / "s.zarr" / "i"), "neither may be inside the other; use another folder"),
        (("--output", "s3://bucket/i.zarr"), "s3:/bucket/i.zarr: must be"),
        (("--write_mask", tmp_path / "m.json", "--least", "7"), "would leave 1 of 8 experts of each layer"),
        (("--model", "tinny"), "tinny"),
        (("--sample_tokens", "0"), "--sample_tokens is 0"),
        (("--mask", "7:1"), "--mask"),
    ):
        ran = run(*base, *wrong)
        assert (ran.status, why in ran.err + ran.out) == (2, True), ran.err
    dry = run(*base, "--dry_run")
    assert dry.status == 0, dry.err
    assert "effect" in said(dry.out, "recorded")
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "other"}


def test_a_text_without_a_prediction_is_told_by_name(run: Command, base: Any, tmp_path: Path) -> None:
    empty = ("--dataset", write(tmp_path / "empty", {"0.txt": ""}), "--output", tmp_path / "e.zarr")
    ran = run(*base, *empty)
    assert (ran.status, "empty-importance: no effect of an expert was measured" in ran.err) == (2, True), ran.err
    assert not (tmp_path / "e.zarr").exists()


def test_another_sample_and_another_job_at_the_same_time_are_refused(
    run: Command, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = store.CaptureGroup(tmp_path / "s.zarr", GROUP)
    with lease(group):
        held = run(*base)
    assert (held.status, "is being captured by process" in held.err) == (1, True)
    monkeypatch.setattr(ImportanceEngine, "start", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(*base).status == 130
    other = run(*base, "--seed", "3", "--layers", "5")
    assert other.status == 2
    assert "  effect_layers: the store has [7], this run has [5, 7]\n" in other.err
    assert "  text_seed: the store has 0, this run has 3\n" in other.err


def test_a_sample_is_of_whole_documents_in_their_order_and_the_same_for_a_seed() -> None:
    sizes = np.random.default_rng(0).integers(1, 200, 60).tolist()
    documents = [Document(name=str(number), text="x" * size) for number, size in enumerate(sizes)]
    source = Source(name="s", read=lambda start: iter(documents[start:]), identify=lambda: {"sha256": "a"})

    def names(tokens: int, seed: int, limit: int | None = None) -> list[int]:
        tokens_of = lambda document: min(len(document.text), limit or 10**9)
        return [int(each.name) for each in sampled(source, tokens, seed, tokens_of, limit).documents()]

    found = names(1000, 1)
    assert found == sorted(found) == names(1000, 1)
    assert found != names(1000, 2)
    assert 1000 <= sum(sizes[number] for number in found) < 1000 + 200
    limited = names(1000, 1, 20)
    assert 1000 <= sum(min(20, sizes[number]) for number in limited) < 1020
    assert len(limited) > len(found)
    assert names(10**6, 1) == list(range(60))
    part = sampled(source, 1000, 1, lambda document: len(document.text))
    assert [each.name for each in part.documents(3)] == [str(number) for number in found[3:]]
    assert part.identity == {"sha256": "a", "sample_tokens": 1000, "seed": 1}
    often = np.mean([np.isin(range(60), names(1000, seed)) for seed in range(200)], axis=0)
    assert often.min() > 0.05
    assert often.max() < 0.45
