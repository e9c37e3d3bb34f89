"""Interventions inside a router: its own code chooses without some experts, with others, or as given.

T tokens, E experts, K choices, H hidden. A router is a linear product, a softmax or a sigmoid of it, and a choice of
the largest values. While a router is changed, its `forward` runs with these steps intercepted. The rest of its rule
(correction biases, groups, renormalization) is its own code, both for transformers' modules and for this project's own
forward passes, and every call of the router gives the same answer:

- a masked expert has the logit and the score -∞ before groups are kept and experts are chosen;
- a forced expert counts as the largest when experts are chosen;
- given choices replace the router's; their weights are computed from its own scores, unless they are given too.

The logits that a router returns are those before the change. A masked expert that is chosen nevertheless has a weight
that is not finite, which the recorder rejects.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from workers.interventions import Interventions, Named, what_to_change
from workers.models.checkpoint import find_checkpoint
from workers.models.description import build_skeleton
from workers.models.family import experts_per_token, find_routers, num_experts
from workers.models.routers import choices, logits_part, routed_by, spread_part, tried
from workers.shard import RoutingError

SCORES = (torch.softmax, torch.Tensor.softmax, nn.functional.softmax, torch.sigmoid, torch.Tensor.sigmoid)
TOP = (torch.topk, torch.Tensor.topk)
PROBES = 256  # tokens with random logits for testing a change before weights are loaded (arbitrary)


@dataclass(kw_only=True)
class Change:
    """The change to one router."""

    masked_E: torch.Tensor | None = None
    """bool."""
    forced_E: torch.Tensor | None = None
    """bool."""
    given_TK: torch.Tensor | None = None
    """int64: the choices of the tokens with which the router is called now."""
    weights_TK: torch.Tensor | None = None
    """float32: the weights of the choices."""


class _Watched(TorchFunctionMode):
    """A mode in which the steps of a router are changed."""

    def __init__(self, change: Change, num_experts: int, k: int) -> None:
        super().__init__()
        self.change, self.num_experts, self.k = change, num_experts, k
        self.logits_TE: torch.Tensor | None = None
        self.scores_TE: torch.Tensor | None = None
        self.choices = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            self.logits_TE = found
            return self._without_masked(found)
        if func in SCORES and found.shape[-1] == self.num_experts and not self.choices:
            self.scores_TE = self._without_masked(found)
            return self.scores_TE
        if func in TOP and args[0].shape[1:] == (self.num_experts,) and found[1].shape[-1] == self.k:
            self.choices += 1
            return self._chosen(args[0], *found)
        return found

    def _without_masked(self, values_TE: torch.Tensor) -> torch.Tensor:
        masked_E = self.change.masked_E
        return values_TE if masked_E is None else values_TE.masked_fill(masked_E.to(values_TE.device), -torch.inf)

    def _chosen(
        self, ranked_TE: torch.Tensor, values_TK: torch.Tensor, expert_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        change = self.change
        if change.given_TK is not None:
            expert_TK = change.given_TK.to(expert_TK.device)
        elif change.forced_E is not None:
            forced_E = change.forced_E.to(ranked_TE.device)
            expert_TK = ranked_TE.masked_fill(forced_E, torch.inf).topk(self.k, dim=-1).indices
        else:
            return values_TK, expert_TK
        scores_TE = ranked_TE if self.scores_TE is None else self.scores_TE  # ranks may exclude groups
        return scores_TE.gather(-1, expert_TK).to(values_TK.dtype), expert_TK


def changed(own: Callable[..., Any], change: Change, num_experts: int, k: int) -> Callable[..., Any]:
    """A router's changed forward pass; it returns the same as the router's own, with the logits before the change.

    Raises
    ------
    RoutingError
        When the router computes no linear product, or its choice must be replaced but is not a single topk.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _Watched(change, num_experts, k) as watched:
            output = own(*args, **kwargs)
        by_top = change.forced_E is not None or (change.given_TK is not None and change.weights_TK is None)
        if watched.logits_TE is None or (by_top and watched.choices != 1):
            raise RoutingError("it computes no linear product, or does not choose with a single topk")
        return _with(output, watched.logits_TE, change, num_experts, k)

    return forward


