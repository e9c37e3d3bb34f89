"""Fill one shard: its rows through the model in micro-batches, sorted by length, and back into their order.

What a micro-batch is made of depends on the shard and on `batch_tokens` alone, never on the worker or on what ran
before: with equal identity, halvings, device type and versions the bytes are equal. Nothing here imports torch; an
engine is whatever routes rows. A device never waits for what follows it: its results are fetched by another thread
while it computes the next micro-batch, of this shard or of the next one.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np

from store.group import CaptureGroup
from store.layout import Layout
from store.plan import Rows

ROUTING_VERSION = 1
"""Of what decides a shard's bytes in this project's own code: the forwards and kernels of `workers.models`, the order
of choices, the make-up of micro-batches. Raise it with any change to them that changes what is captured: it is part of
the identity. `tests/workers/test_routing_version.py` fails where that was forgotten."""
BATCH_COST_TOKENS = 1400  # as long as so many tokens takes what each micro-batch costs (measured: gpu-engine.json)


Routes = Mapping[str, np.ndarray]
"""What was captured of rows, by the name of the array of the store: `expert`, `weight`, and what else is recorded."""


class OutOfMemory(RuntimeError):
    """A micro-batch did not fit; the shard is rerun with half the tokens in each."""


class DeviceLost(RuntimeError):
    """The device failed in a way that no process recovers from: this one must end."""


class RoutingError(RuntimeError):
    """What the routers gave cannot be what the model did with these rows; the message names layer and row.

    Parameters
    ----------
    row
        The first row of the micro-batch that shows it, where it shows in one.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class Engine(Protocol):
    """Routes rows: a model with its hooks, or in tests a formula."""

    layers: tuple[int, ...]
    num_experts: int
    experts_per_token: int
    description: Mapping[str, Any]
    """What it is, in the terms of a capture's identity; fields that an identity does not have mean nothing there."""

    def start(self, token: np.ndarray, length: np.ndarray, given: Routes | None = None) -> Callable[[], Routes]:
        """Begin to route right-padded rows.

        Parameters
        ----------
        token : int32 array, shape (rows, positions)
            At and beyond a row's length the values mean nothing.
        length : int32 array, shape (rows,)
        given
            `expert`, and perhaps `weight`, which its routers take instead of their own.

        Returns
        -------
        finish
            Waits for the routes, in any thread, and gives each array by its name in `Layout.routes`, with anything at
            and beyond a row's length:

            expert : uint8 or uint16 array, shape (rows, positions, layers, k)
                In order of falling weight.
            weight : float16 array, or float32 where the layout has it so, same shape
            others : array, shape (rows, positions, \\*trailing[1:]) of their `ArraySpec`
                What the layout's `record` names.
        """
        ...


@runtime_checkable
class Reporting(Protocol):
    """An engine that takes minutes for a micro-batch, and tells meanwhile how much of it is done."""

    report: Callable[[int], None]
    """Called now and then with a number of tokens, in `start`: together those of the micro-batch."""


