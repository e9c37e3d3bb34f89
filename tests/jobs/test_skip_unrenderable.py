"""A conversation that the chat template cannot take stops a capture, or is left out, counted and named where asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Ran

from jobs import status
from store import CaptureGroup, Plan, coverage, open_capture
from workers.tiny import tiny_checkpoint

Command = Callable[..., Ran]
TEMPLATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)


@pytest.fixture
def capture(tmp_path: Path, command: Command) -> Callable[..., Ran]:
    """Captures four conversations, the last two of which begin with the assistant."""
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
    assert "--skip_unrenderable leaves such documents out" in ran.err


def test_where_asked_it_is_left_out_counted_and_named(
    capture: Callable[..., Ran], command: Command, tmp_path: Path
) -> None:
    ran = capture("--skip_unrenderable")
    assert ran.status == 0, ran.err
    assert "document 2 ('chat 2') is skipped: " in ran.err
    assert "4 documents, 2 of them empty, 2 skipped, which cannot be rendered" in ran.err
    routes = open_capture(tmp_path / "s", "chats")
    assert routes.sizes["document"] == 4
    assert sorted(set(routes["document_id"].values.tolist())) == [0, 1]
    assert (routes.attrs["documents_skipped"], list(routes.attrs["skipped"])) == (2, ["chat 2", "chat 3"])
    assert CaptureGroup(tmp_path / "s", "chats").identity["skip_unrenderable"] is True
    shown = command(tmp_path / "s", main=status.main).out
    assert "chats: 2 documents that cannot be rendered are skipped: 'chat 2', 'chat 3'" in shown
    told = json.loads(command(tmp_path / "s", "--json", main=status.main).out)["data_sets"][0]
    assert (told["documents_skipped"], told["skipped"]) == (2, ["chat 2", "chat 3"])
    assert capture("--skip_unrenderable").status == 0  # nothing to do
    assert "skip_unrenderable: the store has True, this run has False" in capture().err
    assert coverage(tmp_path / "s", "chats").complete


def test_a_plan_without_skipped_documents_is_kept_as_before() -> None:
    assert Plan(rows=1, tokens=2, documents=1).record().keys() == Plan.__dataclass_fields__.keys() - {
        "documents_skipped",
        "skipped",
    }
    with pytest.raises(ValueError, match="says skipped"):
        Plan(skipped=(3,))  # type: ignore[arg-type]