def _with(output: Any, logits_TE: torch.Tensor, change: Change, num_experts: int, k: int) -> Any:
    """The router's output with these logits, and with the given choices and weights if both are given."""
    returned, spread = logits_part(output, num_experts), spread_part(output)
    given_TK, weights_TK = change.given_TK, change.weights_TK
    parts: list[torch.Tensor] = list(output) if isinstance(output, tuple) else [output]
    for place, part in enumerate(parts):
        if part is returned:
            parts[place] = logits_TE.to(part.dtype).view_as(part)
        elif given_TK is None or weights_TK is None:
            continue
        elif part is spread:
            parts[place] = torch.zeros_like(part).scatter(-1, given_TK.to(part.device), weights_TK.to(part))
        elif part.shape[-1] == k:
            parts[place] = (weights_TK if part.is_floating_point() else given_TK).to(part).view_as(part)
    return tuple(parts) if isinstance(output, tuple) else parts[0]


class Steering:
    """A model's routers under interventions.

    Parameters
    ----------
    routers
        Maps the model's own layer numbers to the modules that choose experts.
    num_experts, experts_per_token
        E, and K after the interventions.
    interventions
        What is changed.
    """

    def __init__(
        self,
        routers: Mapping[int, nn.Module],
        num_experts: int,
        experts_per_token: int,
        interventions: Interventions | None = None,
    ) -> None:
        self.asked = interventions or Interventions()
        self.routers, self.num_experts, self.k = routers, num_experts, experts_per_token
        masked, forced = (self._sets(named) for named in (self.asked.masked(), self.asked.forced()))
        self._changes = {
            layer: Change(masked_E=masked.get(layer), forced_E=forced.get(layer))
            for layer in routers
            if layer in masked or layer in forced or self.asked.routes_from
        }

    def _sets(self, named: Mapping[int, list[int]]) -> dict[int, torch.Tensor]:
        found = {}
        for layer, experts in ((layer, named[layer]) for layer in self.routers if layer in named):
            device = next(self.routers[layer].parameters()).device
            found[layer] = torch.zeros(self.num_experts, dtype=torch.bool, device=device)
            found[layer][experts] = True
        return found

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Change the routers while the block runs."""
        with ExitStack() as stack:
            for layer, router in self.routers.items():
                if self.asked.top_k is not None:
                    stack.enter_context(_set(router, "top_k", self.k))
                if layer in self._changes:
                    own = changed(router.forward, self._changes[layer], self.num_experts, self.k)
                    stack.enter_context(_set(router, "forward", own))
            yield

    def begin(self, experts_LTK: torch.Tensor, weights_LTK: torch.Tensor | None = None) -> None:
        """Set the choices of a micro-batch and their weights."""
        for index, change in enumerate(self._changes.values()):
            change.given_TK = experts_LTK[index]
            change.weights_TK = None if weights_LTK is None else weights_LTK[index]

    @contextmanager
    def of(self, sample: torch.Tensor) -> Iterator[None]:
        """A context in which routers are called with only these tokens of the micro-batch, in this order."""
        before = [(change, change.given_TK, change.weights_TK) for change in self._changes.values()]
        for change, experts_TK, weights_TK in before:
            change.given_TK = None if experts_TK is None else experts_TK[sample]
            change.weights_TK = None if weights_TK is None else weights_TK[sample]
        try:
            yield
        finally:
            for change, experts_TK, weights_TK in before:
                change.given_TK, change.weights_TK = experts_TK, weights_TK


@contextmanager
def _set(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of a module while the block runs. One that hides an attribute of the class is removed again."""
    own = name in vars(module)
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before) if own else delattr(module, name)


