"""Record what each router chose while a model runs, and prove that the choices belong to these tokens.

T tokens, H hidden size, E experts, k choices, L layers with experts. A forward hook on each router keeps its choices on
the device; when the last hook has fired, the forward pass is stopped, because the last layer's experts and the final
norm route nothing. It continues if something after the last router is recorded too (`workers.recordings`).

The proof. Other recorders have been fooled by hooks that never fire, fire twice, or return an earlier batch; 0 is a
legal expert. So every layer must fire exactly once, after the layer below it, with one set of choices for each token.
Every index must be legal and every weight finite. On a sample of tokens, the layer's own router is called again with
the hidden states that reached it and must return the recorded choices and weights. The order of the sample differs each
time, so that a router which repeats an earlier answer for as many tokens is found too. What was recorded must also be
what the experts were given (`workers.recordings.used`): calling the router again does not show that a probability was
mistaken for a weight, because the same mistake is made twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from store.layout import FLOAT16_BITS, FLOAT32_BITS
from workers.models.routers import choices, in_order
from workers.recordings.recording import Batch, Chosen, Recording, doubted, same_choices
from workers.shard import RoutingError

SAMPLE = 64  # tokens of a micro-batch for which each router is called again (arbitrary; cost within noise)

ILLEGAL = "its router returned an expert that does not exist, or one twice for a token (num_experts = {experts})"
NOT_FINITE = "its router's logits or weights are not finite"
OTHERS = "its recorded choices are not those of its router for these tokens, but of an earlier batch or another layer"


class _LastRouterDone(Exception):
    """Ends a forward pass: nothing after the last router is needed."""


class Micro(NamedTuple):
    """What was recorded of a micro-batch, on the device."""

    arrays: dict[str, torch.Tensor]
    """Tensors by the name of the array in the store, shape (T, \\*trailing): `expert`, `weight` and the other
    recordings. Experts are uint8, or int32 if E > 255."""
    faults: dict[str, torch.Tensor]
    """Maps each possible fault to the first token (of rows · positions) that shows it in each layer, or -1; int64,
    shape (L,)."""


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor on the device, without waiting for a GPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class RouteRecorder:
    """Forward hooks on a model's routers.

    Parameters
    ----------
    routers
        Maps layer numbers to router modules, in the model's order.
    num_experts, experts_per_token
        E and k.
    recordings
        What is recorded besides the choices.
    weight_bits
        See `store.Layout`.
    asked_about
        Returns a context for some tokens of a micro-batch, in which routers are called with these tokens only.

    Raises
    ------
    RoutingError
        When there is no router, or one router belongs to two layers.
    """

    def __init__(
        self,
        routers: Mapping[int, nn.Module],
        num_experts: int,
        experts_per_token: int,
        recordings: Sequence[Recording] = (),
        weight_bits: int = FLOAT16_BITS,
        asked_about: Callable[[torch.Tensor], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if not routers:
            raise RoutingError("the model has no routers to record")
        self.routers = dict(routers)
        owner: dict[nn.Module, int] = {}
        for layer, router in self.routers.items():
            if owner.setdefault(router, layer) != layer:
                raise RoutingError(f"layer {layer}: its router is also the router of layer {owner[router]}")
        self.num_experts, self.k = num_experts, experts_per_token
        self.recordings, self.weight_bits = tuple(recordings), weight_bits
        self._asked_about = asked_about
        self._whole = any(recording.whole for recording in recordings)
        self._choices: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._finite: dict[int, torch.Tensor] = {}
        self._again: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sample = torch.zeros(0, dtype=torch.long)  # on the model's first device, like everything that is kept
        self._fired: list[int] = []
        self._batches = self._tokens = 0

    @contextmanager
    def attached(self) -> Iterator["RouteRecorder"]:
        """Attach hooks to every router while the block runs."""
        with ExitStack() as stack:
            for layer, router in self.routers.items():
                stack.callback(router.register_forward_hook(self._after(layer)).remove)
            for recording in self.recordings:
                stack.enter_context(recording.attached())
            yield self

    def record(self, model: Callable[..., Any], token: torch.Tensor, length: np.ndarray) -> Micro:
        """Run one micro-batch; the recordings stay on the device.

        Parameters
        ----------
        model
            The model to which the recorder is attached, or a callable that applies its layers.
        token : int64 tensor, shape (rows, positions)
            Right-padded, with any legal id in the padding: attention is causal, so padding affects no token before it.
        length : int array, shape (rows,)
            Number of filled positions; samples are taken from these.

        Raises
        ------
        RoutingError
            When a layer did not fire, fired more than once or out of order, or fired for another number of tokens.
        """
        position = np.arange(token.shape[1])
        filled, followed = (np.flatnonzero(position < ends[:, None]) for ends in (length, length - 1))
        picks = filled[np.linspace(0, len(filled) - 1, min(SAMPLE, len(filled))).astype(int)]
        picks = np.roll(picks, self._batches)
        self._batches, self._tokens = self._batches + 1, token.numel()
        self._choices, self._fired = {layer: [] for layer in self.routers}, []
        self._finite, self._again = {}, {}
        self._sample = on_device(picks, token.device)
        batch = Batch(token, self._sample, on_device(followed, token.device))
        for recording in self.recordings:
            recording.begin(batch)
        try:
            with suppress(_LastRouterDone):  # no mask and no cache: plain causal attention, each row alone
                output = model(input_ids=token, attention_mask=None, use_cache=False)
                for recording in self.recordings:
                    recording.ended(output)
        except (IndexError, RuntimeError):  # experts raise various errors for a choice that does not exist
            if token.device.type == "cpu":
                self._name_illegal_layer()
            raise
        return self._checked(on_device(filled, token.device))

    def _after(self, layer: int) -> Any:
        index = list(self.routers).index(layer)
        last = index == len(self.routers) - 1

        def keep_choices(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            self._fired.append(layer)
            experts_TK, weights_TK = self._of_layer(layer, output)
            if len(experts_TK) != self._tokens:  # raised at once, because the layer's experts would fail on it
                raise RoutingError(
                    f"layer {layer}: its router chose for {len(experts_TK)} tokens instead of {self._tokens}"
                )
            home, hidden_TH = self._sample.device, args[0].reshape(-1, args[0].shape[-1])
            self._choices[layer].append((experts_TK.to(home), weights_TK.to(home)))
            self._finite[layer] = _finite(output).to(home)
            hidden_SH = hidden_TH[self._sample.to(hidden_TH.device)]
            with self._asked_about(self._sample):
                again = self.routers[layer].forward(hidden_SH)
            experts_SK, weights_SK = self._of_sample(layer, again)
            self._again[layer] = experts_SK.to(home), weights_SK.to(home)
            for recording in self.recordings:
                recording.routed(index, hidden_SH, output, again)
            if last and not self._whole:
                raise _LastRouterDone

        return keep_choices

    def _name_illegal_layer(self) -> None:
        for layer, fired in self._choices.items():
            for experts_TK, _ in fired:
                if self._illegal(experts_TK).any():
                    raise RoutingError(f"layer {layer}: {ILLEGAL.format(experts=self.num_experts)}")

    def _illegal(self, experts: torch.Tensor) -> torch.Tensor:
        """Whether each choice names an expert that does not exist; bool, on the device."""
        return (experts < 0) | (experts >= self.num_experts)

    def _checked(self, filled: torch.Tensor) -> Micro:
        for layer, fired in self._choices.items():
            if len(fired) != 1:
                raise RoutingError(
                    f"layer {layer}: its router fired {len(fired)} times in one forward pass instead of once"
                )
        for layer, fired_layer in zip(self._choices, self._fired, strict=True):
            if layer != fired_layer:
                raise RoutingError(
                    f"layer {layer}: the router recorded as that of layer {fired_layer} fired in its place"
                )
        chosen = Chosen(*stacked([fired[0] for fired in self._choices.values()]), self._sample)
        experts_LTK, weights_LTK = in_order(chosen.experts_LTK, chosen.weights_LTK)
        experts_LFK = experts_LTK[:, filled]
        wrong_LF = self._illegal(experts_LFK).any(dim=-1)
        illegal_L = wrong_LF.any(dim=1)
        for by in range(1, self.k):
            wrong_LF |= (experts_LFK == experts_LFK.roll(by, dims=-1)).any(dim=-1)
        finite_LF = torch.stack(list(self._finite.values()))[:, filled]
        was = experts_LTK[:, self._sample], weights_LTK[:, self._sample]
        other_LS = doubted(same_choices(was, in_order(*stacked(list(self._again.values())))))
        doubts = {OTHERS: ~illegal_L[:, None] & other_LS}
        with self._asked_about(self._sample):
            for recording in self.recordings:
                doubts |= recording.doubts(chosen)
        faults = {ILLEGAL: _first(wrong_LF, filled), NOT_FINITE: _first(~finite_LF, filled)}
        faults |= {what: _first(found_LS, self._sample) for what, found_LS in doubts.items()}
        dtype = torch.uint8 if self.num_experts <= 255 else torch.int32
        arrays = {
            "expert": experts_LTK.transpose(0, 1).to(dtype),
            "weight": rounded(weights_LTK.transpose(0, 1), self.weight_bits),
        }
        for recording in self.recordings:
            arrays |= recording.arrays(chosen)
        return Micro(arrays, faults)

    def _of_sample(self, layer: int, again: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer's router returned for the sampled tokens when it was called with these tokens only."""
        found = self._of_layer(layer, again)
        if len(found[0]) != len(self._sample):
            raise RoutingError(
                f"layer {layer}: called with {len(self._sample)} tokens, its router chose for {len(found[0])}"
            )
        return found

    def _of_layer(self, layer: int, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return choices(output, self.k, self.routers[layer])
        except RoutingError as error:
            raise RoutingError(f"layer {layer}: {error}") from error


def rounded(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Weights (float32) rounded to so many mantissa bits, ties to even: float16 for 10 bits or fewer, float32 for
    23."""
    if bits == FLOAT32_BITS:
        return weights
    if bits == FLOAT16_BITS:
        return weights.half()
    drop = FLOAT32_BITS - bits
    as_bits = weights.contiguous().view(torch.int32)
    even = as_bits + ((1 << (drop - 1)) - 1) + ((as_bits >> drop) & 1)
    return (even >> drop << drop).view(torch.float32).half()


def stacked(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices and weights of all layers in the order that the routers return; shape (L, T, k)."""
    experts, weights = zip(*layers, strict=True)
    return torch.stack(experts), torch.stack(weights)


def _finite(output: Any) -> torch.Tensor:
    """Whether the weights and logits that a router returns for each token are all finite; bool, shape (T,)."""
    parts = output if isinstance(output, tuple) else (output,)
    floats = [part for part in parts if torch.is_tensor(part) and part.is_floating_point()]
    return torch.stack([part.flatten(0, -2).isfinite().all(dim=-1) for part in floats]).all(dim=0)


def _first(found_LF: torch.Tensor, token_F: torch.Tensor) -> torch.Tensor:
    """The first token found in each layer, or -1; int64, shape (L,)."""
    return torch.where(found_LF.any(dim=1), token_F[found_LF.int().argmax(dim=1)], -1)
