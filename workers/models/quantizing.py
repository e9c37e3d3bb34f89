"""One matrix in NF4 or FP4, by bitsandbytes: what both kinds mean here."""

import logging
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from torch import nn

from workers.models.stored import BLOCK

# It would warn, on import, that a CPU kernel which we switch off (see Packing4bit) cannot be fetched.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# LLM.int8 says for every matrix that its inputs pass through float16; that is what int8 means here.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
# On import it has its optimizers and its fallbacks compiled, none of which run here; that would load torch's
# compiler, ten seconds of every process.
with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda plain: plain)):
    from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit

__all__ = ["QuantState", "packed_in_four_bits", "round_gates"]


def packed_in_four_bits(matrix: torch.Tensor, quantization: str) -> tuple[torch.Tensor, Any]:
    """What nf4 and fp4 mean here: packed values, and bitsandbytes' QuantState that tells how they are scaled."""
    packed, state = quantize_4bit(
        matrix.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type=quantization
    )
    return packed, state


def round_gates(routers: Iterable[nn.Module], quantization: str) -> None:
    """Give each matrix of the routers the values that it would have as a Linear4bit."""
    for router in routers:
        for parameter in router.parameters():
            if parameter.ndim == 2:
                parameter.data = dequantize_4bit(*packed_in_four_bits(parameter.data, quantization))
