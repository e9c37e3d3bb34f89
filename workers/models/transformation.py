"""The dtype in which a model's routers compute, and how they compute weights from logits, from the configuration and
their own code.

T tokens, E experts, K choices.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from workers.models.checkpoint import find_checkpoint
from workers.models.description import build_skeleton
from workers.models.family import experts_per_token, find_routers, num_experts
from workers.models.routers import choices, routed_by, tried


class _Product(Exception):
    """Raised when a router reaches its product, with the product's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _ToTheProduct(TorchFunctionMode):
    """A mode in which a router ends at its linear product."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            raise _Product(args[0].dtype)
        return func(*args, **(kwargs or {}))


def router_dtype(model: str | Path, revision: str | None, dtype: torch.dtype) -> str:
    """The dtype in which a model's routers compute logits, from their own code: the compute dtype, or float32 as in
    DeepSeek."""
    skeleton = build_skeleton(find_checkpoint(model, revision, weights=False), dtype)
    router = next(iter(find_routers(skeleton).values()))
    hidden_TH = torch.zeros(1, skeleton.config.get_text_config().hidden_size, dtype=dtype, device="meta")
    try:
        with _ToTheProduct():
            router.forward(hidden_TH)
    except _Product as product:
        dtype = product.dtype
    return str(dtype).removeprefix("torch.")


TRANSFORMATIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits_TE, expert_TK: logits_TE.softmax(-1).gather(-1, expert_TK),
    "renormalized": lambda logits_TE, expert_TK: logits_TE.gather(-1, expert_TK).softmax(-1),
    "sigmoid": lambda logits_TE, expert_TK: logits_TE.sigmoid().gather(-1, expert_TK),
}
"""Functions from logits and choices to weights, up to a factor of the model; the last one up to a factor for each
token."""


def transformation_of(model: str | Path, revision: str | None = None) -> str:
    """The transformation from logits to a model's weights, from its configuration and its router's own code.

    Returns
    -------
    str
        "softmax": over all experts. "renormalized": over the chosen experts, which equals the softmax over all divided
        by its sum over the chosen ones. Both may be multiplied by a factor of the model. "sigmoid": of each logit,
        times a factor of the token. "unknown": none of these.
    """
    skeleton = build_skeleton(find_checkpoint(model, revision, weights=False), torch.float32)
    config = skeleton.config.get_text_config()
    router = tried(next(iter(find_routers(skeleton).values())))
    for tensor in (*router.parameters(), *router.buffers()):  # a correction bias changes choices but not weights
        tensor.data.zero_()
    return _transformation(router, num_experts(config), experts_per_token(config), config.hidden_size)


@torch.inference_mode()
def _transformation(router: nn.Module, experts: int, k: int, hidden: int) -> str:
    logits_TE = torch.randn(64, experts, generator=torch.Generator().manual_seed(1))
    expert_TK, weight_TK = choices(routed_by(router, logits_TE, torch.zeros(64, hidden)), k, router)
    for name, weights in TRANSFORMATIONS.items():
        ratio = weight_TK / weights(logits_TE, expert_TK)
        wanted = ratio.mean(-1, keepdim=True) if name == "sigmoid" and k > 1 else ratio.mean()
        if torch.allclose(ratio, wanted.expand_as(ratio), rtol=1e-4):
            return name
    return "unknown"
