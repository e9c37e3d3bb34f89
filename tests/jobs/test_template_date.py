"""The date that a template uses as today is an option, and part of the identity if it changes tokens."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.capturing.options import CaptureConfig
from jobs.capturing.run import Run
from workers.tiny import tiny_checkpoint

CHAT = {"messages": [{"role": "user", "content": "What routes tokens?"}]}


def test_a_date_other_than_the_default_is_in_the_identity_of_conversations(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(), model)
    (model / "chat_template.jinja").write_text("{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}")
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "x"}))
    options = {"model": str(model), "store": str(tmp_path / "s.zarr"), "device": "cpu", "quantization": "none"}
    dates = {}
    for name, day in (("chat", "2024-07-26"), ("chat", "2025-01-09"), ("text", "2025-01-09")):
        run = Run(CaptureConfig(dataset=(str(tmp_path / f"{name}.jsonl"),), template_date=day, **options))  # type: ignore[arg-type]
        dates[name, day] = run.prepare(*run.sources()[0]).identity.get("template_date", "left out")
    assert list(dates.values()) == ["left out", "2025-01-09", "left out"]


def test_a_date_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="--template_date is 'today', but must be a date: YYYY-MM-DD"):
        CaptureConfig(template_date="today")
