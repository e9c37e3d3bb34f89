"""The experts of a model on the meta device in common tensors, and what checkpoints call their matrices.

transformers 5 keeps the experts of a layer as two fused three-dimensional parameters; bitsandbytes quantizes Linears
and passes those by without a word (bitsandbytes issue 1849), so that Mixtral 8x7B loads into 91 GB where 24.5 are
expected. Here `PackedExperts` take the place of each fused module; `workers.models.stacking` fills them.

Promises: a module that comes out computes what the fused one computes, which says of itself whether its matrices are
transposed, have biases, and how they are gated. Does not know routers or devices.
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
"""Names of `PackedExperts`' stacks → of transformers' fused parameters."""


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
        When a module does what `PackedExperts` do not, or a matrix does not fill blocks of 64 values.
    """
    fused, products = fused_experts(model), Products(dtype)
    for name, module in model.named_modules():
        stacked = {leaf for leaf, each in module.named_parameters(recurse=False) if each.ndim == 3} & set(
            FUSED.values()
        )
        if stacked and name not in fused:
            raise ValueError(
                f"{name} ({type(module).__name__}) has the matrices of experts in {', '.join(sorted(stacked))} alone,"
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
        # transformers may initialize a block's experts by the names of what was fused; nothing here waits for that
        model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]


def _stack(parameter: torch.Tensor, fused: Any, form: str) -> PackedStack:
    """For a fused parameter; gate and up are quantized each by itself where one lies above the other."""
    experts, rows, columns = parameter.mT.shape if fused.is_transposed else parameter.shape
    parts = 2 if parameter is fused.gate_up_proj and fused.is_concatenated else 1
    shape = experts, parts, rows // parts, columns
    block = BLOCKS.get(form, 1)
    if (columns if form == "mxfp4" else rows // parts * columns) % block:
        raise ValueError(f"an expert's matrix of shape {shape[2:]} does not fill blocks of {block} values")
    return STACKS[form](shape, transposed=fused.is_transposed)


def _gate(fused: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What `PackedExperts` take: nothing for the plain one with SiLU, else the module's own function."""
    silu = type(getattr(fused, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")  # torch's, transformers' own
    if silu and type(fused)._apply_gate is _default_apply_gate:
        return None
    for leaf, _ in list(fused.named_parameters(recurse=False)):
        setattr(fused, leaf, None)
    gate: Callable[[torch.Tensor], torch.Tensor] = fused._apply_gate
    return gate


class Place(NamedTuple):
    """Where an expert's matrix goes."""

    stack: str
    """The model's name of it."""
    number: int | None
    """Of its matrices; None where the tensor has all of them."""


def expert_leaves(model: Any) -> dict[str, list[str]]:
    """What checkpoints call the matrices of an expert, by stack, in order; none where they keep them in one tensor.

    Read from transformers' conversion mapping.

    Raises
    ------
    ValueError
        When they keep them in a way that is not read here.
    """
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    fusing = fusing_converters(mapping)
    targets = [transform.target_patterns for transform in mapping if isinstance(transform, WeightConverter)]
    unknown = {target.rpartition(".")[2] for patterns in targets for target in patterns} & set(FUSED.values())
    if unknown != set(fusing) or len(fusing) == 1:
        raise ValueError(
            f"the checkpoints of {type(model).__name__} keep the experts' matrices in a way that is not read here"
            f" ({', '.join(sorted(unknown))}), so that they cannot be quantized; use --quantization none"
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
    """Where each tensor with experts' matrices goes, whichever way a checkpoint holds them, by the model's names.

    Parameters
    ----------
    skeleton
        After `pack_skeleton`.
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
