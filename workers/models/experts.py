"""Computes the experts for the tokens that chose them, in grouped products or one by one.

T tokens, K choices per token, S = T·K slots sorted by expert, E experts, H hidden, I inner width.

Many small experts are computed in one grouped product without synchronizing with the host. A few large experts have
their own products, in parts, so that memory stays bounded when routing is skewed; this takes one synchronization per
layer. Matrices are dequantized in groups of experts of at most `GROUP_BYTES`.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from workers.models.biased import add_biases
from workers.models.kernels import mixed
from workers.models.packed import PackedStack
from workers.models.products import Products

GROUP_BYTES = 2 << 30  # of dequantized matrices at a time; a layer of Qwen3-30B-A3B has 1.2 GB, of DeepSeek-V3 22 GB


class PackedExperts(nn.Module):
    """The experts of a layer: ``down(gate(x @ both.T + bias)) + bias``; replaces transformers' fused module.

    Parameters
    ----------
    both, down
        The matrices; `both` has gate and up in the order that `gate` expects.
    gate
        A function from (S, 2·I) to (S, I); None is SiLU of the first half times the second half.
    products
        Multiplies when transformers' forward pass calls the experts; has the buffers that all layers share.
    biased
        The dtype of the biases, of shapes (E, rows), if there are any.
    """

    both_bias: torch.Tensor | None
    down_bias: torch.Tensor | None
    unfused: bool = False
    """See `compute_unfused`."""

    def __init__(
        self,
        both: PackedStack,
        down: PackedStack,
        gate: Callable[[torch.Tensor], torch.Tensor] | None,
        products: Products,
        biased: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.both, self.down, self.gate, self.products = both, down, gate, products
        for name, stack in (("both_bias", both), ("down_bias", down)):
            empty = None if biased is None else torch.empty(stack.experts, stack.rows, dtype=biased, device="meta")
            self.register_buffer(name, empty)

    def __len__(self) -> int:
        return self.both.experts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The signature of transformers' module: shapes (T, H), (T, K) and (T, K) to (T, H)."""
        if self.unfused:
            return mixed_one_by_one(self._as_linears, len(self), hidden_states, top_k_index, top_k_weights)
        operand = self.products.operand(hidden_states)
        rows_SH, slot_TK = outputs_in_groups(self.products, self, operand, top_k_index)
        return mixed(rows_SH, slot_TK, top_k_weights).to(hidden_states.dtype)

    def compute_unfused(self) -> None:
        """From now on, compute like the versions that had one Linear for each matrix, so that their captures can be
        resumed.

        Raises
        ------
        ValueError
            When those versions rejected such experts: those with biases, or with gate and up in one matrix.
        """
        if self.both_bias is not None or self.both.parts != 2:
            raise ValueError(
                "experts with biases, or gate and up in one matrix, were never unfused: omit expert_backend"
            )
        self.unfused = True

    def _as_linears(self, expert: int, rows_SH: torch.Tensor) -> torch.Tensor:
        """An expert without biases, with one product for each matrix."""
        group = _dequantized(self.products, self, expert, expert + 1)
        [both], [down] = group.both, group.down
        gate, up = (nn.functional.linear(rows_SH, part) for part in both.chunk(2))
        gated = nn.functional.silu(gate) * up if self.gate is None else self.gate(torch.cat([gate, up], dim=-1))
        return nn.functional.linear(gated, down)


