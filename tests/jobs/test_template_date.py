"""What a template takes for today is an option, and part of the identity where it changes tokens."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.capturing.options import CaptureConfig
from jobs.capturing.run import Run
from workers.tiny import tiny_checkpoint

CHAT = {"messages": [{"role": "user", "content": "What routes tokens?"}]}
CLOCK = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0].content }}"


@pytest.mark.parametrize("clock", [True, False])
def test_a_date_other_than_the_default_is_in_the_identity_where_the_template_writes_it(
    clock: bool, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(), model)
    (model / "chat_template.jinja").write_text(CLOCK if clock else "{{ messages[0].content }}")
    (tmp_path / "chat.jsonl").write_text(json.dumps(CHAT))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "x"}))
    identities, ids = [], []
    for day in ("2024-07-26", "2025-01-09"):
        for name in ("chat", "text"):
            config = CaptureConfig(
                model=str(model), dataset=(str(tmp_path / f"{name}.jsonl"),), template_date=day, device="cpu",
                quantization="none", store=str(tmp_path / "s.zarr"),
            )  # fmt: skip
            run = Run(config)
            identities.append(
                run.prepare(*run.sources()[0]).identity.get("template_date") if name != "text" or clock else None
            )
        ids.append(run.tokenizer.chat(CHAT["messages"])[0].tolist())
    assert identities == [None, None, "2025-01-09" if clock else None, None]
    assert (ids[0] != ids[1]) is clock


def test_a_date_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="--template_date is 'today', and must be a date: YYYY-MM-DD"):
        CaptureConfig(template_date="today")
