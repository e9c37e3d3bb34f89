"""Match a checkpoint's tensors with the model's matrices, from names alone."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from workers.models.packing import Place, expert_places
from workers.models.quantizer import quantized_linears


class QuantizedNames(NamedTuple):
    """The quantized tensors of a checkpoint, by the checkpoint's names."""

    linears: set[str]
    """One tensor for each Linear."""
    experts: dict[str, Place]
    """The place of each tensor with experts' matrices; for packed experts, the tensor with the values."""


def own_names(skeleton: Any, names: Iterable[str]) -> dict[str, str]:
    """Maps the checkpoint's name of each tensor to the name that the base model would use."""
    renamings = [
        transform
        for transform in get_model_conversion_mapping(skeleton, add_legacy=False)
        if isinstance(transform, WeightRenaming)
    ]
    found = {}
    for name in names:
        own = name
        for renaming in renamings:
            own, _ = renaming.rename_source_key(own)
        found[name] = own.removeprefix(f"{skeleton.base_model_prefix}.")
    return found


def quantized_names(skeleton: Any, names: Iterable[str]) -> QuantizedNames:
    """Which tensors of a checkpoint are matrices of the model that are quantized.

    Parameters
    ----------
    skeleton
        The base model after `workers.models.quantizers.quantize_skeleton`.
    names
        Names of tensors in the checkpoint.

    Raises
    ------
    ValueError
        When a quantized matrix of the model has no tensor.
    """
    own = own_names(skeleton, names)
    wanted, places = {f"{name}.weight" for name in quantized_linears(skeleton)}, expert_places(skeleton)
    linears = {name for name, known in own.items() if known in wanted}
    experts = {name: places[known] for name, known in own.items() if known in places}
    there = {own[name] for name in (*linears, *experts)}
    whole = {place.stack for place in experts.values() if place.number is None}
    for stack, each in _each(places).items():
        wanted |= set() if stack in whole else each
    missing = wanted - there
    if missing:
        raise ValueError(
            f"{len(missing)} of the matrices that should be quantized are not in the checkpoint:"
            f" {', '.join(sorted(missing)[:5])}"
        )
    return QuantizedNames(linears, experts)


def _each(places: dict[str, Place]) -> dict[str, set[str]]:
    """For each stack, the names of its single matrices, or the stack's name if its matrices have none."""
    found: dict[str, set[str]] = {place.stack: set() for place in places.values()}
    for name, place in places.items():
        if place.number is not None:
            found[place.stack].add(name)
    return {stack: each or {stack} for stack, each in found.items()}
