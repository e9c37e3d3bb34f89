"""The steps between matrix products: plain forms compared with independent ones, kernels with their plain forms."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, apply_rotary_pos_emb
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

from workers.models.biased import add_biases, clamped_swiglu
from workers.models.kernels import HeadNorm, Place, add_norm, rotate, swiglu
from workers.models.products import FP8_ROWS, ROWS, Fp8Products, Products

DRIVER = Path(__file__).parents[1] / "kernels_driver.py"
CASES, ON_A_CARD = 33, 4
STEPS = {"torch.float32": 2e-6, "torch.bfloat16": 2.0**-7}


def test_swiglu_is_the_gate_s_silu_times_the_other_half() -> None:
    both = torch.randn(4, 10, dtype=torch.float64).float()
    gate, up = both[:, :5].double(), both[:, 5:].double()
    torch.testing.assert_close(swiglu(both).double(), gate / (1 + torch.exp(-gate)) * up, rtol=1e-6, atol=1e-6)


def test_the_gate_of_gpt_oss_and_its_biases_are_transformers_own() -> None:
    experts = GptOssExperts(GptOssConfig(num_local_experts=3, hidden_size=4, intermediate_size=6, swiglu_limit=1.5))
    both, bias, expert = 9 * torch.randn(5, 12), torch.randn(3, 12), torch.tensor([0, 2, 2, 1, 0], dtype=torch.uint8)
    wanted = experts._apply_gate(both + torch.stack([bias[number] for number in expert.tolist()]))
    add_biases(both, bias, expert)
    assert (both.abs() > experts.limit).any(), "transformers 5.17 has 7 whatever the configuration says"
    torch.testing.assert_close(clamped_swiglu(both, experts.alpha, experts.limit), wanted)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_part_of_each_head_is_rotated_and_nothing_else_changes(pairs: bool) -> None:
    """The definition, number by number: value and partner are a point in the plane, which is rotated."""
    rows, positions, heads, head, turned, first = 2, 5, 3, 10, 6, 4
    given, angle = torch.randn(rows * positions, first + heads * head + 3), torch.randn(positions, turned // 2)
    wanted = given.clone()
    for token in range(len(given)):
        for start in range(first + head - turned, first + heads * head, head):
            for lane in range(turned // 2):
                low = start + (2 * lane if pairs else lane)
                high = low + (1 if pairs else turned // 2)
                x, y, turn = given[token, low], given[token, high], angle[token % positions, lane]
                wanted[token, low] = x * turn.cos() - y * turn.sin()
                wanted[token, high] = y * turn.cos() + x * turn.sin()
    tables = (torch.cat([part, part], dim=-1) for part in (angle.cos(), angle.sin()))
    rotate(given, *tables, heads, place=Place(first, head, pairs=pairs))
    torch.testing.assert_close(given, wanted)


def test_heads_are_rotated_as_transformers_rotates_them_and_the_values_are_left_alone() -> None:
    rows, positions, heads, groups, head = 2, 5, 4, 2, 8
    qkv = torch.randn(rows * positions, (heads + 2 * groups) * head)
    cos, sin = torch.randn(positions, head), torch.randn(positions, head)
    split = qkv.view(rows, positions, -1, head).transpose(1, 2).split([heads, groups, groups], dim=1)
    query, key = apply_rotary_pos_emb(split[0], split[1], cos[None], sin[None])
    wanted = torch.cat([query, key, split[2]], dim=1).transpose(1, 2).reshape_as(qkv)
    rotate(qkv, cos, sin, heads + groups)
    torch.testing.assert_close(qkv, wanted)


@pytest.mark.parametrize(("head", "heads", "groups"), [(8, 4, 2), (12, 5, 1)])
@pytest.mark.parametrize("norm", [Qwen3MoeRMSNorm, OlmoeRMSNorm])
def test_heads_are_normed_before_as_the_family_norms_them(norm: type[Any], head: int, heads: int, groups: int) -> None:
    """Qwen3-MoE has a norm for each head; OLMoE has one for all queries of a token and one for its keys."""
    rows, positions, whole = 2, 5, norm is OlmoeRMSNorm
    qkv = torch.randn(rows * positions, (heads + 2 * groups) * head)
    cos, sin = torch.randn(positions, head), torch.randn(positions, head)
    norms = [norm(many * head if whole else head, 1e-5) for many in (heads, groups)]
    for each in norms:
        torch.nn.init.normal_(each.weight)
    split = qkv.split([heads * head, groups * head, groups * head], dim=1)
    query, key = (
        (each(part) if whole else each(part.reshape(-1, head))).view(rows, positions, -1, head).transpose(1, 2)
        for each, part in zip(norms, split, strict=False)
    )
    query, key = apply_rotary_pos_emb(query, key, cos[None], sin[None])
    wanted = torch.cat([torch.cat([query, key], dim=1).transpose(1, 2).reshape(len(qkv), -1), split[2]], dim=1)
    scales = [each.weight.view(-1, head).expand(many, -1) for each, many in zip(norms, (heads, groups), strict=True)]
    rotate(qkv, cos, sin, heads + groups, HeadNorm(torch.cat(scales), 1e-5, heads, whole))
    torch.testing.assert_close(qkv, wanted.detach())


def test_what_is_added_stays_in_the_residual_and_the_norm_is_transformers_own() -> None:
    norm = MixtralRMSNorm(MixtralConfig(hidden_size=16).hidden_size, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    rows, weight, slot = torch.randn(6, 16), torch.rand(3, 2), torch.tensor([[5, 0], [1, 4], [2, 3]])
    of_slots = torch.stack([weight[t, 0] * rows[slot[t, 0]] + weight[t, 1] * rows[slot[t, 1]] for t in range(3)])
    cases = [((), torch.zeros(3, 16)), ((rows[:3],), rows[:3]), ((rows, slot, weight), of_slots)]
    for added, mixed in cases:
        residual = torch.randn(3, 16)
        before = residual.clone()
        normed = add_norm(residual, norm.weight.detach(), 1e-5, *added)
        torch.testing.assert_close(residual, before + mixed)
        torch.testing.assert_close(normed, norm(before + mixed).detach())


@pytest.mark.parametrize(("kind", "most"), [(Products, ROWS), (Fp8Products, FP8_ROWS)])
def test_an_expert_s_slots_are_computed_in_parts_that_hold_each_once(kind: type[Products], most: int) -> None:
    for start, end in ((0, 1), (7, 7 + most), (3, 4 + 2 * most)):
        parts = list(kind(torch.float32).parts(start, end))
        assert [slot for part in parts for slot in range(part.start, part.stop)] == list(range(start, end))
        assert max(part.stop - part.start for part in parts) <= most


def compared(**environment: str) -> dict[str, dict[str, list[float]]]:
    command = [sys.executable, str(DRIVER)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, list[float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def expect_equal(found: dict[str, dict[str, list[float]]], cases: int) -> None:
    for dtype, differences in found.items():
        assert len(differences) == cases
        for name, relative in differences.items():
            assert max(relative) <= STEPS[dtype], (dtype, name, relative)
            if name in ("dequantize nf4", "dequantize fp4") and dtype == "torch.bfloat16":
                assert relative == [0.0, 0.0], "the compute dtype of a GPU: the very weights that bitsandbytes gives"


def test_every_kernel_computes_its_plain_form_interpreted() -> None:
    expect_equal(compared(TRITON_INTERPRET="1"), CASES)


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_every_kernel_computes_its_plain_form_on_a_gpu() -> None:
    expect_equal(compared(), CASES + ON_A_CARD)
