"""How many bytes a quantized model takes, from its configuration alone.

Promises: no weights are read or created. Activations are not counted.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from workers.models.checkpoint import Checkpoint, find_checkpoint
from workers.models.description import build_skeleton, compute_dtype, quantization_config
from workers.models.family import experts_per_token, find_routers, num_experts
from workers.models.stored import BLOCK, FOUR_BITS, PUBLISHED, loaded_form, stored_form

_SCALE_BLOCK = 256  # scales that share a second scale under double quantization; likewise


def estimate_bytes(
    model: str | Path,
    revision: str | None = None,
    quantization: str = "nf4",
    device_type: str = "cuda",
    *,
    dtype: str | None = None,
    last_experts: bool = True,
) -> int:
    """Bytes of all weights of the model without its head, quantized as requested. Activations are not counted.

    Parameters
    ----------
    model, revision, quantization
        As for `load_model`.
    device_type
        "cuda" or "cpu": decides the compute dtype if `dtype` is not given.
    dtype
        As for `load_model`.
    last_experts
        Whether to count the experts of the last layer. They are read and dropped, because no router follows them.

    Returns
    -------
    int
        Bytes, the scales of quantized matrices included.

    Raises
    ------
    ValueError
        When the checkpoint does not exist, or its configuration cannot be read.
    """
    checkpoint = find_checkpoint(model, revision, weights=False)
    return estimate_checkpoint(checkpoint, quantization, compute_dtype(device_type, dtype), last_experts=last_experts)


def operations_per_token(model: str | Path, revision: str | None = None) -> int:
    """Operations for one token in the matrices that it passes through: two for each weight.

    Only the k chosen experts of a layer count. Embedding, head and the products within attention are left out.
    """
    skeleton = build_skeleton(find_checkpoint(model, revision, weights=False), torch.float32)
    config = skeleton.config.get_text_config()
    chosen, experts = experts_per_token(config), num_experts(config)
    embedding = skeleton.get_input_embeddings().weight
    weights = 0
    for name, weight in skeleton.named_parameters():
        if weight is not embedding and weight.dim() > 1:
            weights += weight.numel() * chosen // experts if ".experts." in name else weight.numel()
    return 2 * weights


def estimate_checkpoint(
    checkpoint: Checkpoint, quantization: str, dtype: torch.dtype, *, last_experts: bool = True
) -> int:
    """`estimate_bytes` for a checkpoint that has already been found; optionally without the experts of the last
    layer."""
    skeleton, _ = quantized_skeleton(checkpoint, quantization, dtype)
    tensors = [*skeleton.named_parameters(), *skeleton.named_buffers()]
    names = {module: name for name, module in skeleton.named_modules()}
    last = names[list(find_routers(skeleton).values())[-1]].rpartition(".")[0]
    left_out = () if last_experts else (f"{last}.experts.",)
    return sum(_resident_bytes(tensor) for name, tensor in tensors if not name.startswith(left_out))


def option_that_fits(checkpoint: Checkpoint, quantization: str, dtype: torch.dtype, free_bytes: int) -> str:
    """What to try if a model's weights do not fit into the free bytes.

    If the model is spread over several GPUs, half of each one's memory is left for activations and buffers.
    """
    stored = stored_form(checkpoint)
    if quantization not in FOUR_BITS and (stored is None or stored.form in PUBLISHED):
        smaller = estimate_checkpoint(checkpoint, "nf4", dtype)
        if smaller < free_bytes:
            return f"--quantization nf4, which takes {smaller:,}"
    needed = estimate_checkpoint(checkpoint, quantization, dtype)
    return f"--gpus_per_worker {-(-2 * needed // max(free_bytes, 1))} with as many GPUs of this size, or a larger GPU"


def quantized_skeleton(
    checkpoint: Checkpoint, quantization: str, dtype: torch.dtype, matmul: str = "bf16"
) -> tuple[nn.Module, Any]:
    """The model on the meta device with each matrix in its quantized form, and its `quantization_config`."""
    skeleton = build_skeleton(checkpoint, dtype)
    settings = quantization_config(loaded_form(checkpoint, quantization, matmul), skeleton, dtype)
    if settings is not None:
        from workers.models.quantizers import quantize_skeleton  # bitsandbytes takes seconds to import

        quantize_skeleton(skeleton, settings)
    return skeleton, settings


def _resident_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a quantized weight, including its scales."""
    match type(tensor).__name__:
        case "Params4bit":
            scales = -(-tensor.numel() // BLOCK)
            tables = (16 + 256 + 1) * 4  # the 16 values, the 256 values of the scales, their offset
            return -(-tensor.numel() // 2) + scales + -(-scales // _SCALE_BLOCK) * 4 + tables
        case "Int8Params":
            return tensor.numel() + tensor.shape[0] * 4
        case _:
            return tensor.nbytes
