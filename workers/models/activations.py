"""How many bytes a GPU holds besides the weights while it captures, from the configuration alone.

T tokens in a micro-batch, K choices per token, S = T·K slots, E experts, H hidden, I inner width. Only for the forward
passes of `workers.models.decoder`, whose peak is known: the two products of an expert. A test compares it with what
torch's allocator took and what the GPU showed for Mixtral 8x7B and Qwen3-30B-A3B.
"""

from pathlib import Path
from typing import Any

import torch

from workers.models.checkpoint import find_checkpoint
from workers.models.decoder import DecoderForward, MixtralForward
from workers.models.description import build_skeleton
from workers.models.experts import number_of_groups
from workers.models.family import experts_per_token, num_experts
from workers.models.forwards import own_forward
from workers.models.products import FP8_ROWS, ROWS

CONTEXT_BYTES = int(1.28 * 2**30)  # of the driver and libraries (measured on an H200)
KEPT = 1.055  # memory that torch reserves / its peak allocation (measured three times: 1.054 to 1.059)


def estimate_working_bytes(
    model: str | Path, revision: str | None, quantization: str, matmul: str, dtype: torch.dtype, tokens: int
) -> int | None:
    """`working_bytes` of a checkpoint, which is found as by `workers.models.footprint.estimate_bytes`."""
    skeleton = build_skeleton(find_checkpoint(model, revision, weights=False), dtype)
    return working_bytes(skeleton, quantization, matmul, dtype, tokens)


def card_bytes(weights: int, working: int) -> int:
    """Bytes that a GPU shows as used while it captures, from those of its weights and `working_bytes`."""
    return int((weights + working) * KEPT) + CONTEXT_BYTES


def working_bytes(skeleton: Any, quantization: str, matmul: str, dtype: torch.dtype, tokens: int) -> int | None:
    """Bytes of activations and of buffers for dequantized matrices.

    Parameters
    ----------
    skeleton
        The base model on the meta device.
    quantization, matmul, dtype
        As in its description.
    tokens
        Maximum number of tokens in a micro-batch, padding included.

    Returns
    -------
    int or None
        None if this project has no own forward pass for the model, or its peak is not known.
    """
    forward = own_forward(skeleton, quantization)
    if forward is None or forward not in (DecoderForward, MixtralForward):
        return None
    config, wide = skeleton.config, dtype.itemsize
    narrow = 1 if matmul == "fp8" else wide
    choices, experts, layers = experts_per_token(config), num_experts(config), config.num_hidden_layers
    inner, hidden = _inner(skeleton), config.hidden_size
    slots = tokens * choices
    one = 3 * hidden * inner
    buffers = 0
    if (quantization, matmul) != ("fp8", "fp8"):
        buffers = -(-experts // number_of_groups(experts, one * narrow)) * one * narrow
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    width = (config.num_attention_heads + 2 * config.num_key_value_heads) * head
    buffers += (width + config.num_attention_heads * head) * hidden * narrow
    scales = 4 * layers * experts * (2 * inner + hidden) if matmul == "fp8" and quantization != "fp8" else 0
    if forward.expert_backend == "sorted":
        rows = min(slots, FP8_ROWS if matmul == "fp8" else ROWS)
        taken = slots * hidden if matmul == "fp8" else rows * hidden * wide
        at_once = slots * hidden * wide + taken + rows * inner * (2 * wide + narrow)
    else:
        taken, both, gated = slots * hidden * narrow, slots * 2 * inner * wide, slots * inner * narrow
        down = gated + slots * hidden * wide
        at_once = taken + max(both + gated, down) if matmul == "fp8" else max(taken + both, both + gated, down)
    every_token = tokens * hidden * (2 * wide + (narrow if matmul == "fp8" else 0))  # the residual and its norm
    recorded = layers * slots * (8 + 4)
    total: int = buffers + scales + at_once + every_token + recorded
    return total


def _inner(skeleton: Any) -> int:
    """The inner width of an expert."""
    down = next(parameter for name, parameter in skeleton.named_parameters() if name.endswith("experts.down_proj"))
    return int(down.shape[-1])
