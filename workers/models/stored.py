"""The form in which a checkpoint's weights are stored, from its configuration.

Promises: an unsupported form is rejected by name. Does not deal with the form used in computation.
"""

from pathlib import Path
from typing import Any, NamedTuple

from workers.models.checkpoint import Checkpoint, find_checkpoint, read_config

FOUR_BITS = ("nf4", "fp4")
PACKED = "bitsandbytes_packed_experts"
"""`quant_method` of this project's checkpoints with a layer's experts in common tensors; unknown to other software."""
BLOCK = 64  # values that share a scale in NF4 and FP4; the value of bitsandbytes, checked after every load
SCALE_BLOCK = 128  # rows, and columns, that share a scale in fp8_blocks; DeepSeek's
MX_BLOCK = 32  # values of a row that share a scale in MXFP4; the standard's
E4M3_FORMS = ("fp8", "fp8_blocks")
PUBLISHED = ("fp8_blocks", "mxfp4")
"""Forms that no quantizer here produces and that may be quantized again while they are read."""


class Stored(NamedTuple):
    """The form in which a checkpoint's matrices are stored."""

    form: str
    """nf4, fp4, mxfp4 (experts only), fp8 (e4m3, one scale per matrix or row), fp8_blocks (one scale per 128 × 128)."""
    scale: str = ""
    """For e4m3, the suffix that the name of a matrix's scale adds to the matrix's name."""

    @property
    def quantization(self) -> str:
        """The form as a value of `--quantization`."""
        return "fp8" if self.form in E4M3_FORMS else self.form

    def loaded_form(self, quantization: str, matmul: str) -> str:
        """The form in which matrices are held: the stored form or the requested one.

        Products in fp8 need one scale per row, so blocks are quantized again.
        """
        return self.form if quantization == self.quantization and matmul != "fp8" else quantization


def default_quantization(model: str | Path, revision: str | None, device_type: str) -> str:
    """The default quantization of a capture: the checkpoint's own; otherwise nf4 on a GPU and none on a CPU.

    On a CPU a 4-bit matrix is dequantized before each of its products.
    """
    stored = stored_quantization(find_checkpoint(model, revision, weights=False))
    return stored or ("none" if device_type == "cpu" else "nf4")


def stored_quantization(checkpoint: Checkpoint) -> str | None:
    """The quantization of a checkpoint as a value of `--quantization`; None if it is not quantized."""
    stored = stored_form(checkpoint)
    return None if stored is None else stored.quantization


def loaded_form(checkpoint: Checkpoint, quantization: str, matmul: str = "bf16") -> str:
    """The form in which a loaded checkpoint's matrices are held: `quantization`, fp8_blocks or mxfp4."""
    stored = stored_form(checkpoint)
    return quantization if stored is None else stored.loaded_form(quantization, matmul)


def stored_form(checkpoint: Checkpoint) -> Stored | None:
    """The form in which a checkpoint's matrices are stored; None if they are not quantized.

    Raises
    ------
    ValueError
        When they are stored in an unsupported form.
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
            f"{checkpoint.folder} (model_type {config.get('model_type')}) holds weights that are already quantized"
            f" ({', '.join(map(str, says))}): supported are those of bitsandbytes in nf4 or fp4, mxfp4, and e4m3 with"
            f" one scale per matrix, row or block of {SCALE_BLOCK} × {SCALE_BLOCK}; give the original checkpoint"
        )
    if not settings.get("bnb_4bit_use_double_quant"):
        raise ValueError(
            f"{checkpoint.folder} holds {kind} weights without double quantization, but {kind} requires it here:"
            f" give the original checkpoint (python jobs/quantize.py writes one in {kind})"
        )
    return Stored(str(kind))


def _published(settings: dict[str, Any]) -> Stored | None:
    """The form that a published checkpoint's settings describe, if it is MXFP4 or a supported form of e4m3."""
    whole = [SCALE_BLOCK, SCALE_BLOCK]
    match settings.get("quant_method"):
        case "mxfp4":
            return Stored("mxfp4")
        case "fp8" if settings.get("fmt", "e4m3") == "e4m3":
            if (block := settings.get("weight_block_size")) is not None:
                return Stored("fp8_blocks", "_scale_inv") if list(block) == whole else None
            # transformers assumes blocks if nothing is said about activations either
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
