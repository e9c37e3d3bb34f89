"""The identity and the routers of a mixture-of-experts model, from its configuration alone.

Promises: nothing here reads or creates weights (the model is built on the meta device, with shapes only), and
`workers.models.loading.load_model` with the same arguments loads the described model.
"""

from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers
from torch import nn

from workers.models.checkpoint import Checkpoint, find_checkpoint
from workers.models.family import (
    HOW_TO_ADD,
    experts_per_token,
    has_experts,
    num_experts,
    read,
    recordable_routers,
    unquantized,
)
from workers.models.forwards import Forward, own_forward
from workers.models.stored import E4M3_FORMS, FOUR_BITS, PUBLISHED, Stored, stored_form

QUANTIZATIONS = (*FOUR_BITS, "mxfp4", "fp8", "int8", "none")
MATMULS = ("bf16", "fp8")
FP8_CAPABILITY = (8, 9)  # of the first GPUs that compute with e4m3: L4, RTX 4090; H100 has 9.0
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
UNFUSED, GROUPED = EARLIER = ("unfused", "grouped")
"""Values of `expert_backend` of captures that started before their family had its present forward pass."""
EXPERTS_OF_TRANSFORMERS = ("eager", "grouped_mm")  # values of `expert_backend` that its loader accepts


class ModelDescription(TypedDict):
    """The part of a capture's identity that describes the model."""

    model: str
    """Hub id, or the name of a local folder."""
    model_revision: str
    """Hub commit, or ``sha256:…``, the fingerprint of a local folder."""
    quantization: str
    """nf4, fp4, mxfp4, fp8, int8 or none; nf4 and fp4 mean blocks of 64 with double quantization; fp8 means e4m3 with
    one scale per row, or with the scales of `weight_scales`."""
    weight_scales: str
    """For weights in fp8: ``row``; ``128x128`` if the checkpoint has a scale per block; ``row of 128x128`` if such
    weights are quantized again for products in fp8."""
    matmul: str
    """The precision of products with quantized matrices: bf16, which means `compute_dtype`, or fp8."""
    compute_dtype: str
    """float32, bfloat16 or float16: the dtype of activations, of unquantized weights, and of dequantized weights."""
    gate_precision: str
    """The precision of the routers' weights: `compute_dtype`, or `quantization` if they were rounded to it as by
    transformers 4."""
    expert_backend: str
    """``sorted`` (Mixtral: products of one expert after the other), ``grouped`` (one product for many experts),
    ``grouped_sinks`` and ``grouped_latent`` (like grouped, with the attention of gpt-oss and of DeepSeek computed here
    instead of by transformers), ``unfused`` (one Linear per matrix: int8, and captures that older versions started), or
    transformers' ``eager`` or ``grouped_mm`` if nothing is quantized."""
    attention: str
    """transformers' ``sdpa``, or ``eager`` for a family that has no other implementation there (gpt_oss; see
    `expert_backend`)."""
    layers: list[int]
    """The model's own numbers of the layers that have a router."""
    num_experts: int
    experts_per_token: int
    vocab_size: int
    max_position_embeddings: int


def describe_model(
    model: str | Path,
    revision: str | None = None,
    quantization: str = "nf4",
    device_type: str = "cuda",
    *,
    dtype: str | None = None,
    quantize_gates: bool = False,
    matmul: str = "bf16",
    expert_backend: str | None = None,
) -> ModelDescription:
    """Describe what `load_model` with the same arguments would load; reads the configuration but no weights.

    A local folder is identified by its fingerprint, for which about 0.2 GB of 93 are read.

    Parameters
    ----------
    model, revision, quantization
        As for `load_model`.
    device_type
        "cuda" or "cpu": decides the compute dtype if `dtype` is not given, and how experts are computed.
    dtype, quantize_gates, matmul, expert_backend
        As for `load_model`.

    Returns
    -------
    ModelDescription
        The part of a capture's identity that describes the model.

    Raises
    ------
    ValueError
        When the checkpoint cannot be captured as requested.
    """
    checkpoint = find_checkpoint(model, revision, weights=False)
    return describe_checkpoint(
        checkpoint,
        quantization,
        device_type,
        compute_dtype(device_type, dtype),
        quantize_gates=quantize_gates,
        matmul=matmul,
        expert_backend=expert_backend,
    )


