"""Which column is used as the text, and which layouts of conversations are known."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.sources.columns import is_naming
from jobs.sources.resolve import Source, resolve_source


def write(path: Path, row: dict[str, Any]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({name: [value] for name, value in row.items()}), path)
    else:
        path.write_text(json.dumps(row) + "\n")
    return str(path)


def messages(source: Source) -> list[Any]:
    assert source.conversations
    return [document.messages for document in source.documents()]


TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
KINDS = pytest.mark.parametrize("kind", ["jsonl", "parquet"])


@pytest.mark.parametrize(
    "name",
    [
        *("id", "uuid", "doc_id", "docId", "prompt-id", "ID", "__index__", "url", "source_url", "link", "path"),
        *("file", "file_name", "title", "name", "repo_name", "source", "md5", "sha256", "date", "created_at"),
        *("timestamp", "language", "lang", "license", "label", "url_2"),
    ],
)
def test_a_column_that_names_rows_is_never_taken_unasked(tmp_path: Path, name: str) -> None:
    for kind in ("jsonl", "parquet"):
        path = write(tmp_path / f"t.{kind}", {name: "x", "input_ids": [1, 2]})
        with pytest.raises(ValueError, match=rf"no columns that could be the text; .*--text_field.*{name} \(text\)"):
            resolve_source(path)
        assert [document.text for document in resolve_source(path, text_field=name).documents()] == ["x"]


@pytest.mark.parametrize("name", ["content", "body", "document", "sentence", "markdown", "idea", "正文", "valid"])
def test_any_other_only_string_column_is_taken(tmp_path: Path, name: str) -> None:
    assert not is_naming(name)
    source = resolve_source(write(tmp_path / "t.jsonl", {"id": "1", name: "x", "url": "u"}))
    assert [(document.name, document.text) for document in source.documents()] == [("1", "x")]
    assert source.identity["field"] == name


@KINDS
@pytest.mark.parametrize("column", ["conversations", "dialog"])
def test_turns_of_sharegpt_become_messages(tmp_path: Path, kind: str, column: str) -> None:
    source = resolve_source(write(tmp_path / f"t.{kind}", {"id": "7", column: TURNS}))
    assert messages(source) == [CHAT]
    assert source.identity["field"] == column
    assert next(iter(source.documents())).name == "7"


def test_every_speaker_of_sharegpt_has_a_role_and_other_names_are_refused(tmp_path: Path) -> None:
    said = ("system", "human", "observation", "gpt", "user", "tool", "assistant", "tool_response")
    turns = [{"from": name, "value": name, "weight": 1} for name in said]
    (found,) = messages(resolve_source(write(tmp_path / "t.jsonl", {"conversations": turns})))
    roles = ["system", "user", "tool", "assistant", "user", "tool", "assistant", "tool"]
    assert [message["role"] for message in found] == roles
    assert [message["content"] for message in found] == list(said)
    path = write(tmp_path / "u.jsonl", {"conversations": [*TURNS, {"from": "narrator", "value": "x"}]})
    with pytest.raises(ValueError, match=r"u\.jsonl:1: column 'conversations', message 2: unknown speaker 'narrator'"):
        messages(resolve_source(path))


CALL = {"name": "weather", "arguments": {"city": "Turin"}}


@KINDS
@pytest.mark.parametrize("speaker", ["function_call", "function-call", "tool_call"])
@pytest.mark.parametrize("value", [CALL, [CALL], {**CALL, "arguments": json.dumps(CALL["arguments"])}])
def test_a_call_in_sharegpt_becomes_what_a_chat_template_takes(
    tmp_path: Path, kind: str, speaker: str, value: Any
) -> None:
    turns = [TURNS[0], {"from": speaker, "value": json.dumps(value)}, {"from": "observation", "value": "sunny"}]
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}
    (found,) = messages(resolve_source(write(tmp_path / f"t.{kind}", {"conversations": turns})))
    assert found == [CHAT[0], called, {"role": "tool", "content": "sunny"}]


@pytest.mark.parametrize("value", ["weather(Turin)", "[]", '{"name": "f"}', '{"name": "f", "parameters": {}}', None])
def test_a_call_of_another_form_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path / "t.jsonl", {"conversations": [TURNS[0], {"from": "function_call", "value": value}]})
    with pytest.raises(ValueError, match=r"t\.jsonl:1: column 'conversations', message 1: a call must be .*in JSON"):
        messages(resolve_source(path))


def test_a_call_in_the_old_field_of_a_message_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"messages": [CHAT[0], {"role": "assistant", "function_call": CALL}]})
    with pytest.raises(ValueError, match="message 1: holds a function_call; chat templates read tool_calls instead"):
        messages(resolve_source(path))


@KINDS
@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("beside", [{"conversations": TURNS}, {"messages": CHAT}])
def test_a_column_beside_the_messages_holds_the_system_message(
    tmp_path: Path, kind: str, column: str, beside: dict[str, Any]
) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert messages(resolve_source(write(tmp_path / f"a.{kind}", {column: "Be brief.", **beside}))) == [[system, *CHAT]]
    assert messages(resolve_source(write(tmp_path / f"b.{kind}", {column: "", **beside}))) == [CHAT]
    same = {column: "Be brief.", "messages": [system, *CHAT]}
    assert messages(resolve_source(write(tmp_path / f"c.{kind}", same))) == [[system, *CHAT]]
    with pytest.raises(ValueError, match=rf"d\.{kind}:1: column '{column}' is not its only system message: 'Or long.'"):
        messages(resolve_source(write(tmp_path / f"d.{kind}", {**same, column: "Or long."})))


def test_columns_beside_the_messages_count_in_later_rows_too_and_must_be_single_and_text(tmp_path: Path) -> None:
    rows = [{"messages": CHAT}] * 101 + [{"messages": CHAT, "system": "Be brief.", "tools": [{"type": "function"}]}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    *_, last = resolve_source(str(tmp_path / "t.jsonl")).documents()
    assert last.messages == [{"role": "system", "content": "Be brief."}, *CHAT]
    assert last.tools == [{"type": "function"}]
    with pytest.raises(ValueError, match=r"u\.jsonl:1: column 'system' holds list, not text"):
        messages(resolve_source(write(tmp_path / "u.jsonl", {"messages": CHAT, "system": ["Be brief."]})))
    twice = pa.table([pa.array([CHAT]), pa.array(["a"]), pa.array(["b"])], names=["messages", "system", "system"])
    pq.write_table(twice, tmp_path / "v.parquet")
    with pytest.raises(ValueError, match=r"v\.parquet has several columns named 'system'"):
        resolve_source(str(tmp_path / "v.parquet"))


@KINDS
def test_messages_are_known_by_what_they_hold_and_come_before_strings(tmp_path: Path, kind: str) -> None:
    assert messages(resolve_source(write(tmp_path / f"a.{kind}", {"prompt_id": "1", "dialogue": CHAT}))) == [CHAT]
    both = {"prompt": "Hi", "prompt_id": "1", "messages": CHAT}
    assert messages(resolve_source(write(tmp_path / f"b.{kind}", both))) == [CHAT]
    with pytest.raises(ValueError, match="has 2 columns that could be the text"):
        resolve_source(write(tmp_path / f"c.{kind}", {"chosen": CHAT, "rejected": CHAT}))


@KINDS
@pytest.mark.parametrize("pair", [("prompt", "completion"), ("prompt", "response"), ("question", "answer")])
def test_a_prompt_and_its_completion_are_one_conversation(tmp_path: Path, kind: str, pair: tuple[str, str]) -> None:
    texts = dict(zip(pair, ("Hi", "Hello"), strict=True))
    source = resolve_source(write(tmp_path / f"a.{kind}", {"id": "1", **texts}))
    assert messages(source) == [CHAT]
    assert source.identity["field"] == "+".join(pair)
    lists = dict(zip(pair, (CHAT[:1], CHAT[1:]), strict=True))
    assert messages(resolve_source(write(tmp_path / f"b.{kind}", lists))) == [CHAT]
    other = write(tmp_path / f"c.{kind}", {**texts, "context": "c"})
    with pytest.raises(ValueError, match="3 columns that could be the text"):
        resolve_source(other)
    assert messages(resolve_source(other, text_field="+".join(pair))) == [CHAT]
    (one,) = resolve_source(other, text_field=pair[0]).documents()
    assert one.text == "Hi"


def test_a_repeated_column_is_refused_only_where_it_is_read(tmp_path: Path) -> None:
    for name, names in (("text", ["text", "text"]), ("id", ["id", "text", "id"])):
        table = pa.table([pa.array(["a"])] * len(names), names=names)
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"text\.parquet has several columns named 'text'; rename or remove"):
        resolve_source(str(tmp_path / "text.parquet"))
    assert [document.name for document in resolve_source(str(tmp_path / "id.parquet")).documents()] == ["id.parquet:1"]
    (tmp_path / "parts").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "parts/1.parquet")
    (tmp_path / "text.parquet").rename(tmp_path / "parts/2.parquet")
    with pytest.raises(ValueError, match=r"2\.parquet has several columns named 'text'"):
        list(resolve_source(str(tmp_path / "parts")).documents())


def test_a_row_without_the_text_is_refused_by_line_and_a_null_is_an_empty_document(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n{"txt": "b"}\n')
    documents = resolve_source(str(path)).documents()
    assert [next(documents).text, next(documents).text] == ["a", ""]
    with pytest.raises(ValueError, match=r"t\.jsonl:3: has no 'text', which holds the text; its keys: txt\. Give"):
        next(documents)


@pytest.mark.parametrize("value", [5, ["a"], {"a": "b"}])
def test_a_column_of_mixed_kinds_is_refused_by_row_with_the_remedy(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": value}) + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl:2: column 'text' holds \w+, not text: .*--text_field"):
        list(resolve_source(str(path)).documents())
    path.write_text(json.dumps({"messages": CHAT}) + '\n{"messages": "Hi"}\n')
    with pytest.raises(ValueError, match=r"no columns that could be the text; .*messages \(mixed\)"):
        resolve_source(str(path))
