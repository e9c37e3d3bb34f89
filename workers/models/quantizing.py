"""Quantize one matrix to NF4 or FP4 with bitsandbytes: the definition of both formats here."""

import logging
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch import nn

from workers.models.stored import BLOCK

# On import it would warn that a CPU kernel, which is switched off here (see Packing4bit), cannot be fetched.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# LLM.int8 warns for every matrix that its inputs are cast to float16, which is intended here.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
# On import it compiles its optimizers and fallbacks, none of which run here. That would load torch's compiler, which
# takes ten seconds in every process.
with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda plain: plain)):
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

__all__ = ["QuantState", "packed_in_four_bits", "round_gates"]


def packed_in_four_bits(matrix: torch.Tensor, quantization: str) -> tuple[torch.Tensor, Any]:
    """The definition of nf4 and fp4 here: packed values, and bitsandbytes' QuantState with their scales."""
    packed, state = quantize_4bit(
        matrix.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=quantization
    )
    return packed, state


def round_gates(routers: Iterable[nn.Module], quantization: str) -> None:
    """Round each matrix of the routers to the values that it would have as a Linear4bit."""
    for router in routers:
        for parameter in router.parameters():
            if parameter.ndim == 2:
                parameter.data = dequantize_4bit(*packed_in_four_bits(parameter.data, quantization))
