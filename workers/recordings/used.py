"""The inputs of the experts, compared with the recorded choices: a proof without an array.

T tokens, S of them sampled, L layers, E experts, K choices, H hidden. A router may return logits, probabilities and
weights in any order, and a recorder that reads the wrong one reads it wrong again when it calls the router again. So
the recorded choices and weights of the sample must be those with which the layer's experts are called. The last layer's
experts are not run, unless it is the only layer. Experts without choices, as in Llama 4, get all tokens' hidden states
once for each expert, scaled by its weight: the scale is compared.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from workers.models.routers import choices
from workers.recordings.norms import row_norms
from workers.recordings.recording import Batch, Chosen, Recording
from workers.shard import RoutingError

OTHERS = "its recorded choices or weights are not those that its experts were given"
ROUNDED = torch.finfo(torch.bfloat16).eps  # relative; a layer may pass the weights to its experts in its own dtype


class Used(Recording):
    """Of every layer.

    Parameters
    ----------
    routers
        As for `workers.recorder.RouteRecorder`.
    num_experts, k
        E and the number of choices per token.
    model
        The model that has the routers.
    forward
        What runs it: the model itself, or this project's own forward pass, which gives `used` the inputs of its
        experts.
    """

    def __init__(
        self, routers: Mapping[int, nn.Module], num_experts: int, k: int, *, model: nn.Module, forward: Any
    ) -> None:
        self.index = {router: index for index, router in enumerate(routers.values())}
        self.whole = len(routers) == 1  # only then the last layer's experts are needed
        self.layers, self.num_experts, self.k = list(routers), num_experts, k
        self.own = None if forward is model else forward
        blocks = [(block, router) for block in model.modules() for router in block.children() if router in self.index]
        beside = [(router, getattr(block, "experts", None)) for block, router in blocks if self.own is None]
        self.experts = [(router, experts) for router, experts in beside if isinstance(experts, nn.Module)]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See `Recording`."""
        with ExitStack() as stack:
            if self.own is not None:
                self.own.used = self._keep
                stack.callback(setattr, self.own, "used", None)
            for router, experts in self.experts:
                hook = experts.register_forward_pre_hook(self._of(router), with_kwargs=True)
                stack.callback(hook.remove)
            yield

    def _of(self, router: nn.Module) -> Callable[..., None]:
        def keep(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows, *others = *args, *kwargs.values()
            try:
                given = choices(tuple(others), self.k)
            except RoutingError:  # it is not called with choices
                self._keep_scaled(self.index[router], rows)
            else:
                self._keep(router, *given)

        return keep

    def begin(self, batch: Batch) -> None:
        """See `Recording`."""
        self._sample, self._tokens = batch.sample, batch.token.numel()
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def routed(self, index: int, hidden_SH: torch.Tensor, output: Any, again: Any) -> None:
        """See `Recording`."""
        self._hidden_SH = hidden_SH

    def _keep_scaled(self, index: int, rows: torch.Tensor) -> None:
        """The scales of rows (E·T, H)."""
        if len(rows) != self.num_experts * self._tokens:
            raise RoutingError(
                f"layer {self.layers[index]}: its experts get an input of unknown shape, {tuple(rows.shape)}"
            )
        rows_ESH = rows.view(self.num_experts, self._tokens, -1)[:, self._sample.to(rows.device)]
        scale_SE = (row_norms(rows_ESH) / row_norms(self._hidden_SH)).T
        weight_SK, expert_SK = (part.to(self._sample.device) for part in scale_SE.topk(self.k, dim=-1))
        self._given[index] = expert_SK, weight_SK

    def _keep(self, router: nn.Module, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> None:
        if router not in self.index:  # it replaces another router: the recorder finds that the other one never fired
            return
        if len(expert_TK) != self._tokens:
            layer = self.layers[self.index[router]]
            raise RoutingError(f"layer {layer}: its experts got {len(expert_TK)} tokens instead of {self._tokens}")
        home, sample = self._sample.device, self._sample.to(expert_TK.device)
        self._given[self.index[router]] = expert_TK[sample].to(home), weight_TK[sample].to(home)

    def arrays(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """See `Recording`."""
        return {}

    def doubts(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """See `Recording`."""
        experts_LSK, weights_LSK = chosen.experts_LTK[:, chosen.sample], chosen.weights_LTK[:, chosen.sample]
        # All layers at once, since a launch for each would cost the host more than the device. A layer whose experts
        # are not run is compared with itself.
        given = [self._given.get(index, (experts_LSK[index], weights_LSK[index])) for index in range(len(experts_LSK))]
        expert_LSK, weight_LSK = (torch.stack(parts) for parts in zip(*given, strict=True))
        same_LSK = (expert_LSK == experts_LSK) & ((weight_LSK - weights_LSK).abs() <= ROUNDED * weights_LSK.abs())
        return {OTHERS: ~same_LSK.all(dim=-1)}
