"""A model's layers run again from one of them on: what reached each one is kept while the model runs.

T tokens in B rows of P positions, H hidden. A forward of ours resumes behind the attention of a layer, so that
attention is computed once for all runs that resume there. transformers' layers are called again, attention too, with
the arguments that they had. Both give the same bits as before where nothing is changed meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch


class Kept(Protocol):
    """What reached some layers of a model when it last ran."""

    def keeping(self) -> Any:
        """A context within which the model is to run once, to its end."""

    def resumed(self, layer: int) -> torch.Tensor:
        """The hidden states after the final norm, shape (T, H), of the layers from one of them on."""

    def clear(self) -> None:
        """Free what is kept."""


def kept_of(model: Any, forward: Any, layers: Sequence[int]) -> Kept:
    """What keeps what reaches some layers, by the model's own numbers.

    Parameters
    ----------
    forward
        What applies the model: itself, or a forward of ours, which must be run to its end (`whole`).

    Raises
    ------
    ValueError
        When the model has no list of layers.
    """
    if not hasattr(model, "layers"):
        raise ValueError(
            f"{type(model).__name__} has no list of its layers named layers: they cannot be run one by one"
        )
    return KeptCalls(model, layers) if forward is model else KeptStates(forward, layers)


class KeptStates:
    """For a forward of ours: the hidden states behind the attention of each layer."""

    def __init__(self, forward: Any, layers: Sequence[int]) -> None:
        self.forward, self.layers = forward, {*layers}
        self.clear()

    def clear(self) -> None:
        """See `Kept`; so for the others."""
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
        seen, self.forward.seen = self.forward.seen, None  # what is recorded is of the whole run alone
        try:
            found = self.forward.resumed(layer, self._states[layer].clone(), self._positions)
        finally:
            self.forward.seen = seen
        normed_TH: torch.Tensor = found.normed_TH
        return normed_TH


class KeptCalls:
    """For transformers' forward: what each layer was called with."""

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
