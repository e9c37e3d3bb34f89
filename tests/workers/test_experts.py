"""The outputs of experts, in grouped products and one by one, compared with a loop over tokens in float64."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Params4bit
from expert_matrices import expert_matrices
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workers.models import experts as module
from workers.models import fp8
from workers.models.experts import PackedExperts, outputs_in_groups, outputs_one_by_one
from workers.models.four_bits import FourBits
from workers.models.packed import Stack4bit, StackE4m3
from workers.models.products import Fp8Products, Products

HIDDEN, INNER = 128, 64
ONE_EXPERT = 3 * HIDDEN * INNER * 4  # bytes in float32
Gate = Callable[[torch.Tensor], torch.Tensor]


def interleaved(both: torch.Tensor) -> torch.Tensor:
    """A gate of another kind, as in gpt-oss: gate and up alternate and are clamped."""
    gate, up = both[..., ::2].clamp(max=1.0), both[..., 1::2].clamp(-1.0, 1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def swiglu(both: torch.Tensor) -> torch.Tensor:
    gate, up = both[..., :INNER], both[..., INNER:]
    return gate / (1 + torch.exp(-gate)) * up


@cache
def packed(experts: int, gate: Gate | None = None, biased: bool = False, kind: str = "nf4") -> PackedExperts:
    """Random experts, quantized one by one."""
    generator = torch.Generator().manual_seed(experts)
    stacks = []
    for shape in ((experts, 2, INNER, HIDDEN), (experts, 1, HIDDEN, INNER)):
        stack: Any = StackE4m3(shape) if kind == "fp8" else Stack4bit(shape)
        for number in range(experts * shape[1]):
            matrix = torch.randn(shape[2:], generator=generator) / shape[3] ** 0.5
            if kind == "fp8":
                stack.take(number, fp8.rounded(matrix))
            else:
                weight = Params4bit(matrix, requires_grad=False, quant_type=kind, compress_statistics=True)
                stack.take(number, FourBits.of(weight.to("cpu")))
        stacks.append(stack)
    found = PackedExperts(*stacks, gate, Products(torch.float32), torch.float32 if biased else None)
    if biased:
        found.both_bias = torch.randn(experts, 2 * INNER, generator=generator)
        found.down_bias = torch.randn(experts, HIDDEN, generator=generator)
    return found


def by_tokens(experts: PackedExperts, states: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Each choice's output, one at a time, in float64; shape (T, K, H)."""
    matrices = [[matrix.double() for matrix in one] for one in expert_matrices(experts)]
    found = torch.zeros(*chosen.shape, HIDDEN, dtype=torch.float64)
    for token, k in product(*map(range, chosen.shape)):
        expert = int(chosen[token, k])
        gate, up, down = matrices[expert]
        both = torch.cat([gate, up]) @ states[token].double()
        if experts.both_bias is not None:
            both += experts.both_bias[expert].double()
        found[token, k] = down @ (experts.gate or swiglu)(both)
        if experts.down_bias is not None:
            found[token, k] += experts.down_bias[expert].double()
    return found


