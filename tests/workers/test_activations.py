"""What a dry run tells of a card's memory: the parts that a configuration decides, and what cards showed."""

import json
from pathlib import Path

import pytest
import torch
from test_families import checkpoint_of

from workers.models.activations import CONTEXT_BYTES, estimate_working_bytes
from workers.models.checkpoint import find_checkpoint
from workers.models.footprint import estimate_bytes, estimate_checkpoint, option_that_fits

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def working(folder: Path, tokens: int, matmul: str = "bf16", quantization: str = "nf4") -> int | None:
    return estimate_working_bytes(folder, None, quantization, matmul, torch.bfloat16, tokens)


def test_more_tokens_take_more_and_a_model_without_its_own_forward_is_not_guessed(tmp_path: Path) -> None:
    olmoe, phimoe = checkpoint_of("olmoe", tmp_path / "olmoe"), checkpoint_of("phimoe", tmp_path / "phimoe")
    few, many = working(olmoe, 1024), working(olmoe, 2048)
    assert few is not None
    assert many is not None
    assert CONTEXT_BYTES < few < many < 2 * few
    assert working(phimoe, 1024) is None


def test_the_last_layer_s_experts_are_not_held_while_it_captures(tmp_path: Path) -> None:
    olmoe = checkpoint_of("olmoe", tmp_path / "olmoe")
    layers = json.loads((olmoe / "config.json").read_text())["num_hidden_layers"]
    whole, held = (estimate_bytes(olmoe, None, "nf4", last_experts=last) for last in (True, False))
    assert 0 < held < whole * (1 - 0.5 / layers)


@pytest.mark.parametrize(("quantization", "room", "option"), [("none", 0.9, "--quantization nf4"), ("nf4", 0.6, "4")])
def test_a_small_card_is_told_what_would_fit(tmp_path: Path, quantization: str, room: float, option: str) -> None:
    checkpoint = find_checkpoint(checkpoint_of("olmoe", tmp_path / "olmoe"), None, weights=False)
    free = int(room * estimate_checkpoint(checkpoint, quantization, torch.bfloat16))
    said = option_that_fits(checkpoint, quantization, torch.bfloat16, free)
    assert said.startswith(option if option.startswith("--") else f"--gpus_per_worker {option} ")


def test_what_cards_showed_is_within_5_percent_of_what_a_dry_run_tells() -> None:
    rows = json.loads((RESULTS / "gpu-families.json").read_text())["memory"]
    assert {row["model"] for row in rows} >= {"mixtral-8x7b", "qwen3-30b-a3b"}
    for row in rows:
        assert abs(row["estimated_gib"] / row["shown_gib"] - 1) <= 0.05, row