def micro_batches(length: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Row indices of each micro-batch, of rows alike in length: padded size at most `batch_tokens`, one row at least.

    A micro-batch also ends where its padding would cost more than another one does: real text then takes 8 % more than
    its tokens alone would, 10 % without (speeches; simulated with that cost). The largest padded size comes first: what
    does not fit fails at once. The second largest comes last: the device computes it while the next shard is read.
    """
    order = np.argsort(-length.astype(np.int64), kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = int(length[order[start]])
        rows = order[start : start + max(1, batch_tokens // longest)]
        padding = np.cumsum(longest - length[rows].astype(np.int64))
        batches.append(rows[: int(np.searchsorted(padding, BATCH_COST_TOKENS, side="right"))])
        start += len(batches[-1])
    batches.sort(key=lambda batch: -len(batch) * int(length[batch[0]]))  # of equals, longer rows first
    return [*batches[:1], *batches[2:], *batches[1:2]]


def route_rows(
    engine: Engine,
    rows: Rows,
    layout: Layout,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda tokens: None,
    given: Routes | None = None,
) -> Callable[[], Routes]:
    """The routes of a shard's rows, in the rows' own order, fill values at and beyond each length.

    Parameters
    ----------
    batch_tokens
        Padded tokens in a micro-batch at most.
    progress
        Called with the number of tokens of each micro-batch that was begun.
    given
        Routes of the rows, with which the engine's routers are given theirs.

    Returns
    -------
    finish
        All micro-batches are begun, the last one perhaps not done: this waits for it, in any thread, and gives
        each array of `Layout.routes` by name, with the shape (rows, \\*trailing) of its `ArraySpec`.

    Raises
    ------
    OutOfMemory, DeviceLost
        From the engine.
    RoutingError
        From the engine, or when an array is missing or has another shape than the layout's; of the last micro-batches
        from `finish`.
    """
    arrays = layout.arrays()
    specs = {name: arrays[name] for name in layout.routes}
    count = len(rows.length)

    def unfilled() -> dict[str, np.ndarray]:
        return {name: np.full((count, *spec.trailing), spec.fill, dtype=spec.dtype) for name, spec in specs.items()}

    def put(batch: np.ndarray, length: np.ndarray, width: int, finish: Callable[[], Routes]) -> None:
        with _of_the_shard(batch):
            found = finish()
        shapes = {name: (len(batch), width, *spec.trailing[1:]) for name, spec in specs.items()}
        filled = np.arange(width) < length[:, None]
        _check(found, shapes, filled, layout)
        for name, values in routes.result().items():
            for row, its, size in zip(batch, found[name], length, strict=True):  # slices: other threads run meanwhile
                values[row, :size] = its[:size]

    putter = ThreadPoolExecutor(1, thread_name_prefix="put")  # beside the next micro-batch
    if reporting := isinstance(engine, Reporting):
        engine.report = progress
    routes = putter.submit(unfilled)  # a shard of 48 layers and 8 choices has 300 MB, which take a tenth of a second
    pending: Future[None] | None = None
    try:
        for batch in micro_batches(rows.length, batch_tokens):
            length = rows.length[batch]
            width = int(length.max())
            theirs = () if given is None else ({name: values[batch, :width] for name, values in given.items()},)
            begun = engine.start(rows.token[batch, :width], length, *theirs)
            if pending is not None:
                pending.result()
            pending = putter.submit(put, batch, length, width, begun)
            if not reporting:
                progress(int(length.sum()))
    finally:
        putter.shutdown(wait=False)  # ends with what was submitted

    def finish() -> Routes:
        if pending is not None:
            pending.result()
        return routes.result()

    return finish


def _check(found: Routes, shapes: Mapping[str, tuple[int, ...]], filled: np.ndarray, layout: Layout) -> None:
    """Refuse a micro-batch without an array, with one of another shape, or with an expert that does not exist."""
    if missing := [name for name in shapes if name not in found]:
        raise RoutingError(
            f"the engine gave {', '.join(found)} and no {missing[0]}, which this capture records: use an engine that"
            f" gives it, or capture without {missing[0]}"
        )
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise RoutingError(f"the engine gave {name} of shape {found[name].shape}, and {shape} is right in {layout}")
    legal = found["expert"][filled] < layout.num_experts
    if not legal.all():
        layer = layout.layers[int(np.nonzero(~legal)[1][0])]
        raise RoutingError(f"layer {layer} chose an expert at or beyond num_experts = {layout.num_experts}")


@contextmanager
def _of_the_shard(batch: np.ndarray) -> Iterator[None]:
    """Name the shard's row in an error that names a row of the micro-batch."""
    try:
        yield
    except RoutingError as error:
        if error.row is None:
            raise
        raise RoutingError(f"{error} of row {batch[error.row]} of the shard") from error


def capture_shard(
    group: CaptureGroup,
    shard: int,
    rows: Rows,
    engine: Engine,
    *,
    batch_tokens: int,
    max_halvings: int = 6,
    progress: Callable[[int], None] = lambda tokens: None,
    given: Routes | None = None,
) -> Callable[[], tuple[Routes, dict[str, Any]]]:
    """Route one shard's rows; the caller commits them with `CaptureGroup.commit`.

    Parameters
    ----------
    batch_tokens, progress, given
        As for `route_rows`.

    Returns
    -------
    finish
        Waits for the last micro-batch, in any thread, and gives

        routes : dict of arrays
            What `commit` takes.
        facts : dict
            `seconds` and `halvings`: how often the micro-batch was halved because it did not fit.

    Raises
    ------
    RoutingError
        When the routes cannot be trusted, also from `finish`; the message names the shard.
    OutOfMemory
        When even the smallest micro-batch does not fit.
    """
    start = time.perf_counter()
    layout = group.layout
    halvings = 0
    while True:
        try:
            with _naming(group, shard):
                routed = route_rows(engine, rows, layout, max(1, batch_tokens >> halvings), progress, given)
        except OutOfMemory as error:
            if halvings == max_halvings:
                tokens = max(1, batch_tokens >> halvings)
                raise OutOfMemory(
                    f"shard {shard} of {group.dataset} does not fit, not even in micro-batches of {tokens} tokens:"
                    f" use a smaller --sequence_length or a larger device ({error})"
                ) from error
            halvings += 1
            continue
        break

    def finish() -> tuple[Routes, dict[str, Any]]:
        with _naming(group, shard):
            routes = routed()
        return routes, {"seconds": time.perf_counter() - start, "halvings": halvings}

    return finish


@contextmanager
def _naming(group: CaptureGroup, shard: int) -> Iterator[None]:
    try:
        yield
    except RoutingError as error:
        raise RoutingError(f"shard {shard} of {group.dataset}: {error}") from error
