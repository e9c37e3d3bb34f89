"""Read what a router of any family returns, and compute what it would return for given logits.

T tokens, E experts, k choices, H hidden. Every router's forward pass is a linear product followed by the family's own
steps: a softmax or a sigmoid, a correction bias, groups. Here the product is replaced, and the rest is the router's own
code.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from workers.shard import RoutingError

READERS: dict[str, Callable[[Any, int], tuple[torch.Tensor, torch.Tensor]]] = {}
"""Functions that read choices and weights from a router's output, by the name of its class, for families whose routers
return something that `choices` does not know. They have the parameters and the return value of `choices`."""

PROBES = 64  # tokens with random hidden states for testing a router before weights are loaded (arbitrary)


class _Bound:
    """A router's forward pass that can be called with only hidden states, because the other inputs from its block are
    known.

    Parameters
    ----------
    router
        The router. Its buffers hold the block's inputs under the names of the parameters of its forward pass.
    """

    def __init__(self, router: nn.Module, names: tuple[str, ...]) -> None:
        self.router, self.names = router, names
        self.own: Callable[..., Any] = router.forward

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self.own(hidden, *args, **kwargs)
        given = {name: getattr(self.router, name) for name in self.names}
        try:
            return self.own(hidden, **given)
        except ValueError:  # it unpacks a shape of rows and positions
            return self.own(hidden[None], **given)


def bind(router: nn.Module, block: nn.Module) -> None:
    """Give a router the attributes of its block that its forward pass has as parameters, such as a correction bias."""
    names = tuple(
        name
        for name in [*inspect.signature(type(router).forward).parameters][2:]
        if torch.is_tensor(getattr(block, name, None)) and not hasattr(router, name)
    )
    if not names:
        return
    for name in names:
        router.register_buffer(name, getattr(block, name), persistent=False)
    router.forward = _Bound(router, names)


class _GivenProduct(TorchFunctionMode):
    """A mode in which linear products return these rows."""

    def __init__(self, rows_TE: torch.Tensor) -> None:
        super().__init__()
        self.rows_TE, self.products = rows_TE, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.linear:
            return func(*args, **(kwargs or {}))
        self.products += 1
        return self.rows_TE.to(args[0].device, args[0].dtype)


def routed_by(router: nn.Module, logits_TE: torch.Tensor, hidden_TH: torch.Tensor) -> Any:
    """What the router returns for given logits.

    Parameters
    ----------
    hidden_TH
        Used for its shape, dtype and device.

    Raises
    ------
    RoutingError
        When the router's forward pass is not one linear product and steps that depend only on it.
    """
    with _GivenProduct(logits_TE) as given:
        output = router.forward(hidden_TH)
    if given.products != 1:
        raise RoutingError(f"{type(router).__name__} computes {given.products} linear products instead of 1")
    return output


def choices(output: Any, k: int, router: nn.Module | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A router's choices, in its own order, for any order of its outputs.

    Parameters
    ----------
    output
        The output of the router module: a tuple that holds integer indices (T, k), and weights (T, k), or (T, E) to
        pick from. Logits (T, E) are distinguished from such weights by their place: transformers puts them first. If
        other outputs have the shape of the indices (logits if k is E, weights of shared experts), the weights are the
        last output before the indices. Or weights (T, E) without indices, k of which are not 0 for each token, as in
        Llama 4.
    k
        Number of choices per token.
    router
        The router that returned it, if known: its class may be one of `READERS`.

    Returns
    -------
    experts_TK : int64 tensor
    weights_TK : float32 tensor

    Raises
    ------
    RoutingError
        When no such pair is in the output.
    """
    if (reader := READERS.get(type(router).__name__)) is not None:
        return reader(output, k)
    tensors = _tensors(output)
    indices = [part for part in tensors if not part.is_floating_point() and part.shape[-1] == k]
    floats = [part for part in tensors if part.is_floating_point()]
    if (spread_TE := spread_part(output)) is not None and bool((spread_TE != 0).sum(dim=-1).eq(k).all()):
        weights_TK, experts_TK = spread_TE.reshape(-1, spread_TE.shape[-1]).topk(k, dim=-1)
        return experts_TK, weights_TK.float()
    if len(indices) != 1 or not floats:
        shapes = [(tuple(part.shape), str(part.dtype)) for part in tensors]
        raise RoutingError(f"no choices of {k} experts per token in the router's output: {shapes}")
    experts_TK = indices[0].reshape(-1, k).long()
    place = next(at for at, part in enumerate(tensors) if part is indices[0])
    nearest = [*reversed(tensors[:place]), *tensors[place + 1 :]]
    exact = [part for part in nearest if part.is_floating_point() and part.shape == indices[0].shape]
    dense_TE = floats[-1].reshape(-1, floats[-1].shape[-1])
    weights_TK = (exact[0].reshape(-1, k) if exact else dense_TE.gather(-1, experts_TK)).float()
    return experts_TK, weights_TK


