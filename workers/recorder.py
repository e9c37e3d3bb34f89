"""Record what each router chose while a model runs, and prove that it was for these tokens.

T tokens, H hidden size, E experts, k choices, L layers with experts. A forward hook on each router keeps its choices
on the device; when the last one has fired the forward is stopped, since what follows it (the last layer's experts,
the final norm) routes nothing.

The proof. A hook that never fires, fires twice, or returns an earlier batch is what other recorders have been fooled
by; 0 is a legal expert. So every layer must fire exactly once, after the layer below it, with one choice set for
each token, every index must be legal, every weight finite, and on a sample of tokens the layer's own router, given
the hidden states that reached it, must choose and weigh as was recorded. The sample is asked about in another order
each time, so that a router which repeats an earlier answer for as many tokens is found out too.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from workers.shard import RoutingError

SAMPLE = 64  # tokens of a micro-batch on which each router is asked again (arbitrary; cost within noise)
# Relative. Another GEMM shape may round bf16 logits otherwise, by a step of 2^-4 each below 16, which moves a weight by
# e^(2 · 2^-4) - 1 = 0.133 at most. Products in fp8 have no part in it: both answers have the same input.
WEIGHT_TOLERANCE = 0.15
SAMPLE_AGREEING = 0.75  # near-ties flip 0.2-0.75 % of choices (measured); routes of other tokens agree on 3-30 %

ILLEGAL = "its router returned an expert that does not exist, or one twice for a token (num_experts = {experts})"


class _LastRouterDone(Exception):
    """Ends a forward: nothing after the last router matters."""


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array as a tensor there; a GPU is not waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def in_order(experts: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Choices by falling weight, ties by lower expert id; any shape, the choices last.

    By exchanges of neighbours: for the few choices of a token it is elementwise, where a GPU's sort would take longer
    than the router.
    """
    expert, weight = list(experts.unbind(-1)), list(weights.unbind(-1))
    for last in range(len(expert) - 1, 0, -1):
        for i in range(last):
            j = i + 1
            swap = (weight[j] > weight[i]) | ((weight[j] == weight[i]) & (expert[j] < expert[i]))
            expert[i], expert[j] = torch.where(swap, expert[j], expert[i]), torch.where(swap, expert[i], expert[j])
            weight[i], weight[j] = torch.where(swap, weight[j], weight[i]), torch.where(swap, weight[i], weight[j])
    return torch.stack(expert, dim=-1), torch.stack(weight, dim=-1)


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


