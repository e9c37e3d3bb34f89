"""Router logits: what each router computed before it chose, for all experts or the largest logits.

T tokens, S of them sampled, L layers, E experts, M candidates, K choices, H hidden. The proof: a row must be what the
router computes for its token, and the router's own code must derive the recorded choices and weights from it.
Probabilities under the name of logits, as returned by some versions of transformers (huggingface/transformers#45120),
lead to the same choices but other weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from workers.models.routers import choices, in_order, routed_by, router_logits
from workers.recordings.recording import Batch, Chosen, Recording, doubted, near, same_choices
from workers.shard import RoutingError

OTHERS = "its recorded logits are not its router's for these tokens, but of an earlier batch or another layer"
NO_LOGITS = "its recorded logits do not lead to its recorded choices and weights: its router does not return logits"


class RouterLogits(Recording):
    """Of every layer.

    Parameters
    ----------
    routers, num_experts, k
        As for `workers.recorder.RouteRecorder`.
    top
        M: the number of largest logits, in descending order, ties by the lower id; 0: those of all experts, in the
        experts' order.
    """

    def __init__(self, routers: Mapping[int, nn.Module], num_experts: int, k: int, top: int = 0) -> None:
        self.routers, self.layers = list(routers.values()), list(routers)
        self.num_experts, self.k, self.top = num_experts, k, top

    def begin(self, batch: Batch) -> None:
        """See `Recording`."""
        home, shape = batch.token.device, (batch.token.numel(), len(self.routers), self.top or self.num_experts)
        self._values_TLM = torch.full(shape, torch.nan, device=home)
        narrow = torch.uint8 if self.num_experts <= 255 else torch.int32
        self._ids_TLM = torch.zeros(shape if self.top else (0,), dtype=narrow, device=home)
        self._again: list[torch.Tensor] = []
        self._hidden: list[torch.Tensor] = []

    def routed(self, index: int, hidden_SH: torch.Tensor, output: Any, again: Any) -> None:
        """See `Recording`."""
        home = self._values_TLM.device
        logits_TE, again_SE = (self._logits(index, each) for each in (output, again))
        if self.top:
            logits_TE, order_TE = logits_TE.sort(dim=-1, descending=True, stable=True)
            self._ids_TLM[:, index] = order_TE[:, : self.top].to(home)
        self._values_TLM[:, index] = logits_TE[:, : self._values_TLM.shape[-1]].to(home)
        self._again.append(again_SE.float().to(home))
        self._hidden.append(hidden_SH)

    def _logits(self, index: int, output: Any) -> torch.Tensor:
        logits_TE = router_logits(output, self.num_experts)
        if logits_TE is None:
            raise RoutingError(
                f"layer {self.layers[index]}: its router returns no logits of {self.num_experts} experts: capture"
                " without --record logits"
            )
        return logits_TE

    def arrays(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """See `Recording`."""
        found = {"logit": self._values_TLM} | ({"logit_expert": self._ids_TLM} if self.top else {})
        del self._values_TLM, self._ids_TLM  # freed before those of the next micro-batch are allocated
        return found

    def doubts(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """See `Recording`."""
        sample, again_LSE = chosen.sample, torch.stack(self._again)
        rows_LSE = self._values_TLM[sample].transpose(0, 1)
        if self.top:  # unrecorded logits are taken from the router's answer now
            rows_LSE = again_LSE.scatter(-1, self._ids_TLM[sample].transpose(0, 1).long(), rows_LSE)
        largest_LS1 = again_LSE.abs().amax(dim=-1, keepdim=True)
        same_LS = near(rows_LSE, again_LSE, self._hidden[0].dtype, largest_LS1).all(dim=-1)
        made = [self._chosen_from(*layer) for layer in zip(self.routers, rows_LSE, self._hidden, strict=True)]
        experts_LSK, weights_LSK = (torch.stack(part) for part in zip(*made, strict=True))
        was = in_order(chosen.experts_LTK[:, sample], chosen.weights_LTK[:, sample])
        gives_LS = same_choices(was, in_order(experts_LSK, weights_LSK))
        return {OTHERS: doubted(same_LS), NO_LOGITS: doubted(gives_LS)}

    def _chosen_from(
        self, router: nn.Module, rows_SE: torch.Tensor, hidden_SH: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        experts_SK, weights_SK = choices(routed_by(router, rows_SE, hidden_SH), self.k, router)
        return experts_SK.to(rows_SE.device), weights_SK.to(rows_SE.device)