def in_order(experts: torch.Tensor, weights: torch.Tensor, *beside: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Choices by descending weight, ties by the lower expert id, with accompanying values; any shape, with the choices
    last.

    Sorts by exchanging adjacent entries, which is elementwise for the few choices of a token; a GPU's sort would take
    longer than the router.
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
    """The logits (T, E) in a router's output, in any of its shapes; None if there are none.

    transformers puts them first. Weights of all experts, which some families also return, follow them, except in Llama
    4.
    """
    logits = logits_part(output, num_experts)
    return None if logits is None else logits.reshape(-1, num_experts)


def logits_part(output: Any, num_experts: int) -> torch.Tensor | None:
    """The tensor in a router's output that holds the logits, unchanged."""
    tensors = _tensors(output)
    spread = spread_part(output)
    found = [
        part for part in tensors if part.is_floating_point() and part.shape[-1] == num_experts and part is not spread
    ]
    return found[0] if found else None


def _tensors(output: Any) -> list[torch.Tensor]:
    return [part for part in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(part)]


def spread_part(output: Any) -> torch.Tensor | None:
    """The weights of all experts, 0 for unchosen ones, in an output without indices; logits are not 0."""
    tensors = _tensors(output)
    if len(tensors) < 2 or not all(part.is_floating_point() for part in tensors):
        return None
    return next((part for part in tensors if bool((part == 0).any(dim=-1).all())), None)


def tried(router: nn.Module) -> nn.Module:
    """A copy of a router on the CPU with random weights; the router may be on the meta device."""
    copied = copy.deepcopy(router).to_empty(device="cpu").eval()
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_floating_point():  # a correction bias may change choices
            tensor.data.normal_(generator=torch.Generator().manual_seed(1))
    return copied


@torch.inference_mode()
def refuse_unknown(router: nn.Module, hidden: int, num_experts: int, k: int) -> None:
    """Reject a router that does not choose k experts for each token from its hidden states alone.

    Raises
    ------
    RoutingError
        The message says what it does instead.
    """
    copied, hidden_TH = tried(router), torch.randn(PROBES, hidden, generator=torch.Generator().manual_seed(2))
    try:
        output = copied.forward(hidden_TH.to(next(copied.parameters()).dtype))
    except Exception as error:  # unknown code raises errors of many kinds
        takes = ", ".join([*inspect.signature(type(router).forward).parameters][1:])
        raise RoutingError(f"it takes ({takes}) and does not choose from hidden states alone: {error}") from error
    experts_TK, _ = choices(output, k, router)
    if len(experts_TK) != PROBES:
        raise RoutingError(f"it chose for {len(experts_TK)} tokens instead of {PROBES}")
    widths = {part.shape[-1] for part in _tensors(output) if part.is_floating_point()} - {k}
    if widths and num_experts not in widths and type(router).__name__ not in READERS:
        raise RoutingError(f"it chooses among {max(widths)} experts, but num_experts is {num_experts}")
    if not ((experts_TK >= 0) & (experts_TK < num_experts)).all():
        raise RoutingError(f"it chose experts up to {experts_TK.max()}, but num_experts is {num_experts}")
    ordered_TK = experts_TK.sort(dim=-1).values
    if (ordered_TK[:, 1:] == ordered_TK[:, :-1]).any():
        raise RoutingError("it chose an expert twice for a token")
