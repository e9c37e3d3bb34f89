"""The routers of a family's model, its names for E and k, and the modules that are never quantized.

These are found from the declarations and names in transformers' classes, never from a list of families.
"""

import re
from typing import Any

from torch import nn

from workers.models.routers import bind, refuse_unknown
from workers.shard import RoutingError

HOW_TO_ADD = 'CONTRIBUTING.md, "Add a model family", says how one is added'
"""Ends the error for a family whose routers are not known."""

KEPT = "weights_proj"
"""Name of the matrices that are never quantized, like the routers: indexers of sparse attention cast hidden states to
the dtype of this matrix, which would be bytes if it were quantized. transformers does not quantize it in most of these
families."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.")
_OTHER_SENSES = re.compile(r"vision|visual|audio")
"""Parts of the names of modules for images or sound, which may have their own layers and routers; text does not reach
them."""

_NUM_EXPERTS_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN_NAMES = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "moe_k",
    "moe_topk",
    "top_k_experts",
)


def recordable_routers(skeleton: Any) -> dict[int, nn.Module]:
    """`find_routers`, with each kind of router tested with random weights; empty if the model has no routers.

    Parameters
    ----------
    skeleton
        The base model on the meta device.

    Raises
    ------
    ValueError
        When the family's routes cannot be recorded; the message says why.
    """
    _refuse_other_than_decoders(skeleton)
    routers = find_routers(skeleton)
    _refuse_unknown_routers(skeleton, routers)
    return routers


def find_routers(model: nn.Module) -> dict[int, nn.Module]:
    """Find the module of each layer that chooses experts; layers without one are omitted.

    It is of the class whose outputs transformers records as ``router_logits``. If there is no such class, or that class
    contains experts, it is the ``gate`` or ``router`` next to an ``experts``. The layer is the number after ``layers.``
    or ``blocks.`` in its name. Routers that need something from their block get it (`workers.models.routers.bind`).
    """
    modules = {name: module for name, module in model.named_modules() if not _OTHER_SENSES.search(name)}
    recorders = (getattr(type(model), "_can_record_outputs", None) or {}).get("router_logits", [])
    recorders = recorders if isinstance(recorders, list) else [recorders]
    classes = tuple(recorder.target_class for recorder in recorders if getattr(recorder, "target_class", None))
    names = [name for name, module in modules.items() if isinstance(module, classes) and not has_experts(module)]
    if not names:
        names = [
            f"{name}.{leaf}"
            for name, module in modules.items()
            for leaf in ("gate", "router")
            if hasattr(module, "experts") and hasattr(module, leaf)
        ]
    family = type(model).__name__
    routers: dict[int, nn.Module] = {}
    for name in names:
        number = _LAYER.search(name)
        if number is None:
            raise ValueError(f"the router {name} of {family} is not in a numbered layer; {HOW_TO_ADD}")
        if int(number[1]) in routers:
            raise ValueError(f"{family} has two routers in layer {number[1]} ({name}); {HOW_TO_ADD}")
        routers[int(number[1])] = modules[name]
        bind(modules[name], modules[name.rpartition(".")[0]])
    for name in modules:
        number = _LAYER.search(name)
        if routers and number and name.endswith(".experts") and int(number[1]) not in routers:
            raise ValueError(f"{family} has experts, {name}, whose router is not known; {HOW_TO_ADD}")
    return dict(sorted(routers.items()))


def unquantized(skeleton: nn.Module) -> list[str]:
    """Names of the modules that are never quantized: the routers and those named `KEPT`."""
    routers = set(find_routers(skeleton).values())
    modules = skeleton.named_modules()
    return [name for name, module in modules if module in routers or name.rpartition(".")[2] == KEPT]


def has_experts(module: nn.Module) -> bool:
    """Whether the model has a module named experts."""
    return any(name.endswith("experts") for name, _ in module.named_modules())


def _refuse_other_than_decoders(skeleton: Any) -> None:
    """Reject models that do not read text from left to right: padding would affect the tokens before it."""
    family = type(skeleton).__name__
    if skeleton.config.is_encoder_decoder:
        raise ValueError(f"{family} has an encoder and a decoder, each with its own text: only decoders are captured")
    modules = {name: module for name, module in skeleton.named_modules() if _LAYER.search(name)}
    stacks = {_stack(name) for name in modules if name.endswith("experts")}
    for name, module in modules.items():
        if getattr(module, "is_causal", True) is False and _stack(name) in stacks and not _OTHER_SENSES.search(name):
            raise ValueError(f"{name} of {family} lets tokens attend to later ones: only causal decoders are captured")


def _stack(name: str) -> str:
    """The part of a module's name before the layer number."""
    return _LAYER.split(name, maxsplit=1)[0]


def _refuse_unknown_routers(skeleton: Any, routers: dict[int, nn.Module]) -> None:
    """Test one router of each kind and shape with random weights."""
    config = skeleton.config.get_text_config()
    kinds: dict[Any, int] = {}
    for layer, router in routers.items():
        kinds.setdefault((type(router), *(tuple(part.shape) for part in router.parameters())), layer)
    for (kind, *_), layer in kinds.items():
        try:
            refuse_unknown(routers[layer], config.hidden_size, num_experts(config), experts_per_token(config))
        except RoutingError as error:
            raise ValueError(
                f"the routers of {type(skeleton).__name__} ({kind.__name__}) cannot be recorded, at layer {layer}:"
                f" {error}; {HOW_TO_ADD}"
            ) from error


def num_experts(config: Any) -> int:
    """E, under the family's name for it."""
    return read(config, _NUM_EXPERTS_NAMES)


def experts_per_token(config: Any) -> int:
    """k, under the family's name for it."""
    return read(config, _EXPERTS_PER_TOKEN_NAMES)


def read(config: Any, names: tuple[str, ...]) -> int:
    """The value under the first of several names that families use."""
    for name in names:
        value = getattr(config, name, None)
        each = {*value} if isinstance(value, list | tuple) else {value}
        if len(each) > 1:
            raise ValueError(
                f"model_type {config.model_type!r} has layers that differ in {name} ({value}): only models with one"
                " number for all layers can be captured"
            )
        if isinstance(number := next(iter(each), None), int):
            return number
    raise ValueError(
        f"the configuration of model_type {config.model_type!r} has none of {', '.join(names)}; {HOW_TO_ADD}"
    )
