"""The command that asks a store one question: its answers compared with a scan, and its messages when it cannot
answer."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Ran
from fake_model import BOS_ID, fake_capture, fake_layout, word_id, words
from recording_model import recorded_capture
from rich.console import Console
from synthetic import HOSTILE, make_capture

from analysis import logprob_by_expert, router_distribution, saliency
from analysis.exports.parquet import SCHEMAS
from analysis.metrics.paths import document_path
from analysis.metrics.tokens import TokenCounts, expert_tokens, token_experts
from analysis.scanning import scan
from jobs import query
from jobs.console import kept_answers
from jobs.console import tables as screen
from jobs.console.asked_token import asked_token
from jobs.console.query_rows import document_answer, expert_color
from jobs.console.terminal import shown
from store import CaptureGroup, open_capture

ROOT = Path(__file__).parents[2]
TEXTS = [words(40, 0), words(30, 1), "", words(20, 2)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets a, of ten shards with BOS, and b, and one with more recordings. Tests must not change it."""
    path = tmp_path_factory.mktemp("query") / "s.zarr"
    fake_capture(path, TEXTS, "a", bos="row")
    fake_capture(path, TEXTS[:1], "b")
    beside = path.with_name("r.zarr")
    recorded_capture(beside, "recorded", [words(30, number) for number in range(12)], layers=(1, 4))
    recorded_capture(beside, "top", TEXTS, top=4)
    return path


