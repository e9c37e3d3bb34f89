"""Loaded experts, one quantized Linear a matrix, into the tensors that all experts of a layer share.

Promises: the numbers stay what they are; layer by layer, each Linear is let go once its matrix is in its place.
"""

from typing import Any

import torch
from torch import nn

from workers.models.experts import PackedExperts
from workers.models.four_bits import FourBits
from workers.models.fp8 import E4M3
from workers.models.packed import PackedStack, Stack4bit, StackE4m3
from workers.models.products import Products
from workers.models.quantizer import UnfusedExperts
from workers.models.stored import BLOCK


def pack_experts(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the experts of every layer, in place.

    Parameters
    ----------
    dtype
        The compute dtype.

    Raises
    ------
    ValueError
        When a matrix does not fill blocks of 64 values.
    """
    products = Products(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, UnfusedExperts):
            model.set_submodule(name, _packed(module, products))


def _packed(experts: UnfusedExperts, products: Products) -> PackedExperts:
    linears = [expert.stacked() for expert in experts]
    both, down = (_stack([each[place] for each in linears]) for place in (0, 1))
    return PackedExperts(both, down, experts.gate, products)


def _stack(experts: list[tuple[Any, ...]]) -> PackedStack:
    """Of each expert's Linears, one below the other."""
    first = experts[0][0]
    rows, columns = first.out_features, first.in_features
    shape = len(experts), len(experts[0]), rows, columns
    if first.weight.dtype == E4M3:
        stack: PackedStack = StackE4m3(shape)
    elif rows * columns % BLOCK:
        raise ValueError(f"an expert's matrix of shape {(rows, columns)} does not fill blocks of {BLOCK} values")
    else:
        stack = Stack4bit(shape)
    for number, linear in enumerate(linear for expert in experts for linear in expert):
        stack.take(number, linear.row_scaled if isinstance(stack, StackE4m3) else FourBits.of(linear.weight))
        linear.weight.data = linear.weight.data.new_empty(0)
        linear.weight.quant_state = None
    return stack
