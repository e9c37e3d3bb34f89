"""The output of status, query and the end of the demo for a person in a terminal, a pipe, and a script."""

import fcntl
import io
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Ran
from fake_model import fake_capture, word_id, words
from rich.cells import cell_len
from rich.console import Console
from synthetic import HOSTILE, make_capture, state_of

import analysis.report.page
from analysis.metrics.excess import token_excess_of
from analysis.metrics.load import expert_load
from analysis.metrics.paths import document_path
from analysis.metrics.sample import SampledRoutes
from analysis.metrics.tokens import TokenCounts, expert_tokens, token_experts
from analysis.report.section import Answers
from analysis.scanning import EVERYTHING, scan
from jobs import capture, demo, doctor, query, status
from jobs.console.places import by_store, capture_at, captures_at
from jobs.console.query_rows import document_answer, expert_answer, token_answer
from jobs.console.tables import Bars, Column, print_json, print_table
from store import CaptureGroup, coverage, open_capture
from store.lease import lease
from store.objects import LocalObjects
from store.verification import Findings

ROOT = Path(__file__).parents[2]
TEXTS = [words(40, 0), words(30, 1), "", words(20, 2)]
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CONTROLS = ["\x1b]0;title\x07", "\r\n", "\x9b31m", "\x1b[2J", "\u202eevil", "[bold red]x[/]", ":bomb:", "界界"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete data sets a and b. Tests must not change them."""
    path = tmp_path_factory.mktemp("terminal") / "s.zarr"
    fake_capture(path, TEXTS, "a")
    fake_capture(path, TEXTS[:1], "b")
    return path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Data sets in every state, each named after its state."""
    path = tmp_path / "broken.zarr"
    for name in ("complete", "missing", "quarantined", "damaged", "lost", "unreadable"):
        fake_capture(path, TEXTS, name)
    CaptureGroup(path, "missing").discard(1)
    group = CaptureGroup(path, "quarantined")
    group.discard(2)
    group.quarantine(2, {"errors": ["RoutingError: \x1b[31mlayer 3\nand more"], "documents": ["a", "b"]})
    (path / "damaged" / "expert" / "c" / "1" / "0" / "0" / "0").write_bytes(b"cut")
    next(file for file in (path / "lost" / "token" / "c").rglob("*") if file.is_file()).unlink()
    (path / "unreadable" / "zarr.json").write_text('{"attributes": {"schema_version": 0}}')
    return path


def unfinished(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Add a data set whose planning was stopped after the first rows."""
    put_over = LocalObjects.put_over

    def killed(objects: LocalObjects, key: str, old: bytes, data: bytes) -> bool:
        if key == "unfinished/offset/zarr.json" and CaptureGroup(store, "unfinished").plan.rows:
            raise KeyboardInterrupt
        return put_over(objects, key, old, data)

    with monkeypatch.context() as patched:
        patched.setattr("jobs.capturing.planner.PUBLISH_POSITIONS", 32)
        patched.setattr(LocalObjects, "put_over", killed)
        with pytest.raises(KeyboardInterrupt):
            fake_capture(store, TEXTS, "unfinished")


def terminal(width: int, **options: Any) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor", **options)


def written(console: Console) -> str:
    """What was printed."""
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def lines_of(text: str) -> list[str]:
    return COLOUR.sub("", text).splitlines()


def in_a_terminal(width: int, *command: object, **environment: str) -> tuple[int, str]:
    """The status, and everything that a command writes to its own terminal."""
    driver, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    run = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdin=end, stdout=end, stderr=end, env={**kept, "TERM": "xterm-256color", **environment}, close_fds=True,
    )  # fmt: skip
    os.close(end)
    read = b""
    try:
        while part := os.read(driver, 65536):
            read += part
    except OSError:  # EIO: the other end is closed
        pass
    os.close(driver)
    return run.wait(), read.decode()


def piped(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env={**os.environ, **environment}
    )


# --- Tables -------------------------------------------------------------------------------------------------------

COLUMNS = (
    Column(name="token", text=lambda row: row["token"], left=True, elastic=True),
    Column(name="count", text=lambda row: f"{row['count']:,}"),
    Column(name="of", text=lambda row: f"{row['of']:,}", spare=3),
    Bars(part=lambda row: row["count"] / row["of"] if row["of"] else None),
    Column(name="state", text=lambda row: "so", left=True, spare=2),
)
PIECES = ["the", "\ud800", "界" * 9, "x" * 50, "🙂🙂", "", *HOSTILE, *CONTROLS]
ROWS = [{"token": piece, "count": index * 999, "of": len(PIECES) * 999} for index, piece in enumerate(PIECES)]


@pytest.mark.parametrize("width", [24, 30, 40, 41, 59, 60, 80, 100, 200])
def test_in_a_terminal_of_any_width_a_row_is_a_line_that_fits_and_columns_are_aligned(width: int) -> None:
    console = terminal(width)
    print_table(console, COLUMNS, ROWS)
    lines = lines_of(written(console))
    assert max(map(cell_len, lines)) <= width
    table = lines[: 2 + len(ROWS)]
    assert lines[len(table) :] == [] or f"{width} cells are too few" in lines[len(table)]
    head = table[0]
    ends = cell_len(head[: head.index("count") + 5])
    for line, row in zip(table[2:], ROWS, strict=True):
        count = f"{row['count']:,}"
        cells = [line[:index] for index in range(len(line) + 1) if cell_len(line[:index]) == ends]
        assert any(part.endswith(count) for part in cells)


def test_columns_are_spared_in_their_order_and_named_and_a_wide_terminal_has_them_all() -> None:
    left_out = {}
    for width in (26, 31, 40, 50, 200):
        console = terminal(width)
        print_table(console, COLUMNS, ROWS)
        out = " ".join(lines_of(written(console))).partition(" cells are too few for: ")
        left_out[width] = " ".join(out[2].split())
        assert ("█" in out[0]) == (width > 30)
    assert left_out == {26: "of, state", 31: "of, state", 40: "of", 50: "", 200: ""}
    console = terminal(200)
    print_table(console, COLUMNS, ROWS)
    assert "x" * 50 in written(console)


def test_bars_are_as_long_as_their_parts() -> None:
    console = terminal(80)
    rows = [{"token": "t", "count": count, "of": 96} for count in range(97)]
    print_table(console, COLUMNS, rows)
    eighths = [line.count("█") * 8 + max(map(" ▏▎▍▌▋▊▉".find, line)) for line in lines_of(written(console))[2:]]
    assert eighths == list(range(97))


def test_a_column_without_a_value_has_no_bar_and_an_empty_table_is_its_head() -> None:
    console = terminal(80)
    print_table(console, COLUMNS, [{"token": "t", "count": 0, "of": 0}, {"token": "t", "count": 0, "of": math.nan}])
    assert not set("█▏") & set(written(console))
    console = terminal(80)
    print_table(console, COLUMNS, [])
    assert lines_of(written(console))[0].split() == ["token", "count", "of", "state"]


@pytest.mark.parametrize("kind", ["pipe", "dumb", "latin-1", "too narrow"])
def test_where_nothing_can_be_drawn_every_column_is_whole(kind: str) -> None:
    file = io.StringIO()
    console = Console(file=file, width=40)
    if kind == "dumb":
        console = Console(file=file, width=40, force_terminal=True, _environ={"TERM": "dumb"})
    elif kind == "latin-1":
        file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="backslashreplace")  # type: ignore[assignment]
        console = Console(file=file, width=40, force_terminal=True, color_system=None)
    elif kind == "too narrow":
        console = Console(file=file, width=15, force_terminal=True, color_system=None)
    print_table(console, COLUMNS, ROWS)
    file.seek(0)
    out = file.read()
    assert "\x1b" not in out
    assert not set("█─…") & set(out)
    if kind == "too narrow":
        assert "x" * 50 in out.replace("\n", "")
        return
    lines = out.splitlines()
    assert len(lines) == 1 + len(ROWS)
    assert "x" * 50 in out
    assert all(line == line.rstrip() for line in lines)
    assert [line.split()[-3:] for line in lines[1:]] == [[f"{r['count']:,}", f"{r['of']:,}", "so"] for r in ROWS]


def test_what_a_text_holds_commands_no_terminal_and_is_no_markup() -> None:
    for width in (40, 200):
        console = terminal(width)
        print_table(console, COLUMNS, ROWS)
        document = make_capture(pieces=[*CONTROLS, *HOSTILE], names=[*CONTROLS, HOSTILE[0]], vocabulary=22)
        counts = scan(document, [TokenCounts()])[0]
        for number in range(9):
            document_answer(document, number, [0]).draw(console)
        for token in range(2, 9):
            token_answer(document, token, [0, 1], counts).draw(console)
        expert_answer(document, 1, 3, counts).draw(console)
        out = COLOUR.sub("", written(console))
        assert all(c.isprintable() or c == "\n" for c in out)
        if width == 200:
            for text in ("[bold red]x[/]", ":bomb:", r"\u202eevil", r"\x1b[2J"):
                assert text in out


def test_json_is_one_line_of_ascii_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(
        {"a": [math.nan, np.float32(math.inf), np.int64(3)], "b": {"c": np.array([[1.5, math.nan]])}, "d": "\ud800▁"}
    )
    out = capsys.readouterr().out
    assert out == '{"a": [null, null, 3], "b": {"c": [[1.5, null]]}, "d": "\\ud800\\u2581"}\n'


# --- Places -------------------------------------------------------------------------------------------------------


def test_a_place_is_a_store_or_a_data_set_of_it(store: Path, command: Callable[..., Ran]) -> None:
    for place in (f"{store}", f"{store}/"):
        assert captures_at(place) == (str(store), ["a", "b"])
        with pytest.raises(ValueError, match=rf"has several data sets \(a, b\): name one, such as {store}/a"):
            capture_at(place)
    assert capture_at(f"{store}/b/") == capture_at(f"{store}//b") == (str(store), "b")
    assert by_store([f"{store}/b", f"{store}/a", f"{store}/"]) == {str(store): ["b", "a"]}
    with pytest.raises(FileNotFoundError, match=rf"no data set 'c' in {store}; it has: a, b"):
        captures_at(f"{store}/c")
    with pytest.raises(FileNotFoundError, match=rf"no store at {store}-no/x .*, and {store}-no is not a store"):
        captures_at(f"{store}-no/x")
    told = json.loads(command(store / "b", "--json", main=status.main).out)
    assert [each["data_set"] for each in told["data_sets"]] == ["b"]
    assert (
        command(store, main=doctor.main).err
        == f"error: {store} has several data sets (a, b): name one, such as {store}/a\n"
    )


def test_the_command_that_draws_a_report_again_names_its_places(store: Path) -> None:
    again = analysis.report.page.again
    assert again([(store, "a"), (store, "b")], None, EVERYTHING) == f"python jobs/report.py {store}"
    assert again([(store, "b")], None, EVERYTHING) == f"python jobs/report.py {store}/b"


# --- Status -------------------------------------------------------------------------------------------------------


def test_json_says_of_every_data_set_what_the_store_says(
    broken: Path, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(broken, monkeypatch)
    with lease(CaptureGroup(broken, "missing")):
        ran = command(broken, "--json", main=status.main)
    assert ran.status == 1
    told = json.loads(ran.out)
    assert (told["store"], told["whole"], ran.out.count("\n")) == (str(broken), False, 1)
    found = {each["data_set"]: each for each in told["data_sets"]}
    assert list(found) == sorted(found) == sorted([*(p.name for p in broken.iterdir() if p.is_dir())])
    states = {name: each["state"] for name, each in found.items()}
    assert states == {
        "complete": "complete",
        "missing": "missing 1",
        "quarantined": "quarantined 1",
        "damaged": "damaged 1",
        "lost": "plan damaged",
        "unreadable": "cannot be read",
        "unfinished": "missing 1",
    }
    for name, each in found.items():
        assert (each["complete"], each["holds"], each["plan_faults"]) == (name == "complete", None, None)
        assert (each["captured_by"] is None) == (name != "missing")
        if name == "unreadable":
            assert "schema_version is 0" in each["error"]
            assert [each[key] for key in status.KNOWN] == [None] * len(status.KNOWN)
            continue
        state = coverage(broken, name)
        for key in ("shards_total", "shards_done", "missing", "tokens_done", "bytes_done", "digest", "lost", "seconds"):
            assert each[key] == getattr(state, key)
        for key in ("rows", "documents", "documents_empty", "documents_repaired"):
            assert each[key] == getattr(state.plan, key)
        assert (each["tokens_planned"], each["plan_complete"]) == (state.plan.tokens, state.plan.complete)
        assert each["wrong"] == [{"shard": shard, "reason": reason} for shard, reason in state.wrong.items()]
    assert found["missing"]["missing"] == [1]
    assert not found["unfinished"]["plan_complete"]
    CaptureGroup(broken, "quarantined").discard(1)
    [both] = json.loads(command(broken / "quarantined", "--json", main=status.main).out)["data_sets"]
    assert (both["state"], both["missing"], len(both["quarantined"])) == ("missing 2", [1, 2], 1)
    [aside] = found["quarantined"]["quarantined"]
    assert aside == {"shard": 2, "documents": ["a", "b"], "errors": ["RoutingError: \x1b[31mlayer 3\nand more"]}
    assert command(broken / "complete", "--json", main=status.main).status == 0


def test_what_is_planned_so_far_is_not_complete(store: Path) -> None:
    state = coverage(store, "a")
    state = replace(state, plan=replace(state.plan, complete=False))
    console = Console(file=io.StringIO(), width=40)
    status.print_status(console, [status.Looked(data_set="a", state=state)])
    _, row, sentence = written(console).splitlines()
    assert re.split(" {2,}", row)[1] == f"{state.shards_total}/{state.shards_total}+"
    assert row.endswith("  plan unfinished")
    assert sentence == str(state)


def test_json_of_what_was_verified_says_what_does_not_hold(
    store: Path, command: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = command(store, "--json", "--verify", main=status.main)
    assert ran.status == 0
    assert [(each["holds"], each["plan_faults"]) for each in json.loads(ran.out)["data_sets"]] == [(True, [])] * 2
    found = Findings(shards={1: "its weight shard is gone"}, plan=["name/c/0 is gone"], unnoted="read-only")
    monkeypatch.setattr(status, "verify", lambda group, progress: found)
    ran = command(store / "a", "--json", "--verify", main=status.main)
    [told] = json.loads(ran.out)["data_sets"]
    assert (ran.status, told["holds"], told["state"]) == (1, False, "plan damaged")
    assert told["wrong"] == [{"shard": 1, "reason": "its weight shard is gone"}]
    assert (told["plan_faults"], told["not_noted"]) == (["name/c/0 is gone"], "read-only")
    assert "the plan is damaged: name/c/0 is gone" in ran.err


def test_a_mistake_writes_nothing_where_json_is_asked_for(store: Path, command: Callable[..., Ran]) -> None:
    for arguments, main in (
        ((store.parent / "none.zarr", "--json"), status.main),
        ((store, "--json", "--expert", "0:1"), query.main),
        ((store / "a", "--json", "--document", "0", "--document", "99"), query.main),
        ((store / "a", "--json", "--parquet", "x"), query.main),
    ):
        ran = command(*arguments, main=main)
        assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    questions = "--token, --token_id, --tokens, --expert, --document, --entropy, --saliency, --logprob"
    assert f"--json goes with {questions}, not with --parquet" in ran.err


def documented(script: str) -> set[str]:
    """The keys of a script's --json that docs/json.md names."""
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    return set(re.findall(r"`(\w+)`", text.partition(f"\n## {script}\n")[2].partition("\n## ")[0]))


def test_the_docs_name_every_key_of_json(store: Path, command: Callable[..., Ran]) -> None:
    ran = command(store, "--json", main=status.main)
    keys = {*json.loads(ran.out), *(key for each in json.loads(ran.out)["data_sets"] for key in each)}
    assert keys - documented("status") == set()
    asked = (["--token", f"▁{word_id(TEXTS[0].split()[0])}"], ["--tokens", "digits"])
    asked += (["--expert", "0:1"], ["--document", "0"])
    for question in asked:
        told = json.loads(command(store / "a", *question, "--json", main=query.main).out)
        keys = {*told, *(key for each in told["answers"] for key in (*each, *each["rows"][0]))}
        assert keys - documented("query") == set()


def test_status_in_a_terminal_has_a_bar_for_each_data_set_and_breaks_no_line(broken: Path) -> None:
    for width, cells in ((80, 12), (50, 8), (40, 0)):
        code, out = in_a_terminal(width, ROOT / "jobs" / "status.py", broken)
        assert code == 1
        lines = lines_of(out)
        assert (
            max(cell_len(line) for line in lines if not line.startswith("error: ")) <= width
        )  # errors are not results
        rows = {line.split()[0]: line for line in lines if re.match(r"\w+ +\d+/\d+\+? ", line)}
        assert rows.keys() == {"complete", "missing", "quarantined", "damaged", "lost"}
        bars = {name: line.count("█") for name, line in rows.items()}
        assert bars["complete"] == cells
        assert 0 < bars["missing"] < cells or not cells
        assert rows["quarantined"].rstrip().endswith("  quarantined 1")
        told = " ".join(out.split())
        for sentence in (
            "missing shards: 1",
            "in quarantine: 2 (RoutingError: \\x1b[31mlayer 3)",
            "damaged: shard 1 failed verification: ",
        ):
            assert sentence in told


def test_a_pipe_gets_a_line_for_each_data_set_whole_and_no_escape_code(broken: Path) -> None:
    name = "x" * 128
    (broken / "complete").rename(broken / name)
    done = piped(ROOT / "jobs" / "status.py", broken, COLUMNS="40")
    assert (done.returncode, "\x1b" in done.stdout) == (1, False)
    lines = done.stdout.splitlines()
    state = coverage(broken, name)
    [line] = [line for line in lines if line.startswith(name)]
    assert line.split()[1:5] == [f"{state.shards_total}/{state.shards_total}", "0", "4", f"{state.tokens_done:,}"]
    assert line.endswith("  complete")
    assert f"{coverage(broken, 'quarantined')}".replace("\x1b", "\\x1b") in lines, "however long"
    assert [line.split()[0] for line in lines[1:7]] == ["damaged", "lost", "missing", "quarantined", "unreadable", name]


@pytest.mark.parametrize(
    ("environment", "escapes"), [({"NO_COLOR": "1"}, "bold only"), ({"TERM": "dumb"}, "none"), ({}, "colours")]
)
def test_no_color_and_dumb_terminals_are_obeyed(store: Path, environment: dict[str, str], escapes: str) -> None:
    code, out = in_a_terminal(80, ROOT / "jobs" / "status.py", store, **environment)
    assert code == 0
    coloured = re.findall(r"\x1b\[[0-9;]*3[0-7][0-9;]*m", out)
    assert bool(coloured) == (escapes == "colours")
    assert ("\x1b" in out) == (escapes != "none")
    assert ("█" in out) == (escapes != "none")


# --- Query --------------------------------------------------------------------------------------------------------


def test_query_s_json_is_what_the_analysis_says(store: Path, command: Callable[..., Ran]) -> None:
    routes, token = open_capture(store, "a"), word_id(TEXTS[0].split()[0])

    def asked(*question: object) -> dict[str, Any]:
        ran = command(store / "a", *question, "--json", main=query.main)
        assert (ran.status, ran.err, ran.out.count("\n")) == (0, "", 1)
        told: dict[str, Any] = json.loads(ran.out)
        total = coverage(store, "a").shards_total
        assert (told["store"], told["data_set"], told["complete"]) == (str(store), "a", True)
        assert (told["shards_done"], told["shards_total"]) == (total, total)
        return told

    [answer] = asked("--token_id", token)["answers"]
    table = token_experts(routes)
    own = table.sel(token_id=token)
    assert (answer["tokens"], answer["piece"]) == (int(own["tokens"]), f"▁{token}")
    assert {key: answer[key] for key in ("n", "null", "null_lift")} == {
        "n": table.attrs["n"],
        "null": 0.25,
        "null_lift": 1,
    }
    assert answer["definition"] == table.attrs["definition"]
    assert len(answer["rows"]) == int((own["counts"] > 0).sum())
    for row in answer["rows"]:
        cell = own.sel(layer=row["layer"], expert=row["expert"])
        assert [row[name] for name in ("count", "share", "lift")] == [
            cell[n].item() for n in ("counts", "share", "lift")
        ]

    for answer, by in zip(asked("--expert", "2:5", "--top", 4)["answers"], ("count", "lift"), strict=True):
        listed = expert_tokens(routes, 2, by=by, top=4).sel(expert=5)  # type: ignore[arg-type]
        assert (answer["layer"], answer["expert"], answer["order"], answer["min_count"]) == (2, 5, by, 1)
        listed = listed.rename(counts="count", place="rank")
        for name in ("rank", "token_id", "piece", "count", "tokens", "share", "lift"):
            assert [row[name] for row in answer["rows"]] == listed[name].values.tolist()

    answers = asked("--document", 3, "--document", "document 0", "--layer", 2, "--layer", 0)["answers"]
    for answer, number in zip(answers, (3, 0), strict=True):
        path = document_path(routes, number).sel(layer=[2, 0])
        assert (answer["document"], answer["layers"], answer["n"]) == (number, [2, 0], path.sizes["position"])
        assert answer["tokens_missing"] == 0
        for name, key in (("position", "position"), ("piece", "piece"), ("token", "token_id"), ("expert", "expert")):
            assert [row[key] for row in answer["rows"]] == path[name].values.tolist()
        assert [row["weight"] for row in answer["rows"]] == path["weight"].values.tolist()

    absent = next(number for number in range(2, 1000) if number not in table["token_id"].values)
    [answer] = asked("--token_id", absent)["answers"]
    assert (answer["tokens"], answer["rows"], answer["n"]) == (0, [], table.attrs["n"])


def test_query_in_a_terminal_has_bars_of_shares_and_says_chance(store: Path) -> None:
    code, out = in_a_terminal(60, ROOT / "jobs" / "query.py", store / "a", "--expert", "2:5", "--top", "4")
    assert code == 0
    out = out.replace("\x1b[?25l", "").replace("\x1b[?25h", "")
    lines = lines_of(out[out.index("expert 5 of layer 2") :])
    assert max(map(cell_len, lines)) <= 60
    assert "expected by chance: share 0.2500, lift 1" in " ".join(" ".join(lines).split())
    assert lines.count("a full bar means a share of 1") == 2
    rows = [line for line in lines if re.match(r" *\d+  ▁", line)]
    listed = [expert_tokens(open_capture(store, "a"), 2, by=by, top=4).sel(expert=5) for by in ("count", "lift")]  # type: ignore[arg-type]
    shares = [share for table in listed for share in table["share"].values]
    assert [line.count("█") for line in rows] == [int(12 * share) for share in shares]


def test_wide_tokens_stay_aligned_in_a_terminal_and_in_a_pipe() -> None:
    routes = make_capture(pieces=["界" * (1 + number % 5) for number in range(40)])
    answer = expert_answer(routes, 1, 3, scan(routes, [TokenCounts()])[0], top=9)
    for console in (terminal(100), Console(file=io.StringIO())):
        answer.draw(console)
        lines = [line for line in lines_of(written(console)) if "界" in line]
        assert len(lines) == 9
        assert len({cell_len(line.rstrip()) for line in lines}) == 1
        assert len({line.count("界") for line in lines}) > 1


# --- The demo -----------------------------------------------------------------------------------------------------


def test_the_demo_ends_with_what_it_found_and_the_report_s_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    captures = {name: make_capture(seed=seed, dataset=name) for seed, name in enumerate(demo.TEXTS)}
    answers = [
        Answers(
            label=name,
            state=state_of(routes),
            attrs=routes.attrs,
            documents=1,
            found={"load": expert_load(routes), "token_excess": token_excess_of(scan(routes, [SampledRoutes()])[0])},
        )
        for name, routes in captures.items()
    ]
    monkeypatch.setattr(capture, "carry_out", lambda config: 0)
    monkeypatch.setattr(
        analysis.report.page, "write_report", lambda stores, output: SimpleNamespace(answers=answers, apart=None)
    )
    assert demo.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(demo.REPORT)
    assert re.fullmatch(r"  \S*python jobs/explore\.py \S*demo\.zarr", lines[-3])
    for each in answers:
        share = each["load"]["share"]
        [row] = [line for line in lines if line.startswith(f"{each.label}  ")]
        top = share.where(share == share.max(), drop=True)
        place = f"{int(top['layer'][0])}:{int(top['expert'][0])}"
        cells = [each.label, f"{each['load'].attrs['n']:,}", place, f"{float(share.max()):.1%}", "12.5%"]
        assert re.split(" {2,}", row) == cells
        assert any(line.startswith(f"- {each.label}: {each['load'].attrs['n']:,} tokens.") for line in lines)
    for width in (80, 40):
        console = terminal(width)
        demo.print_found(console, answers, None)
        drawn = lines_of(written(console))
        assert max(map(cell_len, drawn)) <= width
        assert sum("█" in line for line in drawn) == len(answers)


def test_the_demo_stops_at_the_first_capture_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "carry_out", lambda config: 7)
    monkeypatch.setattr(analysis.report.page, "write_report", lambda *_: pytest.fail("reported"))
    assert demo.main([]) == 7