def routes(seed: int, tokens: int, experts: int, k: int, chosen_ones: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random states and choices, with a limited number of chosen experts, at least k, which may be any."""
    random = np.random.default_rng(seed)
    used = random.permutation(experts)[: max(k, chosen_ones)]
    chosen = np.stack([random.permutation(used)[:k] for _ in range(tokens)])
    return torch.from_numpy(random.normal(size=(tokens, HIDDEN))).float(), torch.from_numpy(chosen)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 12),
    experts=st.sampled_from([1, 5, 7]),
    k=st.integers(1, 7),
    chosen_ones=st.integers(1, 7),
    group=st.integers(0, 7),
    spare=st.integers(0, 2),
    outputs=st.sampled_from([outputs_in_groups, outputs_one_by_one]),
)
@example(0, 12, 7, 1, 1, 2, 1, outputs_in_groups)  # all tokens on one expert, the others without any
@example(0, 12, 7, 1, 1, 2, 1, outputs_one_by_one)
@example(0, 12, 7, 1, 1, 0, 0, outputs_in_groups)  # an expert above the limit
@example(0, 12, 7, 1, 1, 0, 0, outputs_one_by_one)
def test_each_choice_s_output_is_that_of_its_expert_alone(
    seed: int, tokens: int, experts: int, k: int, chosen_ones: int, group: int, spare: int, outputs: Any
) -> None:
    k, own = min(k, experts), packed(experts)
    states, chosen = routes(seed, tokens, experts, k, chosen_ones)
    with mock.patch.object(module, "GROUP_BYTES", max(1, group * ONE_EXPERT)):
        rows, slot = outputs(own.products, own, states, chosen, spare)
    assert rows.shape == (tokens * (k + spare), HIDDEN)
    assert sorted(slot.flatten().tolist()) == list(range(tokens * k)), "each slot once, the spare ones never"
    torch.testing.assert_close(rows[slot].double(), by_tokens(own, states, chosen), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [1, 3, 100])
@pytest.mark.parametrize("gate", [None, interleaved])
@pytest.mark.parametrize("biased", [False, True])
def test_biases_and_a_gate_of_the_family_s_own_are_applied(gate: Gate | None, biased: bool, group: int) -> None:
    own = packed(7, gate, biased)
    states, chosen = routes(1, 20, 7, 3, 6)
    with mock.patch.object(module, "GROUP_BYTES", group * ONE_EXPERT):
        rows, slot = outputs_in_groups(own.products, own, states, chosen)
        weights = torch.rand(20, 3)
        mixed = own(states, chosen, weights)
    wanted = by_tokens(own, states, chosen)
    torch.testing.assert_close(rows[slot].double(), wanted, rtol=1e-4, atol=1e-5)
    of_tokens = (wanted * weights.double()[..., None]).sum(dim=1)
    torch.testing.assert_close(mixed.double(), of_tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("multiplied", [Products, Fp8Products])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "fp8"])
def test_how_experts_are_grouped_changes_no_bit(kind: str, multiplied: type[Products]) -> None:
    own, products = packed(7, kind=kind), multiplied(torch.float32)
    for stack in (own.both, own.down):
        products.prepare_stack(stack)
    states, chosen = routes(2, 30, 7, 2, 6)
    found = []
    for group, outputs in product((1, 2, 3, 100), (outputs_in_groups, outputs_one_by_one)):
        with mock.patch.object(module, "GROUP_BYTES", group * ONE_EXPERT):
            rows, slot = outputs(products, own, products.operand(states), chosen)
        found.append(rows[slot])
    assert all(torch.equal(found[0], other) for other in found[1:])
    wanted = by_tokens(own, states, chosen)
    apart = (found[0].double() - wanted).norm() / wanted.norm()
    assert apart < (1e-5 if multiplied is Products else 0.08)
    assert multiplied is Products or apart > 1e-3, "nothing was rounded to e4m3"


def test_matrices_are_dequantized_into_the_same_memory_by_every_layer_and_group() -> None:
    own, other = packed(7), packed(5)
    products = Products(torch.float32)
    states, chosen = routes(3, 4, 5, 2, 5)
    with mock.patch.object(module, "GROUP_BYTES", 2 * ONE_EXPERT):
        for layer in (own, other, own):
            outputs_in_groups(products, layer, states, chosen)
    held = sum(buffer.nbytes for buffer in products._buffers.values())
    assert held == 2 * ONE_EXPERT


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        (
            Stack4bit((2, 1, 16, 96)),
            r"\(16, 96\) cannot be multiplied in fp8, .* of 16 and columns of 64: use --matmul",
        ),
        (Stack4bit((2, 1, 24, 64)), r"\(24, 64\) cannot be multiplied in fp8"),
        (StackE4m3((2, 1, 16, 24)), r"\(16, 24\) cannot be multiplied in fp8, .* of 16 and columns of 16"),
    ],
)
def test_matrices_that_cannot_be_multiplied_in_fp8_are_rejected_by_their_shape(stack: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Fp8Products(torch.float32).prepare_stack(stack)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_captures_that_began_with_one_linear_a_matrix_get_its_very_bytes(kind: str) -> None:
    experts, tokens, k = packed.__wrapped__(5, kind=kind), 30, 2
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(tokens, HIDDEN, generator=generator)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:k] for _ in range(tokens)])  # never the fifth
    weights = torch.rand(tokens, k, generator=generator)
    wanted = torch.zeros_like(states)
    for number, (gate, up, down) in enumerate(expert_matrices(experts)):  # like that version, expert after expert
        slots = (chosen.flatten() == number).nonzero().flatten()
        rows = states[slots // k]
        linear = torch.nn.functional.linear
        output = linear(torch.nn.functional.silu(linear(rows, gate)) * linear(rows, up), down)
        wanted.index_add_(0, slots // k, output * weights.flatten()[slots, None])
    experts.compute_unfused()
    assert torch.equal(experts(states, chosen, weights), wanted)


def test_experts_that_never_were_single_linears_are_not_computed_as_such() -> None:
    with pytest.raises(ValueError, match="with biases"):
        packed.__wrapped__(3, biased=True).compute_unfused()
