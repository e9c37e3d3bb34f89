"""In what a checkpoint's weights are stored, from what its configuration says.

Promises: a form that is not read here is rejected by its name. Does not know what is computed from them.
"""

from pathlib import Path
from typing import Any, NamedTuple

from workers.models.checkpoint import Checkpoint, find_checkpoint, read_config

FOUR_BITS = ("nf4", "fp4")
PACKED = "bitsandbytes_packed_experts"
"""`quant_method` of our own checkpoints with a layer's experts in common tensors: other software does not know it."""
BLOCK = 64  # values that share a scale in NF4 and FP4; bitsandbytes' own, checked after every load
SCALE_BLOCK = 128  # rows, and columns, that share a scale in fp8_blocks; DeepSeek's
MX_BLOCK = 32  # values of a row that share a scale in MXFP4; the standard's
E4M3_FORMS = ("fp8", "fp8_blocks")
PUBLISHED = ("fp8_blocks", "mxfp4")
"""Forms that no quantizer here makes, and that may be quantized again while they are read."""


class Stored(NamedTuple):
    """In what a checkpoint's matrices are stored."""

    form: str
    """nf4, fp4, mxfp4 (experts only), fp8 (e4m3, one scale a matrix or a row), fp8_blocks (one for 128 × 128)."""
    scale: str = ""
    """What the name of a matrix's scale has behind the matrix's own, in e4m3."""

    @property
    def quantization(self) -> str:
        """What it is as a value of `--quantization`."""
        return "fp8" if self.form in E4M3_FORMS else self.form

    def loaded_form(self, quantization: str, matmul: str) -> str:
        """In which form the matrices are held: as they are stored, or as they are asked for.

        Products in fp8 take one scale a row, so that blocks are quantized again.
        """
        return self.form if quantization == self.quantization and matmul != "fp8" else quantization


def default_quantization(model: str | Path, revision: str | None, device_type: str) -> str:
    """What a model is captured in where nothing was asked for: what it is stored in, else nf4 on a GPU, none on a CPU.

    On a CPU a 4-bit matrix is dequantized before each of its products.
    """
    stored = stored_quantization(find_checkpoint(model, revision, weights=False))
    return stored or ("none" if device_type == "cpu" else "nf4")


def stored_quantization(checkpoint: Checkpoint) -> str | None:
    """What a checkpoint is stored in, as a value of `--quantization`; None where it is not quantized."""
    stored = stored_form(checkpoint)
    return None if stored is None else stored.quantization


def loaded_form(checkpoint: Checkpoint, quantization: str, matmul: str = "bf16") -> str:
    """In which form a checkpoint's matrices are held once it is loaded: `quantization`, fp8_blocks or mxfp4."""
    stored = stored_form(checkpoint)
    return quantization if stored is None else stored.loaded_form(quantization, matmul)


def stored_form(checkpoint: Checkpoint) -> Stored | None:
    """In what a checkpoint's matrices are stored; None where they are not quantized.

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
    if found := _published(settings):
        return found
    kind = settings.get("bnb_4bit_quant_type")
    method = settings.get("quant_method")
    known = method == PACKED or (method == "bitsandbytes" and settings.get("load_in_4bit"))
    if not known or kind not in FOUR_BITS:
        block = settings.get("weight_block_size")
        says = (
            settings.get("quant_method", stored),
            *(["8 bits"] if settings.get("load_in_8bit") else []),
            *([f"blocks of {block}"] if block else []),
        )
        raise ValueError(
            f"{checkpoint.folder} (model_type {config.get('model_type')}) holds weights that are quantized already"
            f" ({', '.join(map(str, says))}): only those of bitsandbytes in nf4 or fp4 are read, mxfp4, and e4m3 with"
            f" one scale a matrix, a row or a block of {SCALE_BLOCK} × {SCALE_BLOCK}; give the original checkpoint"
        )
    if not settings.get("bnb_4bit_use_double_quant"):
        raise ValueError(
            f"{checkpoint.folder} holds {kind} weights without double quantization, and {kind} means with it here:"
            f" give the original checkpoint (python jobs/quantize.py writes one in {kind})"
        )
    return Stored(str(kind))


def _published(settings: dict[str, Any]) -> Stored | None:
    """What a published checkpoint's settings say, where it is MXFP4 or e4m3 in a way that is read here."""
    whole = [SCALE_BLOCK, SCALE_BLOCK]
    match settings.get("quant_method"):
        case "mxfp4":
            return Stored("mxfp4")
        case "fp8" if settings.get("fmt", "e4m3") == "e4m3":
            if (block := settings.get("weight_block_size")) is not None:
                return Stored("fp8_blocks", "_scale_inv") if list(block) == whole else None
            # transformers means blocks where nothing is said of activations either
            return Stored("fp8", "_scale") if "activation_scheme" in settings else None
        case "fbgemm_fp8":
            return Stored("fp8", "_scale")
        case "modelopt":
            return Stored("fp8", "_scale") if settings.get("quant_algo") == "FP8" else None
        case "compressed-tensors":
            weights = [group.get("weights") or {} for group in settings.get("config_groups", {}).values()]
            if any((one.get("type"), one.get("num_bits")) != ("float", 8) for one in weights):
                return None
            strategies = {one.get("strategy") for one in weights}
            if strategies and strategies <= {"tensor", "channel"}:
                return Stored("fp8", "_scale")
            if strategies == {"block"} and all(one.get("block_structure") == whole for one in weights):
                return Stored("fp8_blocks", "_scale")
    return None