def choose_to_change(
    model: str | Path,
    revision: str | None,
    *,
    mask: Sequence[Named] = (),
    force: Sequence[Named] = (),
    top_k: int | None = None,
    routes_from: str | None = None,
    routes_weights: bool = False,
) -> Interventions:
    """The requested interventions, tested on the model's routers with random logits. Reads the configuration but no
    weights.

    Parameters
    ----------
    model, revision
        As for `workers.models.loading.load_model`.
    mask, force, top_k
        As for `workers.interventions.what_to_change`.
    routes_from, routes_weights
        See `Interventions`.

    Raises
    ------
    ValueError
        When the interventions make no sense for this model, or the code of its routers cannot be changed in this way;
        the message names the routers.
    """
    changes = bool(mask or force or top_k is not None)
    if routes_weights and not routes_from:
        raise ValueError("--routes_weights uses the weights of --routes_from, which is not given")
    if routes_from and changes:
        raise ValueError("--routes_from gives all choices: omit --mask, --force, their files, and --top_k")
    if not (changes or routes_from):
        return Interventions()
    skeleton = build_skeleton(find_checkpoint(model, revision, weights=False), torch.float32)
    routers, config = find_routers(skeleton), skeleton.config.get_text_config()
    experts, k = num_experts(config), experts_per_token(config)
    asked = what_to_change(mask, force, top_k, layers=list(routers), num_experts=experts, experts_per_token=k)
    asked = replace(asked, routes_from=routes_from, routes_weights=routes_weights)
    own_layers = {*asked.masked(), *asked.forced(), next(iter(routers))}
    for layer in sorted(own_layers):
        try:
            _try(tried(routers[layer]), layer, asked, experts, asked.top_k or k, config.hidden_size)
        except (RuntimeError, AttributeError) as error:
            raise ValueError(
                f"the routers of {type(skeleton).__name__} ({type(routers[layer]).__name__}) cannot be changed as"
                f" requested, at layer {layer}: {error}"
            ) from error
    return asked


@torch.inference_mode()
def _try(router: Any, layer: int, asked: Interventions, experts: int, k: int, hidden: int) -> None:
    """Raise a RoutingError if a router does not choose as its change requires."""
    masked, forced = asked.masked().get(layer, []), asked.forced().get(layer, [])
    if (fewest := _fewest(router, masked, experts)) < k:
        raise RoutingError(f"it may keep groups with {fewest} experts left, but {k} are chosen for each token")
    given = torch.randn(PROBES, experts, generator=torch.Generator().manual_seed(2)), torch.zeros(PROBES, hidden)
    with Steering({layer: router}, experts, k, asked).attached():
        expert_TK, weight_TK = choices(routed_by(router, *given), k, router)
    chosen_TE = torch.zeros(PROBES, experts).scatter(-1, expert_TK, 1).bool()
    right = (chosen_TE.sum(-1) == k).all() and chosen_TE[:, forced].all() and not chosen_TE[:, masked].any()
    if not (right and weight_TK.isfinite().all()):
        raise RoutingError("its rule is not known")
    if forced or (asked.routes_from and not asked.routes_weights):
        with _set(router, "top_k", k):
            own_TK, weight_TK = choices(routed_by(router, *given), k, router)
            with _set(router, "forward", changed(router.forward, Change(given_TK=own_TK), experts, k)):
                again_TK = choices(routed_by(router, *given), k, router)[1]
        if not torch.equal(again_TK, weight_TK):
            raise RoutingError("if its own choices were given to it, they would not have its own weights")
    if asked.routes_weights:
        expert_TK, weight_TK = (expert_TK + 1) % experts, weight_TK + 1
        forward = changed(router.forward, Change(given_TK=expert_TK, weights_TK=weight_TK), experts, k)
        with _set(router, "forward", forward):
            found = choices(routed_by(router, *given), k, router)
        if not all(map(torch.equal, found, (expert_TK, weight_TK))):
            raise RoutingError("it would not return the choices and weights that are given to it")


def _fewest(router: Any, masked: Sequence[int], experts: int) -> int:
    """The smallest number of experts left for a token. A router with groups keeps the best groups, which may be any."""
    left_E = torch.ones(experts, dtype=torch.int64)
    left_E[list(masked)] = 0
    groups, kept = (getattr(router, name, None) or 1 for name in ("num_group", "topk_group"))
    if getattr(router, "topk_method", "") == "greedy":
        groups = 1
    left_G = left_E.view(groups, -1).sum(dim=-1)
    return int(left_G[left_G > 0].sort().values[:kept].sum())
