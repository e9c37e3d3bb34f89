"""A conversation that the chat template cannot take stops a capture or, if requested, is skipped, counted and named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ran

from jobs import status
from jobs.capturing.planner import encode
from jobs.sources.resolve import resolve_source
from store import CaptureGroup, Plan, coverage, open_capture
from workers.text.tokenizer import load_tokenizer
from workers.tiny import tiny_checkpoint

Command = Callable[..., Ran]
TEMPLATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)


@pytest.fixture
def capture(tmp_path: Path, command: Command) -> Callable[..., Ran]:
    """Captures four conversations, the last two of which start with the assistant."""
    model, chats = tmp_path / "model", tmp_path / "chats.jsonl"
    shutil.copytree(tiny_checkpoint(), model)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    turns = [{"role": role, "content": f"{role} speaks"} for role in ("user", "assistant")]
    chats.write_text(
        "".join(json.dumps({"id": f"chat {n}", "messages": turns[:: -1 if n > 1 else 1]}) + "\n" for n in range(4))
    )
    common = ["--local", "--device", "cpu", "--quantization", "none", "--model", model, "--dataset", chats]
    return lambda *more: command(*common, "--store", tmp_path / "s", *more)


def test_it_stops_the_capture_and_the_error_names_it_and_the_option(capture: Callable[..., Ran]) -> None:
    ran = capture()
    assert ran.status == 2
    assert "document 'chat 2': " in ran.err
    assert "roles must alternate" in ran.err
    assert "use --skip_unrenderable to skip such documents" in ran.err


def test_where_asked_it_is_left_out_counted_and_named(
    capture: Callable[..., Ran], command: Command, tmp_path: Path
) -> None:
    ran = capture("--skip_unrenderable")
    assert ran.status == 0, ran.err
    assert "document 2 ('chat 2') is skipped: " in ran.err
    assert "4 documents, 2 of them empty, 2 skipped because they cannot be rendered" in ran.err
    routes = open_capture(tmp_path / "s", "chats")
    assert routes.sizes["document"] == 4
    assert sorted(set(routes["document_id"].values.tolist())) == [0, 1]
    assert (routes.attrs["documents_skipped"], list(routes.attrs["skipped"])) == (2, ["chat 2", "chat 3"])
    assert CaptureGroup(tmp_path / "s", "chats").identity["skip_unrenderable"] is True
    shown = command(tmp_path / "s", main=status.main).out
    assert "chats: 2 documents were skipped because they cannot be rendered: 'chat 2', 'chat 3'" in shown
    told = json.loads(command(tmp_path / "s", "--json", main=status.main).out)["data_sets"][0]
    assert (told["documents_skipped"], told["skipped"]) == (2, ["chat 2", "chat 3"])
    assert capture("--skip_unrenderable").status == 0  # nothing to do
    assert "skip_unrenderable: the store has True, this run has False" in capture().err
    assert coverage(tmp_path / "s", "chats").complete


SAID = {"role": "user", "content": "Hi"}
BROKEN = {
    "a string in place of a message": [SAID, "Hello"],
    "no role": [SAID, {"content": "Hello"}],
    "a number as content": [SAID, {"role": "assistant", "content": 5}],
    "a string among the parts": [{"role": "user", "content": ["Hi"]}],
    "a string in place of the messages": "Hi",
    "a role that no template has": [SAID, {"role": "narrator", "content": "Hello"}],
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_conversation_of_another_form_is_skipped_too_and_else_stops_the_capture(broken: Any, tmp_path: Path) -> None:
    rows = [{"id": f"chat {n}", "messages": [SAID]} for n in range(101)] + [{"id": "odd", "messages": broken}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows[:2]]))
    source = resolve_source(str(tmp_path / "c.jsonl"))
    tokenizer = load_tokenizer(tiny_checkpoint())
    documents = list(source.documents(faulty=True))
    *_, odd, before, last = encode(documents, tokenizer, skip_unrenderable=True)
    assert (odd[0].name, len(odd[1]), last[0].fault) == ("odd", 0, None)
    assert len(before[1]) == len(last[1]) > 0
    assert odd[0].fault
    with pytest.raises(ValueError, match=f"document 'odd': {re.escape(odd[0].fault)}; use --skip_unrenderable"):
        list(encode(documents, tokenizer))


def test_a_row_of_another_form_is_skipped_counted_and_named_and_else_stops_the_capture(
    tmp_path: Path, command: Command
) -> None:
    rows = [{"messages": [SAID]}, {"messages": [SAID, "Hello"]}, {"prompt": "Hi"}, {"messages": [SAID]}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--dataset", tmp_path / "c.jsonl", "--store", tmp_path / "s", "--local", "--model", "tiny"]
    stopped = command(*options)
    assert stopped.status == 2
    assert "c.jsonl:2: column 'messages', message 1: not an object with a role and content: 'Hello'" in stopped.err
    assert "use --skip_unrenderable to skip such documents" in stopped.err
    ran = command(*options, "--skip_unrenderable")
    assert ran.status == 0, ran.err
    assert "document 1 ('c.jsonl:2') is skipped: c.jsonl:2: column 'messages', message 1: not an object" in ran.err
    assert "document 2 ('c.jsonl:3') is skipped: c.jsonl:3: has no 'messages'" in ran.err
    attrs = CaptureGroup(tmp_path / "s", "c").attrs
    assert (attrs["documents"], attrs["documents_skipped"]) == (4, 2)
    assert attrs["skipped"] == ["c.jsonl:2", "c.jsonl:3"]
    assert "2 documents were skipped because they cannot be rendered" in command(tmp_path / "s", main=status.main).out


def test_a_plan_without_skipped_documents_is_kept_as_before() -> None:
    assert Plan(rows=1, tokens=2, documents=1).record().keys() == Plan.__dataclass_fields__.keys() - {
        "documents_skipped",
        "skipped",
    }
    with pytest.raises(ValueError, match="says skipped"):
        Plan(skipped=(3,))  # type: ignore[arg-type]
