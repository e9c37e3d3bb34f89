"""In what a checkpoint's weights are stored, from what its configuration says.

Promises: a form that is not read here is rejected by its name. Does not know what is computed from them.
"""

from pathlib import Path
from typing import Any

from workers.models.checkpoint import Checkpoint, find_checkpoint, read_config

FOUR_BITS = ("nf4", "fp4")
PACKED = "bitsandbytes_packed_experts"
"""`quant_method` of our own checkpoints with a layer's experts in common tensors: other software does not know it."""
BLOCK = 64  # values that share a scale in NF4 and FP4; bitsandbytes' own, checked after every load


def default_quantization(model: str | Path, revision: str | None, device_type: str) -> str:
    """What a model is captured in where nothing was asked for: what it is stored in, else nf4 on a GPU, none on a CPU.

    On a CPU a 4-bit matrix is dequantized before each of its products.
    """
    stored = stored_quantization(find_checkpoint(model, revision, weights=False))
    return stored or ("none" if device_type == "cpu" else "nf4")


def stored_quantization(checkpoint: Checkpoint) -> str | None:
    """In what a checkpoint's weights are stored: nf4, fp4, fp8, or None where they are not quantized.

    Raises
    ------
    ValueError
        When they are stored in a form that is not read here.
    """
    config = read_config(checkpoint.folder)
    stored = config.get("quantization_config")
    if stored is None:
        return None
    settings = stored if isinstance(stored, dict) else {}
    if _row_scaled(settings):
        return "fp8"
    kind = settings.get("bnb_4bit_quant_type")
    method = settings.get("quant_method")
    known = method == PACKED or (method == "bitsandbytes" and settings.get("load_in_4bit"))
    if not known or kind not in FOUR_BITS:
        block = settings.get("weight_block_size")
        found = (
            settings.get("quant_method", stored),
            *(["8 bits"] if settings.get("load_in_8bit") else []),
            *([f"blocks of {block}"] if block else []),
        )
        raise ValueError(
            f"{checkpoint.folder} (model_type {config.get('model_type')}) holds weights that are quantized already"
            f" ({', '.join(map(str, found))}): only those of bitsandbytes in nf4 or fp4 are read, and e4m3 with one"
            " scale a matrix or a row; give the original checkpoint, or where that is quantized itself (gpt_oss,"
            " deepseek_v3) a copy in bfloat16"
        )
    if not settings.get("bnb_4bit_use_double_quant"):
        raise ValueError(
            f"{checkpoint.folder} holds {kind} weights without double quantization, and {kind} means with it here:"
            f" give the original checkpoint (python jobs/quantize.py writes one in {kind})"
        )
    return str(kind)


def _row_scaled(settings: dict[str, Any]) -> bool:
    """Whether a published checkpoint's settings say e4m3 with one scale a matrix or a row."""
    match settings.get("quant_method"):
        case "fp8":  # transformers means blocks where nothing is said of activations either
            whole = "activation_scheme" in settings and not settings.get("weight_block_size")
            return whole and settings.get("fmt", "e4m3") == "e4m3"
        case "fbgemm_fp8":
            return True
        case "modelopt":
            return settings.get("quant_algo") == "FP8"
        case "compressed-tensors":
            weights = [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]
            return bool(weights) and all(
                (one.get("type"), one.get("num_bits")) == ("float", 8) and one.get("strategy") in ("tensor", "channel")
                for one in weights
            )
    return False
