"""Put the experts of a model on the meta device into common tensors, and find the names of their matrices in
checkpoints.

transformers 5 keeps the experts of a layer as two fused three-dimensional parameters; bitsandbytes quantizes Linears
and silently skips these parameters (bitsandbytes issue 1849), so that Mixtral 8x7B takes 91 GB instead of the expected
24.5. Here `PackedExperts` replace each fused module; `workers.models.stacking` fills them.

Promises: a new module computes the same as the fused one, which says whether its matrices are transposed, whether it
has biases, and how it is gated. Does not deal with routers or devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter
from transformers.integrations.moe import _default_apply_gate

from workers.models.experts import PackedExperts
from workers.models.packed import BLOCKS, STACKS, PackedStack
from workers.models.products import Products

BIASES = (".both_bias", ".down_bias")
FUSED = {"both": "gate_up_proj", "down": "down_proj"}
"""Maps the names of `PackedExperts`' stacks to those of transformers' fused parameters."""


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """transformers' modules, by name, that hold the experts of a layer as fused parameters."""
    return {
        name: module
        for name, module in model.named_modules()
        if set(FUSED.values()) <= {leaf for leaf, _ in module.named_parameters(recurse=False)}
        and module.get_parameter("gate_up_proj").ndim == 3
    }


def pack_skeleton(model: nn.Module, form: str, dtype: torch.dtype) -> None:
    """Replace every fused experts module of a model on the meta device, in place.

    Parameters
    ----------
    form
        Of `workers.models.packed.STACKS`.
    dtype
        The compute dtype.

    Raises
    ------
    ValueError
        When `PackedExperts` cannot do what a module does, or a matrix does not fill blocks of 64 values.
    """
    fused, products = fused_experts(model), Products(dtype)
    for name, module in model.named_modules():
        stacked = {leaf for leaf, each in module.named_parameters(recurse=False) if each.ndim == 3} & set(
            FUSED.values()
        )
        if stacked and name not in fused:
            raise ValueError(
                f"{name} ({type(module).__name__}) has the matrices of experts only in {', '.join(sorted(stacked))},"
                f" which {form} does not know; use --quantization none"
            )
    if fused:
        expert_leaves(model)  # for its checks
    for name, module in fused.items():
        if "has_bias" not in vars(module) or getattr(module, "has_post_expert_norm", False):
            raise ValueError(
                f"{name} ({type(module).__name__}) does not say what its experts compute, or says that a norm follows"
                f" each, which {form} does not know; use --quantization none"
            )
        both, down = (_stack(module.get_parameter(leaf), module, form) for leaf in FUSED.values())
        biased = dtype if module.has_bias else None
        model.set_submodule(name, PackedExperts(both, down, _gate(module), products, biased))
        # transformers may initialize a block's experts by the names of the fused parameters, which is not needed here
        model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]


def _stack(parameter: torch.Tensor, fused: Any, form: str) -> PackedStack:
    """A stack for a fused parameter. Gate and up are quantized separately if one is above the other."""
    experts, rows, columns = parameter.mT.shape if fused.is_transposed else parameter.shape
    parts = 2 if parameter is fused.gate_up_proj and fused.is_concatenated else 1
    shape = experts, parts, rows // parts, columns
    block = BLOCKS.get(form, 1)
    if (columns if form == "mxfp4" else rows // parts * columns) % block:
        raise ValueError(f"an expert's matrix of shape {shape[2:]} does not fill blocks of {block} values")
    return STACKS[form](shape, transposed=fused.is_transposed)


def _gate(fused: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The gate of `PackedExperts`: None for the plain gate with SiLU, otherwise the module's own function."""
    silu = type(getattr(fused, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")  # torch's and transformers' own
    if silu and type(fused)._apply_gate is _default_apply_gate:
        return None
    for leaf, _ in list(fused.named_parameters(recurse=False)):
        setattr(fused, leaf, None)
    gate: Callable[[torch.Tensor], torch.Tensor] = fused._apply_gate
    return gate


class Place(NamedTuple):
    """The place of an expert's matrix."""

    stack: str
    """Its name in the model."""
    number: int | None
    """The expert's number; None if the tensor has the matrices of all experts."""


def expert_leaves(model: Any) -> dict[str, list[str]]:
    """The names of an expert's matrices in checkpoints, by stack, in order; empty if checkpoints have them in one
    tensor.

    Read from transformers' conversion mapping.

    Raises
    ------
    ValueError
        When checkpoints store them in an unsupported way.
    """
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    fusing = fusing_converters(mapping)
    targets = [transform.target_patterns for transform in mapping if isinstance(transform, WeightConverter)]
    unknown = {target.rpartition(".")[2] for patterns in targets for target in patterns} & set(FUSED.values())
    if unknown != set(fusing) or len(fusing) == 1:
        raise ValueError(
            f"the checkpoints of {type(model).__name__} store the experts' matrices in a way that is not supported"
            f" ({', '.join(sorted(unknown))}), so they cannot be quantized; use --quantization none"
        )
    return {
        stack: [pattern.removesuffix(".weight").rpartition(".")[2] for pattern in fusing[leaf].source_patterns]
        for stack, leaf in FUSED.items()
        if leaf in fusing
    }


def fusing_converters(transforms: list[Any]) -> dict[str, Any]:
    """The converters that stack single experts into one parameter, by the last part of its name."""
    return {
        transform.target_patterns[0].rpartition(".")[2]: transform
        for transform in transforms
        if isinstance(transform, WeightConverter)
        and any(isinstance(operation, MergeModulelist) for operation in transform.operations)
        and transform.target_patterns[0].rpartition(".")[2] in FUSED.values()
    }


def expert_places(skeleton: Any) -> dict[str, Place]:
    """The place of each tensor with experts' matrices in any layout of a checkpoint, by the model's names.

    Parameters
    ----------
    skeleton
        The model after `pack_skeleton`.
    """
    packed = {name: module for name, module in skeleton.named_modules() if isinstance(module, PackedExperts)}
    leaves = expert_leaves(skeleton) if packed else {}
    places = {}
    for name, experts in packed.items():
        for place, fused in FUSED.items():
            stack = f"{name}.{place}"
            for whole in (f"{name}.{fused}", f"{name}.{fused}_blocks", f"{stack}.packed"):
                places[whole] = Place(stack, None)
            each = leaves.get(place, [])
            for number in range(len(experts) * len(each)):
                expert, part = divmod(number, len(each))
                places[f"{name}.{expert}.{each[part]}.weight"] = Place(stack, number)
    return places
