"""The effect of every expert: how a token's prediction changes when an expert cannot be chosen at a layer.

T tokens in B rows of P positions, N of them followed by another, L layers that have experts, E experts, K choices, H
hidden. A micro-batch is run once, and the input of each layer stays on the device. Then, for each expert of each layer
in turn, the layers from that one to the end are run without the expert; the layers below do not depend on it. If the
router of that layer gives the same choices and weights as before, the run ends there: the effect is 0.

Promises: choices are changed by the same code as for every other intervention (`workers.models.intervening`). A run
that resumes at a layer without a change must give the predictions of the whole run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from workers.engine import ModelEngine, one_thread
from workers.interventions import Interventions
from workers.models.intervening import Steering
from workers.models.loading import LoadedModel
from workers.models.resuming import kept_of
from workers.models.routers import choices
from workers.record import Recorded
from workers.recorder import on_device
from workers.recordings.logprobs import NextToken
from workers.recordings.recording import doubted, near
from workers.shard import Routes, RoutingError

EFFECTS = Recorded(record=("output_norm", "logprob", "effect"))
"""What is recorded: the effects and what may predict them."""
STEP = (
    2.0**-16
)  # nats; effects are rounded to it, which is far below the error of bf16 and halves the bytes (arbitrary)


class _Unchanged(Exception):
    """Ends a run: a router chooses the same experts as without the change."""


class ImportanceEngine(ModelEngine):
    """Routes rows and computes the effect of every expert of some layers.

    Parameters
    ----------
    loaded, recorded, interventions
        See `ModelEngine`. Log-probabilities must be recorded. Effects are computed with the interventions in place.
    layers
        The model's own layer numbers; by default all layers that have experts.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        recorded: Recorded = EFFECTS,
        interventions: Interventions | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(loaded, recorded, interventions)
        self.measured = self.layers if layers is None else tuple(layers)
        self.description = {**self.description, "effect_layers": [*self.measured]}
        self.kept = kept_of(self.model, self.forward, self.measured)
        self.predicted = next(each for each in self.recorder.recordings if isinstance(each, NextToken))
        self.report: Callable[[int], None] = lambda tokens: None
        """See `workers.shard.Reporting`."""

    @torch.inference_mode()
    def start(self, token: np.ndarray, length: np.ndarray, given: Routes | None = None) -> Callable[[], Routes]:
        """See `ModelEngine`. All runs have finished when it returns."""
        try:
            with self._choices_kept(), self.kept.keeping():
                begun = super().start(token, length, given)
            with self._device_errors(), one_thread(self.device):
                effect_TLE = self._effects(token, length)
                effect = effect_TLE.view(*token.shape, *effect_TLE.shape[1:]).to("cpu")
        finally:
            self.kept.clear()
        return lambda: {**begun(), "effect": effect.numpy()}

    @contextmanager
    def _choices_kept(self) -> Iterator[None]:
        """Keep the choices of the routers of the measured layers while the block runs."""
        self._chosen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        with ExitStack() as stack:
            for layer in self.measured:
                stack.callback(self.steering.routers[layer].register_forward_hook(self._keep(layer)).remove)
            yield

    def _keep(self, layer: int) -> Callable[..., None]:
        def keep(router: Any, args: Any, output: Any) -> None:
            self._chosen[layer] = choices(output, self.experts_per_token, router)

        return keep

    def _effects(self, token: np.ndarray, length: np.ndarray) -> torch.Tensor:
        """The effect of every expert on the prediction at each token; NaN where there is none; shape (T, L, E)."""
        position = np.arange(token.shape[1])
        filled_F, place_N = (
            on_device(np.flatnonzero(position < ends[:, None]), self.device) for ends in (length, length - 1)
        )
        target_N = on_device(token.astype(np.int64).ravel(), self.device)[place_N + 1]
        shape = token.size, len(self.layers), self.num_experts
        effect_TLE = torch.full(shape, torch.nan, device=self.device)
        if not len(place_N):
            self.report(int(length.sum()))
            return effect_TLE
        with self.steering.attached():
            before_N = self._logprobs(self.measured[0], place_N, target_N)
        self._refuse_other(before_N, self.predicted.logprob_T[place_N])
        finite: list[torch.Tensor] = []
        runs = [(layer, expert) for layer in self.measured for expert in range(self.num_experts)]
        reports = self._reports([layer for layer, _ in runs], int(length.sum()))
        for (layer, expert), tokens in zip(runs, reports, strict=True):
            effect_N = torch.zeros_like(before_N)
            with suppress(_Unchanged), self._masked(layer, expert, filled_F):
                effect_N = (self._logprobs(layer, place_N, target_N) - before_N).div_(STEP).round_().mul_(STEP)
            effect_TLE[place_N, self.layers.index(layer), expert] = effect_N
            finite.append(effect_N.isfinite().all())
            self.report(tokens)
        for (layer, expert), there in zip(runs, torch.stack(finite).tolist(), strict=True):
            if not there:
                raise RoutingError(f"layer {layer}: without expert {expert}, predictions are not finite numbers")
        return effect_TLE

    def _logprobs(self, layer: int, place_N: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """The log-probabilities of the next tokens, computed by the layers from a given one on; float32."""
        head = self.predicted.head
        place_N, target_N = (part.to(head.device) for part in (place_N, target_N))
        return head.logprobs(self.kept.resumed(layer).to(head.device), place_N, target_N).to(self.device)

    @contextmanager
    def _masked(self, layer: int, expert: int, filled_F: torch.Tensor) -> Iterator[None]:
        """Keep one expert from being chosen at a layer while the block runs; the run ends there if that changes no
        token."""
        asked = self.steering.asked
        one_more = replace(asked, mask=(*asked.mask, f"{layer}:{expert}"))
        routers = self.steering.routers
        before = self._chosen[layer]

        def compare(router: Any, args: Any, output: Any) -> None:
            pairs = zip(choices(output, self.experts_per_token, router), before, strict=True)
            if all(torch.equal(now[filled_F.to(now.device)], was[filled_F.to(was.device)]) for now, was in pairs):
                raise _Unchanged

        handle = routers[layer].register_forward_hook(compare)
        try:
            with Steering(routers, self.num_experts, self.experts_per_token, one_more).attached():
                yield
        finally:
            handle.remove()

    def _reports(self, layers: Sequence[int], tokens: int) -> list[int]:
        """How many tokens count as done after each run: in proportion to the number of layers that it runs."""
        model: Any = self.model
        layers_run = np.array([len(model.layers) - layer for layer in layers])
        done = tokens * layers_run.cumsum() // layers_run.sum()
        found: list[int] = np.diff(done, prepend=0).tolist()
        return found

    def _refuse_other(self, found_N: torch.Tensor, recorded_N: torch.Tensor) -> None:
        if doubted(near(found_N, recorded_N, self.predicted.head.dtype, recorded_N.abs())[None]).any():
            raise RoutingError(
                f"layer {self.measured[0]}: if the layers from this one on are run again, the predictions differ from"
                " those of the whole model. The effects of this family's experts cannot be measured"
            )
