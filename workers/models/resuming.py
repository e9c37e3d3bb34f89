"""Run a model's layers again, starting at one of them: the input of each layer is kept while the model runs.

T tokens in B rows of P positions, H hidden. This project's own forward passes resume after the attention of a layer, so
that attention is computed once for all runs that resume there. transformers' layers are called again, including
attention, with the same arguments. Both give the same bits as before if nothing has changed meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch


class Kept(Protocol):
    """The inputs of some layers of a model in its last run."""

    def keeping(self) -> Any:
        """A context in which the model must be run once, to its end."""

    def resumed(self, layer: int) -> torch.Tensor:
        """The hidden states after the final norm, shape (T, H), from running the layers from a given one on."""

    def clear(self) -> None:
        """Free the kept tensors."""


def kept_of(model: Any, forward: Any, layers: Sequence[int]) -> Kept:
    """An object that keeps the inputs of some layers, given by the model's own numbers.

    Parameters
    ----------
    forward
        What runs the model: the model itself, or this project's own forward pass, which must run all layers (`whole`).

    Raises
    ------
    ValueError
        When the model has no list of layers.
    """
    if not hasattr(model, "layers"):
        raise ValueError(f"{type(model).__name__} has no list of layers named layers, so they cannot be run one by one")
    return KeptCalls(model, layers) if forward is model else KeptStates(forward, layers)


class KeptStates:
    """For this project's own forward passes: the hidden states after the attention of each layer."""

    def __init__(self, forward: Any, layers: Sequence[int]) -> None:
        self.forward, self.layers = forward, {*layers}
        self.clear()

    def clear(self) -> None:
        """See `Kept`, also for the other methods."""
        self._states: dict[int, torch.Tensor] = {}

    @contextmanager
    def keeping(self) -> Iterator[None]:
        self.clear()
        self.forward.attended = self._keep
        handle = self.forward.model.embed_tokens.register_forward_pre_hook(self._keep_shape)
        try:
            yield
        finally:
            self.forward.attended = None
            handle.remove()

    def _keep_shape(self, embedding: Any, args: tuple[Any, ...]) -> None:
        self._positions = args[0].shape[1]

    def _keep(self, layer: int, residual_TH: torch.Tensor) -> None:
        if layer in self.layers:
            self._states[layer] = residual_TH.clone()

    def resumed(self, layer: int) -> torch.Tensor:
        seen, self.forward.seen = self.forward.seen, None  # only the whole run is recorded
        try:
            found = self.forward.resumed(layer, self._states[layer].clone(), self._positions)
        finally:
            self.forward.seen = seen
        normed_TH: torch.Tensor = found.normed_TH
        return normed_TH


class KeptCalls:
    """For transformers' forward pass: the arguments of each layer."""

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        self.model, self.layers = model, {*layers}
        self.clear()

    def clear(self) -> None:
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._states: dict[int, torch.Tensor] = {}

    @contextmanager
    def keeping(self) -> Iterator[None]:
        self.clear()
        with ExitStack() as stack:
            for number, layer in enumerate(self.model.layers):
                stack.callback(layer.register_forward_pre_hook(self._keep(number), with_kwargs=True).remove)
            yield

    def _keep(self, number: int) -> Callable[..., None]:
        def keep(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[number] = args[1:], kwargs
            if number in self.layers:
                self._states[number] = args[0]

        return keep

    def resumed(self, layer: int) -> torch.Tensor:
        hidden = self._states[layer]
        for number, module in enumerate(self.model.layers[layer:], layer):
            args, kwargs = self._calls[number]
            output = module(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
        normed: torch.Tensor = self.model.norm(hidden)
        return normed.flatten(0, 1)