def build_skeleton(checkpoint: Checkpoint, dtype: torch.dtype, *, head: bool = False) -> Any:
    """The model on the meta device: every module and shape, no weights. Its attention is sdpa if it supports that.

    Parameters
    ----------
    head
        Whether to include the language-model head.
    """
    kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        with torch.device("meta"):
            return kind.from_config(config, dtype=dtype, attn_implementation=None, trust_remote_code=False)
    except Exception as error:  # for an invalid configuration, classes raise errors of many kinds
        raise ValueError(
            f"transformers {transformers.__version__} cannot build the model of "
            f"{checkpoint.folder / 'config.json'}: {error}"
        ) from error


def compute_dtype(device_type: str, asked: str | None = None) -> torch.dtype:
    """The requested dtype; by default float32 on a CPU and bfloat16 on a GPU."""
    if asked not in (None, *COMPUTE_DTYPES):
        raise ValueError(f"dtype {asked!r} is none of {', '.join(COMPUTE_DTYPES)}")
    dtype: torch.dtype = getattr(torch, asked or ("float32" if device_type == "cpu" else "bfloat16"))
    return dtype


def _expert_backend(skeleton: Any, quantization: str, device_type: str, asked: str | None) -> str:
    """How experts are computed: by this project's forward pass for the family, or by one of transformers'
    implementations.

    Of transformers' implementations, eager was 1.4 times as fast as grouped_mm on a CPU (8 experts, 4,096 tokens), with
    equal results.
    """
    if quantization == "int8" or (asked == UNFUSED and quantization != "none"):
        return UNFUSED
    if (own := _asked_forward(skeleton, quantization, asked)) is not None:
        return own.expert_backend
    if quantization != "none":
        return "grouped"
    return "eager" if device_type == "cpu" else "grouped_mm"


def _asked_forward(skeleton: Any, quantization: str, asked: str | None) -> type[Forward] | None:
    """This project's forward pass for the family, unless another one was requested."""
    own = own_forward(skeleton, quantization)
    return own if own is not None and asked in (None, own.expert_backend) else None


def describe_checkpoint(
    checkpoint: Checkpoint,
    quantization: str,
    device_type: str,
    dtype: torch.dtype,
    *,
    quantize_gates: bool,
    matmul: str = "bf16",
    expert_backend: str | None = None,
) -> ModelDescription:
    """`describe_model` for a checkpoint that has already been found."""
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization {quantization!r} is none of {', '.join(QUANTIZATIONS)}")
    if matmul not in MATMULS:
        raise ValueError(f"matmul {matmul!r} is none of {', '.join(MATMULS)}")
    if expert_backend not in (None, *EARLIER):
        raise ValueError(
            f"expert_backend {expert_backend!r} is none of {', '.join(EARLIER)}, the only values to give: omit it"
        )
    if quantize_gates and quantization not in FOUR_BITS:
        raise ValueError(
            f"routers can be quantized only as {' or '.join(FOUR_BITS)}, but quantization is {quantization!r}"
        )
    if "fp8" in (quantization, matmul):
        _refuse_fp8(quantization, matmul, device_type, dtype)
    stored = stored_form(checkpoint)
    _refuse_other_than_stored(checkpoint, stored, quantization)
    skeleton = build_skeleton(checkpoint, dtype)
    layers = list(recordable_routers(skeleton))
    config = skeleton.config.get_text_config()
    if not layers:
        raise ValueError(
            f"{checkpoint.folder} holds a {type(skeleton).__name__} (model_type {config.model_type!r}), "
            "which has no routers: only mixture-of-experts models can be captured"
            + (f", and the routers of its experts are not known; {HOW_TO_ADD}" if has_experts(skeleton) else "")
        )
    own = _asked_forward(skeleton, quantization, expert_backend)
    if matmul not in (own.matmuls if own else MATMULS[:1]):
        raise ValueError(
            f"--matmul {matmul} needs a forward pass of this project that supports it, but"
            f" {type(skeleton).__name__} in {quantization} has none: use --matmul bf16"
        )
    computed_in = str(dtype).removeprefix("torch.")
    return ModelDescription(
        model=checkpoint.model,
        model_revision=checkpoint.revision,
        quantization=quantization,
        weight_scales=_weight_scales(stored, quantization, matmul),
        matmul=matmul,
        compute_dtype=computed_in,
        gate_precision=quantization if quantize_gates else computed_in,
        expert_backend=_expert_backend(skeleton, quantization, device_type, expert_backend),
        attention=skeleton.config._attn_implementation,
        layers=layers,
        num_experts=num_experts(config),
        experts_per_token=experts_per_token(config),
        vocab_size=read(config, ("vocab_size",)),
        max_position_embeddings=read(config, ("max_position_embeddings",)),
    )


