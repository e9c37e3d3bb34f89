"""A dry run's estimate of a GPU's memory: the parts that a configuration decides, and measurements on GPUs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from test_families import checkpoint_of

from workers.models.activations import card_bytes, estimate_working_bytes
from workers.models.checkpoint import find_checkpoint
from workers.models.footprint import estimate_bytes, estimate_checkpoint, option_that_fits

MEMORY = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "gpu-memory.json").read_text())


def working(folder: Path, tokens: int, matmul: str = "bf16", quantization: str = "nf4") -> int | None:
    return estimate_working_bytes(folder, None, quantization, matmul, torch.bfloat16, tokens)


def test_more_tokens_take_more_and_a_model_without_its_own_forward_is_not_guessed(tmp_path: Path) -> None:
    olmoe, phimoe = checkpoint_of("olmoe", tmp_path / "olmoe"), checkpoint_of("phimoe", tmp_path / "phimoe")
    few, many = working(olmoe, 1024), working(olmoe, 2048)
    assert few is not None
    assert many is not None
    assert 0 < few < many < 2 * few
    assert working(phimoe, 1024) is None
    for name in ("gpt_oss", "deepseek_v2"):
        assert working(checkpoint_of(name, tmp_path / name), 1024) is None, "not compared with a card"


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


CONFIGS = {
    "qwen3-30b-a3b": transformers.Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        vocab_size=151936, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
    ),
    "mixtral-8x7b": transformers.MixtralConfig(dtype="bfloat16", architectures=["MixtralForCausalLM"]),
}  # fmt: skip
"""The published configurations."""


@pytest.mark.parametrize("row", MEMORY["rows"], ids=lambda row: f"{row['model']}-{row['matmul']}")
def test_what_a_card_took_and_showed_is_within_5_percent_of_what_is_told_beforehand(
    row: dict[str, Any], tmp_path: Path
) -> None:
    CONFIGS[row["model"]].save_pretrained(tmp_path)
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    weights = estimate_bytes(tmp_path, None, "nf4", "cuda", last_experts=False)
    work = working(tmp_path, row["tokens"], row["matmul"])
    assert work is not None
    assert (weights + work) / 2**30 == pytest.approx(row["allocated_gib"], rel=0.05)
    assert card_bytes(weights, work) / 2**30 == pytest.approx(row["shown_gib"], rel=0.05)
