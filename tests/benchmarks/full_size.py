"""Mixtral 8x7B at full size with random weights, created on the GPU, for the GPU benchmarks and tests."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from workers.models.description import quantization_config
from workers.models.experts import PackedExperts
from workers.models.family import find_routers
from workers.models.fp8 import rounded
from workers.models.fp8_loading import RowScaledLinear
from workers.models.loading import LoadedModel
from workers.models.published import Mxfp4
from workers.models.quantizers import quantize_skeleton
from workers.models.stacking import WAITING, quantized

WIDTH = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
}


def full_size_config(layers: int) -> transformers.MixtralConfig:
    """The published configuration with a number of layers."""
    return transformers.MixtralConfig(
        num_hidden_layers=layers, architectures=["MixtralForCausalLM"], dtype="bfloat16", sliding_window=None, **WIDTH
    )


def random_matrix(shape: tuple[int, ...], generator: torch.Generator, std: float | None = None) -> torch.Tensor:
    """bf16 on the GPU; rows of norm one by default."""
    values = torch.randn(shape, device="cuda", dtype=torch.float32, generator=generator)
    return (values * (shape[-1] ** -0.5 if std is None else std)).to(torch.bfloat16)


def random_mxfp4(shape: tuple[int, int], generator: torch.Generator) -> Mxfp4:
    """On the GPU; rows of norm one, about: the values of E2M1 have a root mean square of 2.9."""
    (rows, columns), options = shape, {"dtype": torch.uint8, "device": "cuda", "generator": generator}
    codes = torch.randint(0, 256, (1, rows, columns // 2), **options)
    exponent = 127 - round(math.log2(2.9 * columns**0.5))
    return Mxfp4(codes, torch.randint(exponent - 1, exponent + 1, (1, rows, columns // 32), **options))


def fill(part: nn.Module, generator: torch.Generator, quantization: str, *, keep: bool = False) -> None:
    """Fill everything that is still on the meta device with random numbers, quantized matrix by matrix.

    Parameters
    ----------
    part
        A model, or a part of one, after `quantize_skeleton`.
    keep
        Keep what a matrix was made from, as `original` of its module, of experts as `originals`.
    """
    for module in list(part.modules()):
        if isinstance(module, PackedExperts):
            _fill_experts(module, generator, quantization, keep)
        elif isinstance(module, RowScaledLinear):
            values, scale = rounded(random_matrix((module.out_features, module.in_features), generator))
            module.weight = nn.Parameter(values, requires_grad=False)
            module.weight_scale = nn.Parameter(scale[:, 0], requires_grad=False)
    for name, parameter in list(part.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module = part.get_submodule(owner)
        if not parameter.is_meta:
            continue
        if leaf in ("bias", "sinks"):
            made = nn.Parameter(random_matrix(tuple(parameter.shape), generator, 0.1), requires_grad=False)
        elif parameter.ndim == 1:
            made = nn.Parameter(torch.ones_like(parameter, device="cuda"), requires_grad=False)
        elif type(parameter).__name__ == "Params4bit":
            values = random_matrix((module.out_features, module.in_features), generator)
            if keep:
                module.original = values
            made = type(parameter)(
                values, requires_grad=False, quant_type=quantization, compress_statistics=True, module=module
            ).to("cuda")
        else:
            values = random_matrix(tuple(parameter.shape), generator, 1.0 if "embed" in name else None)
            made = nn.Parameter(values, requires_grad=False)
        setattr(module, leaf, made)


def _fill_experts(experts: PackedExperts, generator: torch.Generator, quantization: str, keep: bool) -> None:
    both, down = experts.both, experts.down
    if both.device.type != "meta":
        return
    originals = []
    for expert in range(len(experts)):
        matrices = []
        for stack in (both, down):
            for part in range(stack.parts):
                matrices.append(random_matrix((stack.rows // stack.parts, stack.columns), generator))
                found = random_mxfp4(matrices[-1].shape, generator) if quantization == "mxfp4" else None
                stack.take(expert * stack.parts + part, found or quantized(matrices[-1], quantization))
        originals.append(matrices)
    for stack in (both, down):
        stack._buffers.pop(WAITING, None)
    for name, bias in list(experts.named_buffers(recurse=False)):
        setattr(experts, name, random_matrix(tuple(bias.shape), generator, 0.1))
    if keep:
        experts.originals = originals


def full_size_model(layers: int, quantization: str = "nf4", experts: str = "eager", *, keep: bool = False) -> Any:
    """transformers' base model on the GPU, quantized matrix by matrix; seed 0.

    Parameters
    ----------
    experts
        transformers' back-end of fused experts, where nothing is quantized.
    keep
        Keep what a 4-bit matrix was made from, as `original` of its module; of experts, gate, up and down of each, as
        `originals` of theirs.
    """
    config = full_size_config(layers)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.set_experts_implementation(experts)
    settings = quantization_config(quantization, model, torch.bfloat16)
    if settings is not None:
        quantize_skeleton(model, settings)
    fill(model, torch.Generator("cuda").manual_seed(0), quantization, keep=keep)
    model.rotary_emb = type(model.rotary_emb)(config).to("cuda")
    return model.eval().requires_grad_(False)


def with_head(folder: Path, layers: int) -> Path:
    """A checkpoint with only the configuration and a random head."""
    config = full_size_config(layers)
    config.save_pretrained(folder)
    head = random_matrix((config.vocab_size, config.hidden_size), torch.Generator("cuda").manual_seed(2))
    save_file({"lm_head.weight": head.cpu()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_loaded(model: Any, matmul: str = "bf16", folder: Path = Path()) -> LoadedModel:
    """The model, as if `load_model` had loaded it from a folder."""
    return LoadedModel(
        folder=folder,
        model=model,
        routers=find_routers(model),
        num_experts=WIDTH["num_local_experts"],
        experts_per_token=WIDTH["num_experts_per_tok"],
        provenance={
            "model": "random",
            "quantization": "nf4",
            "expert_backend": "sorted",
            "matmul": matmul,
            "compute_dtype": "bfloat16",
        },
    )