def _refuse_other_than_stored(checkpoint: Checkpoint, stored: Stored | None, quantization: str) -> None:
    """Check that weights are used as stored. Published ones may be quantized again, and nothing is converted to
    MXFP4."""
    if stored is None:
        if quantization == "mxfp4":
            raise ValueError(
                f"{checkpoint.folder} holds weights that are not quantized, but mxfp4 is only supported for models"
                " that are published in it, such as gpt-oss: use --quantization nf4"
            )
        return
    kept = stored.quantization
    again = FOUR_BITS if stored.form in PUBLISHED else ()
    if quantization not in (kept, *again):
        others = f" or {again[0]!r}, in which they are quantized again" if again else ""
        raise ValueError(
            f"{checkpoint.folder} holds {kept} weights, but quantization {quantization!r} was requested: use"
            f" {kept!r}{others}, or give the original checkpoint"
        )


def _weight_scales(stored: Stored | None, quantization: str, matmul: str) -> str:
    if stored is None or stored.form != "fp8_blocks" or quantization != "fp8":
        return "row"
    return "row of 128x128" if matmul == "fp8" else "128x128"


def _refuse_fp8(quantization: str, matmul: str, device_type: str, dtype: torch.dtype) -> None:
    """Raise an error that says what is missing for weights or products in fp8."""
    if matmul == "fp8" and quantization not in (*FOUR_BITS, "fp8"):
        raise ValueError(f"fp8 products are for weights in nf4, fp4 or fp8, but quantization is {quantization!r}")
    if device_type != "cuda":
        return
    if matmul == "fp8" and dtype != torch.bfloat16:
        raise ValueError(f"fp8 products are bfloat16 on a GPU, but the compute dtype is {dtype}: use --dtype bfloat16")
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < FP8_CAPABILITY:
        raise ValueError(
            f"fp8 needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))} or more (L4, RTX 4090, H100),"
            f" but {torch.cuda.get_device_name()} has {'.'.join(map(str, found))}: use --matmul bf16, and another"
            " --quantization than fp8"
        )


def quantization_config(form: str, skeleton: nn.Module, dtype: torch.dtype) -> Any:
    """Settings for transformers, or None for ``none``. Routers stay unchanged.

    Parameters
    ----------
    form
        The form in which matrices are held: a value of `quantization`, or fp8_blocks.
    """
    if form == "none":
        return None
    names = unquantized(skeleton)
    if form in (*E4M3_FORMS, "mxfp4"):
        from workers.models.fp8_loading import StoredConfig  # it imports bitsandbytes, which takes seconds

        return StoredConfig(form, names, str(dtype).removeprefix("torch."))
    if form == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=names)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=form,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=names,
    )
