"""Four faults that recorders of other projects had, planted in an engine of any family.

A fault is a context in which the engine records something else than its model does, after routing a number of
micro-batches. It is found if the engine raises a `RoutingError`. It is harmless if the recorded values are the same:
the weights of some families are the probabilities themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from workers import recorder
from workers.engine import ModelEngine
from workers.models.routers import choices, router_logits
from workers.shard import Routes, RoutingError

Plant = Callable[[ModelEngine], Any]


@contextmanager
def _answers(engine: ModelEngine, of: Callable[[int, tuple[Any, ...], Any], Any]) -> Iterator[None]:
    """Replace each router's output by the result of `of` for its place, its arguments and its output."""
    with ExitStack() as stack:
        for index, router in enumerate(engine.recorder.routers.values()):
            hook = lambda module, args, output, index=index: of(index, args, output)
            stack.callback(router.register_forward_hook(hook).remove)
        yield


def layer_below(engine: ModelEngine) -> Any:
    """Each layer gets the choices of the layer below, as if a forward pass were captured one layer late."""
    kept: dict[int, Any] = {}

    def of(index: int, args: Any, output: Any) -> Any:
        kept[index] = output
        return kept[max(0, index - 1)]

    return _answers(engine, of)


def earlier_batch(engine: ModelEngine) -> Any:
    """Each router returns its output for the first batch, like a buffer that is filled once."""
    kept: dict[int, Any] = {}
    return _answers(engine, lambda index, args, output: kept.setdefault(index, output))


def earlier_batch_by_shape(engine: ModelEngine) -> Any:
    """A router returns an earlier output when it is called with as many tokens as before, like a replayed graph."""
    stack = ExitStack()
    for router in engine.recorder.routers.values():
        kept: dict[int, Any] = {}

        def forward(hidden: Any, *others: Any, own: Any = router.forward, kept: Any = kept) -> Any:
            return kept.setdefault(hidden[..., 0].numel(), own(hidden, *others))

        stack.enter_context(patch.object(router, "forward", forward))
    return stack


def swapped_routers(engine: ModelEngine) -> Any:
    """The first two layers' routers are mistaken for each other."""
    routers = engine.recorder.routers
    first, second = list(routers)[:2]
    return patch.object(engine.recorder, "routers", routers | {first: routers[second], second: routers[first]})


def swapped_answers(engine: ModelEngine) -> Any:
    """The first two layers' routers answer in each other's place."""
    routers = list(engine.recorder.routers.values())

    def of(index: int, args: Any, output: Any) -> Any:
        return routers[1 - index].forward(*args) if index < 2 else output

    return _answers(engine, of)


def probabilities_for_weights(engine: ModelEngine) -> Any:
    """The recorder mistakes the probability of a chosen expert for its weight."""

    def taken(output: Any, k: int, router: Any) -> Any:
        experts_TK, _ = choices(output, k, router)
        scores_TE = router_logits(output, engine.num_experts)
        assert scores_TE is not None
        probable = (scores_TE >= 0).all() and torch.allclose(scores_TE.sum(-1), scores_TE.new_ones(()))
        return experts_TK, (scores_TE if probable else scores_TE.softmax(-1)).gather(-1, experts_TK).float()

    return patch.object(recorder, "choices", taken)


FAULTS: dict[str, Plant] = {
    "a layer off by one": layer_below,
    "an earlier batch": earlier_batch,
    "an earlier batch, by shape": earlier_batch_by_shape,
    "swapped routers": swapped_routers,
    "swapped answers": swapped_answers,
    "probabilities for weights": probabilities_for_weights,
}
ROWS, POSITIONS = 4, 24


def batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of random tokens, all of one length: two batches have one shape."""
    token = np.random.default_rng(seed).integers(3, 100, (ROWS, POSITIONS)).astype(np.int32)
    return token, np.full(ROWS, POSITIONS)


NO_HARM, NOT_NOTICED, ONE_LAYER = "no harm: the same is recorded", "not noticed", "not planted: one layer has experts"
NEEDS_TWO_LAYERS = (layer_below, swapped_routers, swapped_answers)


def outcome(engine: ModelEngine, plant: Plant, wanted: Routes) -> str:
    """The result of a fault: the error, or a description if there is none.

    Parameters
    ----------
    wanted
        What the engine records for `batch(2)` without a fault.
    """
    if plant in NEEDS_TWO_LAYERS and len(engine.layers) == 1:
        return ONE_LAYER
    with plant(engine):
        try:
            engine.route(*batch(1))
            found = engine.route(*batch(2))
        except RoutingError as error:
            return str(error)
    same = all(np.array_equal(found[name], wanted[name]) for name in wanted)
    return NO_HARM if same else NOT_NOTICED
