"""Fill one shard: run its rows through the model in micro-batches sorted by length, and restore their order.

The rows of a micro-batch depend only on the shard and on `batch_tokens`, never on the worker or on earlier work: with
equal identity, halvings, device type and versions the bytes are equal. Nothing here imports torch; an engine is
anything that routes rows. A device never waits for the steps after it: another thread fetches its results while it
computes the next micro-batch, of this shard or of the next one.
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
"""Version of the parts of this project's own code that decide a shard's bytes: the forward passes and kernels of
`workers.models`, the order of choices, and the composition of micro-batches. Raise it with any change to them that
changes captured values: it is part of the identity. `tests/workers/test_routing_version.py` fails if this was
forgotten."""
BATCH_COST_TOKENS = 1400  # what each micro-batch costs, in tokens that take as long (measured: gpu-engine.json)


Routes = Mapping[str, np.ndarray]
"""The captured arrays of some rows, by their names in the store: `expert`, `weight` and the other recordings."""


class OutOfMemory(RuntimeError):
    """A micro-batch did not fit. The shard is run again with half as many tokens in each."""


class DeviceLost(RuntimeError):
    """The device failed in a way from which a process cannot recover: this process must end."""


class RoutingError(RuntimeError):
    """The routers' output cannot be what the model did with these rows; the message names the layer and the row.

    Parameters
    ----------
    row
        The first row of the micro-batch that shows it, if a row does.
    """

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class Engine(Protocol):
    """Routes rows: a model with its hooks, or a formula in tests."""

    layers: tuple[int, ...]
    num_experts: int
    experts_per_token: int
    description: Mapping[str, Any]
    """Describes the engine with the fields of a capture's identity; fields that an identity does not have are
    ignored."""

    def start(self, token: np.ndarray, length: np.ndarray, given: Routes | None = None) -> Callable[[], Routes]:
        """Start routing right-padded rows.

        Parameters
        ----------
        token : int32 array, shape (rows, positions)
            Values at and beyond a row's length have no meaning.
        length : int32 array, shape (rows,)
        given
            `expert`, and optionally `weight`, which the routers use instead of their own.

        Returns
        -------
        finish
            Waits for the routes, in any thread, and returns each array by its name in `Layout.routes`, with arbitrary
            values at and beyond a row's length:

            expert : uint8 or uint16 array, shape (rows, positions, layers, k)
                In order of descending weight.
            weight : float16 array, or float32 if the layout says so, same shape others : array, shape (rows, positions,
            \\*trailing[1:]) of their `ArraySpec`
                The arrays that the layout's `record` names.
        """
        ...


@runtime_checkable
class Reporting(Protocol):
    """An engine that takes minutes for a micro-batch and reports its progress meanwhile."""

    report: Callable[[int], None]
    """Called repeatedly in `start` with a number of tokens; their sum is that of the micro-batch."""


def micro_batches(length: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Row indices of each micro-batch: rows of similar length, with at most `batch_tokens` padded tokens or a single
    row.

    A micro-batch also ends where its padding would cost more than another micro-batch. Real text then takes 8 % longer
    than its tokens alone would, and 10 % without this rule (speeches; simulated with that cost). The largest padded
    size comes first, so that a batch that does not fit fails at once. The second largest comes last: the device
    computes it while the next shard is read.
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
    batches.sort(key=lambda batch: -len(batch) * int(length[batch[0]]))  # for equal sizes, longer rows first
    return [*batches[:1], *batches[2:], *batches[1:2]]


def route_rows(
    engine: Engine,
    rows: Rows,
    layout: Layout,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda tokens: None,
    given: Routes | None = None,
) -> Callable[[], Routes]:
    """The routes of a shard's rows in the order of the rows, with fill values at and beyond each length.

    Parameters
    ----------
    batch_tokens
        Maximum number of tokens in a micro-batch, padding included.
    progress
        Called with the number of tokens of each micro-batch when it starts.
    given
        Routes of the rows, which the engine's routers use instead of their own.

    Returns
    -------
    finish
        All micro-batches have started, but the last one may not be done. This waits for it, in any thread, and returns
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
            for row, its, size in zip(
                batch, found[name], length, strict=True
            ):  # slices: other threads can run meanwhile
                values[row, :size] = its[:size]

    putter = ThreadPoolExecutor(1, thread_name_prefix="put")  # while the next micro-batch runs
    if reporting := isinstance(engine, Reporting):
        engine.report = progress
    routes = putter.submit(unfilled)  # a shard of 48 layers and 8 choices has 300 MB, which takes a tenth of a second
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
        putter.shutdown(wait=False)  # ends when the submitted work is done

    def finish() -> Routes:
        if pending is not None:
            pending.result()
        return routes.result()

    return finish


def _check(found: Routes, shapes: Mapping[str, tuple[int, ...]], filled: np.ndarray, layout: Layout) -> None:
    """Reject a micro-batch that lacks an array, has one of another shape, or has an expert that does not exist."""
    if missing := [name for name in shapes if name not in found]:
        raise RoutingError(
            f"the engine returned {', '.join(found)} and no {missing[0]}, which this capture records: use an engine"
            f" that returns it, or capture without {missing[0]}"
        )
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise RoutingError(
                f"the engine returned {name} of shape {found[name].shape} instead of {shape} for {layout}"
            )
    legal = found["expert"][filled] < layout.num_experts
    if not legal.all():
        layer = layout.layers[int(np.nonzero(~legal)[1][0])]
        raise RoutingError(f"layer {layer} chose an expert at or beyond num_experts = {layout.num_experts}")


@contextmanager
def _of_the_shard(batch: np.ndarray) -> Iterator[None]:
    """Replace the micro-batch's row by the shard's row in an error."""
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
        Waits for the last micro-batch, in any thread, and returns

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