def mixed_one_by_one(
    compute: Callable[[int, torch.Tensor], torch.Tensor],
    experts: int,
    hidden_TH: torch.Tensor,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """Mix the chosen experts' outputs in float32. An expert without tokens is not computed.

    One synchronization per call. Deterministic: no token occurs twice within one ``index_add_``, and the calls follow
    the order of experts.

    Parameters
    ----------
    compute
        A function from an expert's number and rows (S, H) to its outputs for them.
    """
    expert_S, slot_S = expert_TK.flatten().sort(stable=True)
    token_S = slot_S // expert_TK.shape[-1]
    weight_S = weight_TK.flatten()[slot_S]
    ends = torch.searchsorted(expert_S, torch.arange(experts, device=slot_S.device), right=True).tolist()
    mixed_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
    for expert, (start, end) in enumerate(pairwise([0, *ends])):
        if start < end:
            token = token_S[start:end]
            output = compute(expert, hidden_TH[token])
            mixed_TH.index_add_(0, token, output.float() * weight_S[start:end, None].float())
    return mixed_TH.to(hidden_TH.dtype)


class Slots(NamedTuple):
    """The place of each choice among all choices, sorted by expert."""

    token_S: torch.Tensor
    """The token of each slot."""
    expert_S: torch.Tensor
    slot_TK: torch.Tensor
    """The slot of each choice."""
    ends_E: torch.Tensor
    """int64: the end of each expert's slots."""


def sorted_slots(expert_TK: torch.Tensor, experts: int) -> Slots:
    """Sort choices by expert, and those of one expert by token."""
    narrow = torch.uint8 if experts <= 256 else torch.int16  # a GPU sorts faster if there are fewer bits
    expert_S, order_S = expert_TK.flatten().to(narrow).sort(stable=True)
    slot_TK = torch.empty_like(order_S)
    slot_TK[order_S] = torch.arange(len(order_S), device=order_S.device)
    each = torch.arange(experts, device=order_S.device).to(narrow)
    ends_E = torch.searchsorted(expert_S, each, right=True)
    return Slots(order_S // expert_TK.shape[1], expert_S, slot_TK.view_as(expert_TK), ends_E)


def outputs_in_groups(
    products: Products, experts: PackedExperts, operand: Any, expert_TK: torch.Tensor, spare: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen experts' outputs by slot, and the slot of each choice.

    Parameters
    ----------
    operand
        An operand of `products`, T rows.
    spare
        Number of additional rows per token, at the end, for the caller.

    Returns
    -------
    rows_SH : tensor, shape (S + spare·T, H)
    slot_TK : int64 tensor
    """
    slots = sorted_slots(expert_TK, len(experts))
    taken = products.taken(operand, slots.token_S)
    groups = list(_groups(products, experts))
    if len(groups) == 1:
        found = [_in_group(products, experts, taken, slots, slice(None), *groups[0])]
    else:
        bounds = [0, *slots.ends_E.tolist()]
        parts = [slice(bounds[first], bounds[last]) for first, last in groups]
        found = [
            _in_group(products, experts, taken, slots, part, *group) for part, group in zip(parts, groups, strict=True)
        ]
    if spare:
        found.append(found[0].new_empty(spare * len(expert_TK), found[0].shape[1]))
    return found[0] if len(found) == 1 else torch.cat(found), slots.slot_TK


def _in_group(
    products: Products, experts: PackedExperts, taken: Any, slots: Slots, part: slice, first: int, last: int
) -> torch.Tensor:
    """The outputs of some experts for their slots."""
    ends_N = (slots.ends_E[first:last] - (part.start or 0)).int()
    both = products.grouped(products.rows(taken, part), products.matrices("both", experts.both, first, last), ends_N)
    if experts.both_bias is not None:
        add_biases(both, experts.both_bias, slots.expert_S[part])
    inner = _gated(products, experts, both)
    del both  # large tensors are freed before more are allocated
    rows = products.grouped(inner, products.matrices("down", experts.down, first, last), ends_N)
    if experts.down_bias is not None:
        add_biases(rows, experts.down_bias, slots.expert_S[part])
    return rows


def outputs_one_by_one(
    products: Products, experts: PackedExperts, operand: Any, expert_TK: torch.Tensor, spare: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`outputs_in_groups` with each expert by itself, for experts without biases that are gated by SiLU."""
    slots = sorted_slots(expert_TK, len(experts))
    ends = _fetched(slots.ends_E)
    groups = _groups(products, experts)
    group = _dequantized(products, experts, *next(groups))  # while the ends are copied
    taken = products.taken(operand, slots.token_S)
    many = len(slots.token_S) + spare * len(expert_TK)
    rows_SH = torch.empty(many, experts.down.rows, dtype=products.dtype, device=expert_TK.device)
    for expert, (start, end) in enumerate(pairwise([0, *ends()])):
        if expert == group.last:
            group = _dequantized(products, experts, *next(groups))
        both, down = (products.one(each, expert - group.first) for each in (group.both, group.down))
        for part in products.parts(start, end) if start < end else ():
            inner = products.gated(products.multiply(products.rows(taken, part), both))
            products.multiply(inner, down, out=rows_SH[part])
            del inner  # before the next one is allocated
    return rows_SH, slots.slot_TK


class _Group(NamedTuple):
    first: int
    last: int
    both: Any
    down: Any


def _dequantized(products: Products, experts: PackedExperts, first: int, last: int) -> _Group:
    both, down = (
        products.matrices(place, stack, first, last)
        for place, stack in (("both", experts.both), ("down", experts.down))
    )
    return _Group(first, last, both, down)


def _groups(products: Products, experts: PackedExperts) -> Iterator[tuple[int, int]]:
    """First and last expert of each group, of nearly equal sizes."""
    values = sum(stack.rows * stack.columns for stack in (experts.both, experts.down))
    many = number_of_groups(len(experts), values * products.buffer_dtype.itemsize)
    edges = [len(experts) * group // many for group in range(many + 1)]
    yield from pairwise(edges)


def number_of_groups(experts: int, bytes_of_one: int) -> int:
    """The number of groups in which the experts are dequantized, given the bytes of a dequantized expert."""
    return min(experts, -(-experts * bytes_of_one // GROUP_BYTES))


def _gated(products: Products, experts: PackedExperts, both: torch.Tensor) -> Any:
    return products.gated(both) if experts.gate is None else products.operand(experts.gate(both))


def _fetched(numbers: torch.Tensor) -> Callable[[], list[int]]:
    """A few numbers that are copied to the host. Work that is launched before they are read runs meanwhile."""
    copy = numbers.to("cpu", non_blocking=True)
    copied = torch.cuda.Event() if numbers.is_cuda else None  # type: ignore[no-untyped-call]
    if copied is not None:
        copied.record(torch.cuda.current_stream(numbers.device))

    def wait() -> list[int]:
        if copied is not None:
            copied.synchronize()
        found: list[int] = copy.tolist()
        return found

    return wait