@pytest.fixture
def ask(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `jobs/query.py` like its script, but in this process."""

    def run(*arguments: object, place: str = "s.zarr/a") -> Ran:
        monkeypatch.chdir(store.parent)
        monkeypatch.setattr(sys, "argv", ["query", place, *map(str, arguments)])
        monkeypatch.setattr("jobs.console.terminal.catch_sigterm", lambda: None)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            query.run_job(query.main)
        captured = capsys.readouterr()
        return Ran(status=int(ended.value.code or 0), out=captured.out, err=captured.err)

    return run


def cells(out: str) -> list[list[str]]:
    """The rows of all tables that were printed."""
    return [re.split(" {2,}", line.strip()) for line in out.splitlines() if re.match(r" *\d+  ", line)]


# --- Answers ------------------------------------------------------------------------------------------------------


def test_a_token_s_experts_are_those_of_a_scan(store: Path, ask: Callable[..., Ran]) -> None:
    token = word_id(TEXTS[0].split()[0])
    table = token_experts(open_capture(store, "a")).sel(token_id=token)
    for named in (["--token", f"▁{token}"], ["--token_id", token]):
        for layers in ([0, 1, 2], [2], [2, 0]):
            options = [] if len(layers) == 3 else [word for layer in layers for word in ("--layer", layer)]
            done = ask(*named, *options)
            assert (done.status, done.err) == (0, "")
            assert f"▁{token} (id {token}) in a: {int(table['tokens'])} occurrences" in done.out
            wanted = []
            for layer in layers:
                at = table.sel(layer=layer)
                for expert in sorted(range(8), key=lambda e: (-int(at["counts"][e]), e)):
                    if int(at["counts"][expert]):
                        share, lift = float(at["share"][expert]), float(at["lift"][expert])
                        count = int(at["counts"][expert])
                        wanted.append([f"{layer}", f"{expert}", f"{count}", f"{share:.4f}", f"{lift:.2f}"])
            assert cells(done.out) == wanted


def test_a_token_that_does_not_occur_is_an_answer(ask: Callable[..., Ran]) -> None:
    absent = next(number for number in range(2, 1000) if number not in {word_id(w) for w in " ".join(TEXTS).split()})
    done = ask("--token_id", absent)
    assert (done.status, cells(done.out)) == (0, [])
    assert ": 0 occurrences" in done.out


def test_a_class_of_tokens_goes_where_its_tokens_go(store: Path, ask: Callable[..., Ran]) -> None:
    capture = open_capture(store, "a").load()
    counts = capture["token"].where(~capture["token"].isin([-1, BOS_ID]))
    inside = counts.astype("U8").str.startswith("1") & counts.notnull()
    found = json.loads(ask("--tokens", "/^ 1/", "--layer", 2, "--json").out)["answers"][0]
    assert (found["class"], found["tokens"]) == ("/^ 1/", int(inside.sum()))
    assert found["most_frequent"][0]["piece"].startswith("▁1")
    of_class, of_all = (
        [int(((capture["expert"].sel(layer=2) == e).any("k") & where).sum()) for e in range(8)]
        for where in (inside, counts.notnull())
    )
    assert {row["expert"]: row["count"] for row in found["rows"]} == {e: n for e, n in enumerate(of_class) if n}
    for row in found["rows"]:
        assert row["share"] == pytest.approx(row["count"] / int(inside.sum()))
        assert row["lift"] == pytest.approx(row["share"] * int(counts.notnull().sum()) / of_all[row["expert"]])
    told = ask("--tokens", "/^ 1/", "--layer", 2).out
    assert [line[2] for line in cells(told)] == [str(row["count"]) for row in found["rows"]]
    assert "of equal length, and at least 4 are needed" in told
    every = ask("--tokens", "digits", "--layer", 0).out
    assert {line[4] for line in cells(every)} == {"1.00"}, "all pieces are numbers"


def test_a_class_without_tokens_is_an_answer_and_no_class_an_error(ask: Callable[..., Ran]) -> None:
    none = ask("--tokens", "han")
    assert (none.status, cells(none.out)) == (0, [])
    assert "han (letters of the script Han) in a: 0 occurrences; expected by chance: share 0.2500" in none.out
    refused = ask("--tokens", "digit")
    assert (refused.status, "unknown token class 'digit': choose from digits, " in refused.err) == (2, True)


def test_an_expert_s_tokens_are_those_of_a_scan(store: Path, ask: Callable[..., Ran]) -> None:
    capture = open_capture(store, "a")
    for options, top, least in (([], 20, 1), (["--top", 3, "--min_count", 2], 3, 2)):
        done = ask("--expert", "2:5", *options)
        assert (done.status, done.err) == (0, "")
        wanted = []
        for by in ("count", "lift"):
            found = expert_tokens(capture, 2, by=by, top=top, min_count=least).sel(expert=5)  # type: ignore[arg-type]
            for row in (found.isel(place=index) for index in range(found.sizes["place"])):
                if int(row["token_id"]) >= 0:
                    about = [f"{int(row['place'])}", str(row["piece"].values), *(f"{int(row['token_id'])}",)]
                    counts = [f"{int(row[name])}" for name in ("counts", "tokens")]
                    wanted.append([*about, *counts, f"{float(row['share']):.4f}", f"{float(row['lift']):.2f}"])
        assert cells(done.out) == wanted
        assert ("tokens with fewer than 2 occurrences are left out" in done.out) == (least == 2)


def drawn(out: str) -> list[list[str]]:
    """Position, piece and choices of each line of paths."""
    return [line.split() for line in out.splitlines() if re.match(r" *\d+ ", line)]


def test_recorded_numbers_are_those_of_the_metrics(store: Path, ask: Callable[..., Ran]) -> None:
    capture = open_capture(store.with_name("r.zarr"), "recorded")
    wanted = {"entropy": router_distribution, "saliency": saliency, "logprob": logprob_by_expert}
    names = {"entropy": {"entropy": "mean_entropy", "margin_high": "mean_margin_high"},
             "saliency": {"mean_saliency": "mean_saliency", "largest_norm": "largest_norm", "tokens": "tokens"},
             "logprob": {"within": "within", "mean_logprob": "mean_logprob", "within_p": "within_p"}}  # fmt: skip
    for question, metric in wanted.items():
        found = metric(capture)
        [answer] = json.loads(ask(f"--{question}", "--json", place="r.zarr/recorded").out)["answers"]
        assert answer["n"] == found.attrs["n"]
        assert len(answer["rows"]) == (2 if question == "entropy" else 16)
        for row in answer["rows"]:
            cell = found.sel({dim: row[dim] for dim in ("layer", "expert") if dim in row})
            for key, name in names[question].items():
                value = float(cell[name])
                assert row[key] is None if np.isnan(value) else row[key] == pytest.approx(value)
        one = ask(f"--{question}", "--layer", 4, place="r.zarr/recorded")
        assert one.status == 0
        assert {row[0] for row in cells(one.out)} == {"4"}
    [answer] = json.loads(ask("--saliency", "--layer", 1, "--json", place="r.zarr/recorded").out)["answers"]
    least = [row["mean_saliency"] for row in answer["rows"]]
    reached = [value for value in least if value is not None]
    assert reached == sorted(reached)


def test_of_the_largest_logits_bounds_are_answered(ask: Callable[..., Ran]) -> None:
    [answer] = json.loads(ask("--entropy", "--json", place="r.zarr/top").out)["answers"]
    for row in answer["rows"]:
        assert row["entropy_at_least"] < row["entropy_at_most"]
        assert "entropy" not in row
        assert row["margin"] > 0


@pytest.mark.parametrize(
    ("question", "record"), [("entropy", "logits"), ("saliency", "output_norm"), ("logprob", "logprob")]
)
def test_what_was_not_recorded_is_one_line_that_says_what_makes_it(
    question: str, record: str, ask: Callable[..., Ran]
) -> None:
    ran = ask(f"--{question}")
    assert ran.status == 2
    assert f"which a does not have; python jobs/capture.py --record {record} makes it" in ran.err


def test_a_document_s_path_has_every_token_and_layer(store: Path, ask: Callable[..., Ran]) -> None:
    capture = open_capture(store, "a")
    for named, layers in ((0, [0, 1, 2]), ("document 1", [0, 1, 2]), (3, [2])):
        options = ["--layer", 2] if layers == [2] else []
        done = ask("--document", named, *options)
        assert (done.status, done.err) == (0, "")
        assert "\x1b" not in done.out
        path = document_path(capture, named).sel(layer=layers)
        assert f"document {path.attrs['document']}, document {path.attrs['document']}, in a:" in done.out
        assert drawn(done.out) == [
            [f"{position}", piece, *(",".join(map(str, choices)) for choices in routes)]
            for position, piece, routes in zip(
                path["position"].values.tolist(), path["piece"].values, path["expert"].values.tolist(), strict=True
            )
        ]
        assert path.attrs["n"] == len(TEXTS[path.attrs["document"]].split()), "without BOS"
    both = ask("--document", 0, "--document", 1)
    assert len(drawn(both.out)) == 70
    empty = ask("--document", 2)
    assert (empty.status, drawn(empty.out)) == (0, [])
    assert "in a: 0 tokens" in empty.out


def test_a_terminal_gets_colours_and_layers_in_turns_and_digits_all_the_same() -> None:
    capture = make_capture(layers=range(32), num_experts=12, experts_per_token=2, documents=3, pieces=["界" * 30] * 40)
    number = int(np.argmax([document_path(capture, document).attrs["n"] for document in range(3)]))
    path = document_path(capture, number)
    for width, color in ((80, "truecolor"), (300, "truecolor"), (80, None)):
        shown = io.StringIO()
        system: Any = color
        console = Console(file=shown, width=width, force_terminal=True, color_system=system)
        document_answer(capture, number, list(range(32))).draw(console)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.getvalue())
        lines = plain.splitlines()
        lines = lines[next(index for index, line in enumerate(lines) if line.startswith("layer")) :]
        assert max(len(line) + line.count("界") for line in lines) <= width
        turns = [line.split()[1:] for line in lines if line.startswith("layer")]
        assert [layer for turn in turns for layer in turn if layer != "piece"] == [str(layer) for layer in range(32)]
        assert (len(turns) > 1) == (width == 80)
        tokens = path.sizes["position"]
        for index in range(tokens):
            rows = [re.findall(r"( \d|\d\d),( \d|\d\d)", line) for line in lines if not line.startswith("layer")]
            found = [[int(e) for e in pair] for row in rows[index::tokens] for pair in row]
            assert found == path["expert"].values[index].tolist()
        if color:
            first = int(path["expert"].values[0, 0, 0])
            red, green, blue = map(int, re.findall(r"\d+", expert_color(first, 12)))
            assert f"48;2;{red};{green};{blue}m{first:>2}" in shown.getvalue()
    assert len({expert_color(expert, 12) for expert in range(12)}) == 12


def test_what_a_text_holds_commands_no_terminal() -> None:
    hostile = [*HOSTILE, "\x1b]0;title\x07", "\r\n", "\x9b31m", "[bold red]x[/]"]
    capture = make_capture(pieces=hostile, names=[*hostile[-4:], *hostile[:5]], vocabulary=len(hostile))
    shown = io.StringIO()
    console = Console(file=shown, width=160)
    for document in range(9):
        document_answer(capture, document, [0]).draw(console)
    out = shown.getvalue()
    assert all(c.isprintable() or c == "\n" for c in out)
    assert "[bold red]x[/]" in out
    assert screen.shown("\ud800") == r"\ud800"
    assert r"\u202eevil" in out


def test_an_incomplete_capture_is_asked_as_far_as_it_goes(tmp_path: Path, ask: Callable[..., Ran]) -> None:
    path = tmp_path / "part.zarr"
    fake_capture(path, [words(40, 0)], "c", layout=fake_layout())
    CaptureGroup(path, "c").discard(0)
    for question in (["--document", 0], ["--expert", "0:0"], ["--parquet", tmp_path / "out"]):
        done = ask(*question, place=str(path))
        assert done.status == 0
        assert "note: c: 1 of 2 shards are committed; missing shards: 0" in done.err
    drawn_part = ask("--document", 0, place=str(path))
    assert "8 tokens, 32 not yet captured" in drawn_part.out
    assert len(drawn(drawn_part.out)) == 8


def test_parquet_writes_all_data_sets_or_one_and_routes_of_documents(tmp_path: Path, ask: Callable[..., Ran]) -> None:
    done = ask("--parquet", tmp_path / "all", "--document", "document 0", place="s.zarr")
    assert (done.status, done.out, done.err) == (0, f"{tmp_path / 'all'}\n", "")
    for table in SCHEMAS:
        read = pq.read_table(tmp_path / "all" / f"{table}.parquet")
        assert read["data_set"].unique().to_pylist() == ["a", "b"]
    one = ask("--parquet", tmp_path / "one", place="s.zarr/b/")
    assert one.status == 0
    assert pq.read_table(tmp_path / "one" / "load.parquet")["data_set"].unique().to_pylist() == ["b"]
    assert pq.read_table(tmp_path / "one" / "routes.parquet").num_rows == 0
    missing = ask("--parquet", tmp_path / "none", "--document", 3, place="s.zarr")
    assert missing.status == 2
    assert "error: b: document 3: the capture has documents 0 to 0" in missing.err
    assert list((tmp_path / "none").iterdir()) == []


# --- What cannot be answered --------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], str]] = [
    (
        [],
        "use exactly one of --token, --token_id, --tokens, --expert, --document, --entropy, --saliency, --logprob,"
        " --parquet; got none",
    ),
    (["--token", "▁2", "--expert", "0:1"], "--parquet; got --token and --expert"),
    (["--token", "▁2", "--document", "0"], "got --token and --document"),
    (["--token", "▁2", "--token_id", "2"], "got --token and --token_id"),
    (["--parquet", "x", "--expert", "0:1"], "got --expert and --parquet"),
    (
        ["--expert", "0:1", "--layer", "0"],
        "--layer goes with --token, --token_id, --tokens, --document, --entropy, --saliency, --logprob,"
        " not with --expert",
    ),
    (["--document", "0", "--top", "3"], "--top goes with --expert, not with --document"),
    (["--token", "▁2", "--min_count", "3"], "--min_count goes with --expert, not with --token"),
    (["--expert", "15"], "--expert '15': must be LAYER:EXPERT, such as 15:3"),
    (["--expert", "1:-1"], "--expert '1:-1': must be LAYER:EXPERT"),
    (["--expert", "9:1"], "layers [9] were not captured; a has [0, 1, 2]"),
    (["--expert", "1:8"], "--expert 1:8: a layer has experts 0 to 7"),
    (["--expert", "1:1", "--top", "0"], "top=0, min_count=1: both must be at least 1"),
    (["--token", "▁2", "--layer", "9"], "layers [9] were not captured; a has [0, 1, 2]"),
    (["--document", "0", "--layer", "9"], "layers [9] were not captured; a has [0, 1, 2]"),
    (["--document", "4"], "document 4: the capture has documents 0 to 3"),
    (["--document", "-1"], "no document has the name '-1': use a document's id, 0 to 3"),
    (["--document", "none"], "no document has the name 'none': use a document's id, 0 to 3"),
    (["--token", "17x"], "no token reads 17x; similar tokens, with their ids: ▁17"),
    (["--token", "\x1b[31m%"], r"no token reads \x1b[31m%; similar tokens, with their ids: "),
    (["--token", "%!%"], "no token reads %!%; similar tokens, with their ids: none"),
    (["--token", ""], '--token is empty: write " " for a space'),
    (["--token", "9" * 5000], "no token reads 999"),
    (["--token", "1000"], "no token reads 1000; similar tokens, with their ids: ▁"),
    (["--token_id", "1000"], "--token_id 1000: the vocabulary has tokens 0 to 999"),
    (["--token_id", "-1"], "--token_id -1: the vocabulary has tokens 0 to 999"),
    (["--token_id", str(BOS_ID)], f"token {BOS_ID}, ▁{BOS_ID}, is a special token, which is not counted"),
    (["--parquet", "s3://bucket/tables"], "--parquet s3://bucket/tables: must be a folder on this machine"),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES)
def test_what_cannot_be_answered_is_one_line_and_status_2(
    arguments: list[str], told: str, ask: Callable[..., Ran]
) -> None:
    joined = [f"{a}={b}" for a, b in zip(arguments[::2], arguments[1::2], strict=True)]  # -1 is no option
    done = ask(*joined)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert told in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("none.zarr", "no store at none.zarr (no such folder)"),
        ("s.zarr", "s.zarr has several data sets (a, b): name one, such as s.zarr/a"),
        ("s.zarr/", "s.zarr has several data sets (a, b): name one, such as s.zarr/a"),
        ("s.zarr/c", "no data set 'c' in s.zarr; it has: a, b"),
        ("./s.zarr/c/", "no data set 'c' in ./s.zarr; it has: a, b"),
        (".", "no store at . (it has no zarr.json)"),
    ],
)
def test_a_place_that_is_no_capture_is_told(place: str, told: str, ask: Callable[..., Ran]) -> None:
    done = ask("--expert", "0:1", place=place)
    assert (done.status, done.out) == (2, "")
    assert done.err == f"error: {told}\n"


# --- Which token ----------------------------------------------------------------------------------------------------

PIECES = ["<s>", "the", "▁the", "▁The", "THE", "<0x0A>", "\\n", "7", "▁7", "▁", "a▁b", "▁return", "<0x61>", "a"]
TIMES = [50, 10, 6094, 321, 0, 1700, 2, 161, 30, 5, 1, 21, 3, 9]


def occurring(*times: int) -> tuple[Any, Any]:
    """A capture with those pieces, and counts of them; all go to expert 0 of layer 0."""
    capture = make_capture(pieces=[*PIECES, *(f"w{number}" for number in range(26))]).assign_attrs(
        special_token_ids=[0]
    )
    counts = scan(capture, [TokenCounts()])[0]
    every = [*times, *[1] * 26]
    counted = np.zeros_like(counts["counts"].values)
    counted[:, :, 0] = np.array(every)[:, None]
    return capture, counts.assign(tokens=("token_id", every), counts=(counts["counts"].dims, counted))


@pytest.mark.parametrize(
    ("word", "answered", "others"),
    [
        ("the", "▁the", ["▁The", "the"]),
        (" the", "▁the", ["▁The", "the"]),
        ("▁the", "▁the", ["▁The", "the"]),
        ("The", "▁The", ["▁the", "the"]),
        ("THE", "THE", ["▁the", "▁The", "the"]),
        (r"\n", "<0x0A>", [r"\n"]),
        ("\n", "<0x0A>", []),
        ("<0x0A>", "<0x0A>", []),
        ("7", "7", ["▁7"]),
        (" 7", "▁7", ["7"]),
        (" ", "▁", []),
        ("a b", "a▁b", []),
        ("a", "a", ["<0x61>"]),
        ("11", "▁return", []),
        (r"\x61", "a", ["<0x61>"]),
    ],
)
def test_a_token_is_asked_for_as_text_piece_escape_or_id_and_the_most_frequent_is_answered(
    word: str, answered: str, others: list[str]
) -> None:
    capture, counts = occurring(*TIMES)
    answer = asked_token(capture, word, None).answer(capture, [0], counts)
    assert (answer.facts["piece"], answer.facts["tokens"]) == (answered, TIMES[PIECES.index(answered)])
    named = [row["piece"] for row in answer.facts["others"] if row["token_id"] < len(PIECES)]
    assert named == others
    for row in answer.facts["others"]:
        assert f"{shown(row['piece'])} (id {row['token_id']}) {row['tokens']:,}" in answer.note
    by_id = asked_token(capture, None, PIECES.index(answered)).answer(capture, [0], counts)
    assert (by_id.facts["piece"], by_id.facts["others"], by_id.note) == (answered, [], "")


def test_which_token_is_answered_follows_the_counts_and_never_a_special_one() -> None:
    capture, counts = occurring(*TIMES[:1], 9000, *TIMES[2:])
    assert asked_token(capture, "the", None).answer(capture, [0], counts).facts["piece"] == "the"
    assert asked_token(capture, " the", None).answer(capture, [0], counts).facts["piece"] == "▁the", "with its space"
    with pytest.raises(ValueError, match="token 0, <s>, is a special token"):
        asked_token(capture, "<s>", None)
    with pytest.raises(ValueError, match=r"no token reads retrun; similar tokens, with their ids: ▁return \(11\)"):
        asked_token(capture, "retrun", None)


def test_a_question_that_was_asked_before_loads_nothing_that_counts(store: Path) -> None:
    script, question = str(ROOT / "jobs" / "query.py"), [str(store / "b"), "--token_id", "17"]
    query.main(question)  # the answer is kept
    told = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([sys.executable, script, *question], env=told, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "in b: " in done.stdout
    assert {"tyro", "numpy"} <= loaded
    assert loaded.isdisjoint({"xarray", "dask", "pandas", "scipy", "numba", "llvmlite", "torch", "transformers", "ray"})


@pytest.mark.parametrize(
    "question", [("--token_id", "17"), ("--expert", "1:2", "--top", "3"), ("--tokens", "letters", "--layer", "1")]
)
def test_a_kept_answer_is_the_answer_and_another_question_or_other_code_has_its_own(
    store: Path, question: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*more: str) -> list[str]:
        found = []
        for form in ((), ("--json",)):
            assert query.main([str(store / "a"), *question, *more, *form]) == 0
            found.append(capsys.readouterr().out)
        return found

    calls = []
    counted = query._counted
    monkeypatch.setattr(query, "_counted", lambda *arguments: calls.append(1) or counted(*arguments))
    for file in (store.parent / f"{store.name}.results" / "a" / "answers").glob("*"):
        file.unlink()
    first = asked()
    assert len(calls) == 1, "the second form is that of the same answer"
    assert asked() == first
    assert len(calls) == 1
    [file] = (store.parent / f"{store.name}.results" / "a" / "answers").glob("*")
    file.write_bytes(file.read_bytes()[:40])
    assert asked() == first, "what is damaged is answered anew"
    assert len(calls) == 2
    monkeypatch.setattr(kept_answers, "_code", lambda: "other code")
    assert asked() == first
    assert len(calls) == 3


def test_it_runs_as_a_script_and_a_typo_names_the_flag(store: Path) -> None:
    script = [sys.executable, str(ROOT / "jobs" / "query.py")]
    done = subprocess.run([*script, str(store / "a"), "--document", "0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(drawn(done.stdout)) == 40
    typo = subprocess.run([*script, str(store), "--tokne", "x"], capture_output=True, text=True, check=False)
    assert typo.returncode == 2
    assert "did you mean --token?" in typo.stderr
