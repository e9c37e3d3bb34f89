"""Output norms: the L2 norm of each chosen expert's output, before it is weighted.

T tokens, S of them sampled, L layers, K choices, H hidden; a slot is a choice, in the order in which experts computed
them. This project's own forward passes pass on the outputs that they computed. transformers' experts return the
weighted sum, so they are called once more with each choice as its own token. The proof: a norm must be that of the
output's row, or of the experts' answer for only the sampled tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from workers.models.routers import in_order
from workers.recordings.recording import Batch, Chosen, Recording, doubted, near
from workers.shard import RoutingError

OTHERS = "its recorded norms are not those of its experts' outputs for these tokens"


class OutputNorms(Recording):
    """Of every layer.

    Parameters
    ----------
    routers
        As for `workers.recorder.RouteRecorder`.
    experts
        The experts' modules in the order of the layers if transformers' forward pass calls them; empty if this
        project's own forward pass gives their outputs to `seen`.
    """

    whole = True

    def __init__(self, routers: Mapping[int, nn.Module], experts: Sequence[nn.Module] = ()) -> None:
        self.index = {router: index for index, router in enumerate(routers.values())}
        self.layers, self.experts = list(routers), experts

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See `Recording`."""
        handles = [
            experts.register_forward_hook(self._computed_again(index), with_kwargs=True)
            for index, experts in enumerate(self.experts)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, batch: Batch) -> None:
        """See `Recording`."""
        self._sample = batch.sample
        self._norms: dict[int, torch.Tensor] = {}
        self._again: dict[int, torch.Tensor] = {}

    def seen(self, router: nn.Module, rows_SH: torch.Tensor, slot_TK: torch.Tensor) -> None:
        """Receive the outputs of a layer's experts by slot, and the slot of each choice."""
        sampled_SK = slot_TK[self._sample.to(slot_TK.device)]
        again_SK = rows_SH[sampled_SK].float().square().sum(dim=-1).sqrt()
        self._keep(self.index[router], row_norms(rows_SH)[slot_TK], again_SK, rows_SH.dtype)

    def _computed_again(self, index: int) -> Callable[..., None]:
        def compute_again(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden, expert_TK = [*args, *kwargs.values()][:2]
            hidden_TH = hidden.reshape(-1, hidden.shape[-1])
            sample = self._sample.to(hidden_TH.device)
            again_SK = _norms_of(experts, hidden_TH[sample], expert_TK[sample])
            self._keep(index, _norms_of(experts, hidden_TH, expert_TK), again_SK, hidden_TH.dtype)

        return compute_again

    def _keep(self, index: int, norms_TK: torch.Tensor, again_SK: torch.Tensor, dtype: torch.dtype) -> None:
        if index in self._norms:
            raise RoutingError(
                f"layer {self.layers[index]}: its experts computed twice in one forward pass instead of once"
            )
        home, self._dtype = self._sample.device, dtype
        self._norms[index], self._again[index] = norms_TK.to(home), again_SK.to(home)

    def _stacked(self, kept: Mapping[int, torch.Tensor]) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if index not in kept:
                raise RoutingError(f"layer {layer}: the outputs of its experts were not received")
        return torch.stack([kept[index] for index in range(len(kept))])

    def arrays(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """See `Recording`."""
        _, _, norms_LTK = in_order(chosen.experts_LTK, chosen.weights_LTK, self._stacked(self._norms))
        return {"output_norm": norms_LTK.transpose(0, 1)}

    def doubts(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """See `Recording`."""
        found_LSK, again_LSK = self._stacked(self._norms)[:, chosen.sample], self._stacked(self._again)
        return {OTHERS: doubted(near(found_LSK, again_LSK, self._dtype, again_LSK).all(dim=-1))}


def row_norms(rows_SH: torch.Tensor) -> torch.Tensor:
    """The L2 norm of each row, in float32; rows in 16 bits are read once and not copied."""
    norms: torch.Tensor = torch.linalg.vector_norm(rows_SH, dim=-1, dtype=torch.float32)
    return norms


def experts_of(model: nn.Module, routers: Mapping[int, nn.Module]) -> list[nn.Module]:
    """The module next to each router that computes the experts.

    Raises
    ------
    RoutingError
        When there is none.
    """
    found = []
    for layer, router in routers.items():
        block = next(module for module in model.modules() if router in module.children())
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module):
            raise RoutingError(f"layer {layer}: {type(block).__name__} has no experts: capture without output_norm")
        if len(inspect.signature(type(experts).forward).parameters) < len(("self", "hidden", "choices", "weights")):
            raise RoutingError(
                f"layer {layer}: {type(experts).__name__} does not get choices and weights: capture without output_norm"
            )
        found.append(experts)
    return found


def _norms_of(experts: Any, hidden_TH: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
    """The norms of an experts module's output for each choice, as a token with only this choice and weight one."""
    tokens, k = expert_TK.shape
    weight = hidden_TH.new_ones(tokens * k, 1)
    rows = experts.forward(hidden_TH.repeat_interleave(k, dim=0), expert_TK.reshape(-1, 1), weight)
    return row_norms(rows).view(tokens, k)