class RouteRecorder:
    """Forward hooks on a model's routers.

    Parameters
    ----------
    routers
        Layer number to router module, as the model orders them.
    num_experts, experts_per_token
        E and k.

    Raises
    ------
    RoutingError
        When there is no router, or one stands for two layers.
    """

    def __init__(self, routers: Mapping[int, nn.Module], num_experts: int, experts_per_token: int) -> None:
        if not routers:
            raise RoutingError("the model has no routers to record")
        self.routers = dict(routers)
        owner: dict[nn.Module, int] = {}
        for layer, router in self.routers.items():
            if owner.setdefault(router, layer) != layer:
                raise RoutingError(f"layer {layer}: its router is that of layer {owner[router]} too")
        self.num_experts, self.k = num_experts, experts_per_token
        self._choices: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._finite: dict[int, torch.Tensor] = {}
        self._again: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sample = torch.zeros(0, dtype=torch.long)  # on the device where the model begins, as all that is kept
        self._fired: list[int] = []
        self._batches = self._tokens = 0

    @contextmanager
    def attached(self) -> Iterator["RouteRecorder"]:
        """Hooks on every router while the block runs."""
        handles = []
        try:
            for layer, router in self.routers.items():
                handles.append(router.register_forward_hook(self._after(layer)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def record(
        self, model: Callable[..., Any], token: torch.Tensor, length: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run one micro-batch; the choices stay on the device.

        Parameters
        ----------
        model
            The model to which the recorder is attached, or what applies its layers.
        token : int64 tensor, shape (rows, positions)
            Right-padded; any legal id in the padding: attention is causal, so it reaches no token before it.
        length : int array, shape (rows,)
            Filled positions; samples are taken among them.

        Returns
        -------
        experts_TLK : uint8 tensor (int32 where E > 255)
        weights_TLK : float16 tensor
        faults_LF : int64 tensor, shape (L, 3)
            Per layer the first token, of rows · positions, that shows an illegal or doubled expert, a logit or weight
            that is not finite, another choice than a sample that does not agree; -1 where there is none.

        Raises
        ------
        RoutingError
            When a layer did not fire, fired more than once, out of its place, or for another number of tokens.
        """
        filled = np.flatnonzero(np.arange(token.shape[1]) < length[:, None])
        picks = filled[np.linspace(0, len(filled) - 1, min(SAMPLE, len(filled))).astype(int)]
        picks = np.roll(picks, self._batches)
        self._batches, self._tokens = self._batches + 1, token.numel()
        self._choices, self._fired = {layer: [] for layer in self.routers}, []
        self._finite, self._again = {}, {}
        self._sample = on_device(picks, token.device)
        try:
            with suppress(_LastRouterDone):  # no mask and no cache: plain causal attention, each row alone
                model(input_ids=token, attention_mask=None, use_cache=False)
        except (IndexError, RuntimeError):  # experts fail in their own words on a choice that does not exist
            if token.device.type == "cpu":
                self._name_illegal_layer()
            raise
        return self._checked(on_device(filled, token.device))

    def _after(self, layer: int) -> Any:
        last = layer == next(reversed(self.routers))

        def keep_choices(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            self._fired.append(layer)
            experts_TK, weights_TK = _of_layer(layer, output, self.k)
            if len(experts_TK) != self._tokens:  # raised at once: the layer's experts would fail on it
                raise RoutingError(f"layer {layer}: its router chose for {len(experts_TK)} tokens of {self._tokens}")
            home, hidden_TH = self._sample.device, args[0].reshape(-1, args[0].shape[-1])
            self._choices[layer].append((experts_TK.to(home), weights_TK.to(home)))
            self._finite[layer] = _finite(output).to(home)
            experts_SK, weights_SK = self._asked_again(layer, hidden_TH[self._sample.to(hidden_TH.device)])
            self._again[layer] = experts_SK.to(home), weights_SK.to(home)
            if last:
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

    def _checked(self, filled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        for layer, fired in self._choices.items():
            if len(fired) != 1:
                raise RoutingError(f"layer {layer}: its router fired {len(fired)} times in one forward, once is right")
        for layer, fired_layer in zip(self._choices, self._fired, strict=True):
            if layer != fired_layer:
                raise RoutingError(f"layer {layer}: in its place fired the router recorded as layer {fired_layer}'s")
        experts_LTK, weights_LTK = self._stacked([fired[0] for fired in self._choices.values()])
        experts_LFK = experts_LTK[:, filled]
        wrong_LF = self._illegal(experts_LFK).any(dim=-1)
        illegal_L = wrong_LF.any(dim=1)
        for by in range(1, self.k):
            wrong_LF |= (experts_LFK == experts_LFK.roll(by, dims=-1)).any(dim=-1)
        finite_LF = torch.stack(list(self._finite.values()))[:, filled]
        was = experts_LTK[:, self._sample], weights_LTK[:, self._sample]
        other_LT = ~illegal_L[:, None] & self._disagree(was, self._stacked(list(self._again.values())))
        firsts = _first(wrong_LF, filled), _first(~finite_LF, filled), _first(other_LT, self._sample)
        faults_LF = torch.stack(firsts, dim=1)
        dtype = torch.uint8 if self.num_experts <= 255 else torch.int32
        return experts_LTK.transpose(0, 1).to(dtype), weights_LTK.transpose(0, 1).half(), faults_LF

    @staticmethod
    def _stacked(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        experts, weights = zip(*layers, strict=True)
        return in_order(torch.stack(experts), torch.stack(weights))

    def _asked_again(self, layer: int, hidden_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer's router says of the sampled tokens when it is asked about them alone."""
        again = _of_layer(layer, self.routers[layer].forward(hidden_TH), self.k)
        if len(again[0]) != len(self._sample):
            raise RoutingError(
                f"layer {layer}: asked about {len(self._sample)} tokens, its router chose for {len(again[0])}"
            )
        return again

    def _disagree(
        self, was: tuple[torch.Tensor, torch.Tensor], again: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Of which sampled tokens each layer's router, asked again, gave another answer; of none where they are few."""
        # Near-ties may swap one expert, also the same one for every token where the text repeats one token.
        shared_LT = (again[0][..., :, None] == was[0][..., None, :]).any(dim=-1).sum(dim=-1)
        close_LTK = (again[1] - was[1]).abs() <= WEIGHT_TOLERANCE * was[1].abs()
        agrees_LT = close_LTK.all(dim=-1) & (shared_LT >= max(1, self.k - 1))
        return ~agrees_LT & (agrees_LT.float().mean(dim=1, keepdim=True) < SAMPLE_AGREEING)


def _finite(output: Any) -> torch.Tensor:
    """Whether all that a router tells of each token, weights and logits, is finite; bool, shape (T,)."""
    parts = output if isinstance(output, tuple) else (output,)
    floats = [part for part in parts if torch.is_tensor(part) and part.is_floating_point()]
    return torch.stack([part.flatten(0, -2).isfinite().all(dim=-1) for part in floats]).all(dim=0)


def _first(found_LF: torch.Tensor, token_F: torch.Tensor) -> torch.Tensor:
    """Of each layer the first token that was found, or -1; int64, shape (L,)."""
    return torch.where(found_LF.any(dim=1), token_F[found_LF.int().argmax(dim=1)], -1)


def _of_layer(layer: int, output: Any, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        return choices(output, k)
    except RoutingError as error:
        raise RoutingError(f"layer {layer}: {error}") from error
