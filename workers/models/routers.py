"""What a router returns, whatever its family, and what it makes of logits that are given.

T tokens, E experts, k choices, H hidden. Every router's forward is a linear product, and then what its family does with
it: a softmax or a sigmoid, a correction bias, groups. Here the product is replaced, and the rest is the router's own.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from workers.models.checkpoint import find_checkpoint
from workers.models.description import build_skeleton, experts_per_token, find_routers, num_experts
from workers.shard import RoutingError


class _GivenProduct(TorchFunctionMode):
    """Within it, linear products are these rows instead."""

    def __init__(self, rows_TE: torch.Tensor) -> None:
        super().__init__()
        self.rows_TE, self.products = rows_TE, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            return func(*args, **(kwargs or {}))
        self.products += 1
        return self.rows_TE.to(args[0].device, args[0].dtype)


def routed_by(router: nn.Module, logits_TE: torch.Tensor, hidden_TH: torch.Tensor) -> Any:
    """What the router returns where its logits are these.

    Parameters
    ----------
    hidden_TH
        For its shape, dtype and device.

    Raises
    ------
    RoutingError
        When the router's forward is not one linear product and what follows from it.
    """
    with _GivenProduct(logits_TE) as given:
        output = router.forward(hidden_TH)
    if given.products != 1:
        raise RoutingError(f"{type(router).__name__} makes {given.products} linear products, and 1 makes logits")
    return output


def choices(output: Any, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A router's choices, in its own order, whatever the order of what it returns.

    Parameters
    ----------
    output
        What the router module returned: a tuple that holds integer indices (T, k), and weights (T, k), or (T, E) to
        pick from. Logits (T, E) are distinguished from such weights by their place: transformers puts them first.
    k
        Choices a token.

    Returns
    -------
    experts_TK : int64 tensor
    weights_TK : float32 tensor

    Raises
    ------
    RoutingError
        When no such pair is in the output.
    """
    tensors = [part for part in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(part)]
    indices = [part for part in tensors if not part.is_floating_point() and part.shape[-1] == k]
    floats = [part for part in tensors if part.is_floating_point()]
    if len(indices) != 1 or not floats:
        shapes = [(tuple(part.shape), str(part.dtype)) for part in tensors]
        raise RoutingError(f"no choices of {k} experts a token in what the router returned: {shapes}")
    experts_TK = indices[0].reshape(-1, k).long()
    exact = [part for part in floats if part.shape == indices[0].shape]
    dense_TE = floats[-1].reshape(-1, floats[-1].shape[-1])
    weights_TK = (exact[-1].reshape(-1, k) if exact else dense_TE.gather(-1, experts_TK)).float()
    return experts_TK, weights_TK


def in_order(experts: torch.Tensor, weights: torch.Tensor, *beside: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Choices by falling weight, ties by lower expert id, and what stands beside them; any shape, the choices last.

    By exchanges of neighbours: for the few choices of a token it is elementwise, where a GPU's sort would take longer
    than the router.
    """
    parts = [list(part.unbind(-1)) for part in (experts, weights, *beside)]
    expert, weight = parts[:2]
    for last in range(len(expert) - 1, 0, -1):
        for i in range(last):
            j = i + 1
            swap = (weight[j] > weight[i]) | ((weight[j] == weight[i]) & (expert[j] < expert[i]))
            for part in parts:
                part[i], part[j] = torch.where(swap, part[j], part[i]), torch.where(swap, part[i], part[j])
    return tuple(torch.stack(part, dim=-1) for part in parts)


def router_logits(output: Any, num_experts: int) -> torch.Tensor | None:
    """The logits (T, E) in what a router returned, whichever dims it gave them; None where there are none.

    transformers puts them first; weights of all experts, which some families give too, follow.
    """
    parts = output if isinstance(output, tuple) else (output,)
    floats = [part for part in parts if torch.is_tensor(part) and part.is_floating_point()]
    found = [part for part in floats if part.shape[-1] == num_experts]
    return found[0].reshape(-1, num_experts) if found else None


class _Product(Exception):
    """A router has come to its product, of this dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _ToTheProduct(TorchFunctionMode):
    """Within it, a router ends at its linear product."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            raise _Product(args[0].dtype)
        return func(*args, **(kwargs or {}))


def router_dtype(model: str | Path, revision: str | None, dtype: torch.dtype) -> str:
    """What a model's routers compute logits in, by their own code: the compute dtype, or float32 as in DeepSeek."""
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
"""From logits and choices to weights, up to a factor of the model, the last one up to a factor for each token."""


def transformation_of(model: str | Path, revision: str | None = None) -> str:
    """Which transformation of logits gives a model's weights, from its configuration and its router's own code.

    Returns
    -------
    str
        "softmax": over all experts. "renormalized": over the chosen ones, which is the softmax over all, divided by
        its sum over the chosen ones. Both perhaps times a factor of the model. "sigmoid": of each logit, times a factor
        of the token. "unknown": none of these.
    """
    skeleton = build_skeleton(find_checkpoint(model, revision, weights=False), torch.float32)
    config = skeleton.config.get_text_config()
    router = copy.deepcopy(next(iter(find_routers(skeleton).values()))).to_empty(device="cpu")
    for tensor in (*router.parameters(), *router.buffers()):  # a correction bias changes choices, and no weight
        tensor.data.zero_()
    return _transformation(router.eval(), num_experts(config), experts_per_token(config), config.hidden_size)


@torch.inference_mode()
def _transformation(router: nn.Module, experts: int, k: int, hidden: int) -> str:
    logits_TE = torch.randn(64, experts, generator=torch.Generator().manual_seed(1))
    expert_TK, weight_TK = choices(routed_by(router, logits_TE, torch.zeros(64, hidden)), k)
    for name, weights in TRANSFORMATIONS.items():
        ratio = weight_TK / weights(logits_TE, expert_TK)
        wanted = ratio.mean(-1, keepdim=True) if name == "sigmoid" and k > 1 else ratio.mean()
        if torch.allclose(ratio, wanted.expand_as(ratio), rtol=1e-4):
            return name
    return "unknown"
