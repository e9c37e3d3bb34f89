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
from typing import Any, Protocol

import numpy as np

from store.group import CaptureGroup
from store.layout import Layout
from store.plan import Rows

BATCH_COST_TOKENS = 1400  # as long as so many tokens takes what each micro-batch costs (measured: gpu-engine.json)


Routes = tuple[np.ndarray, np.ndarray]
"""The choices and their weights."""


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

    def start(self, token: np.ndarray, length: np.ndarray) -> Callable[[], Routes]:
        """Begin to route right-padded rows.

        Parameters
        ----------
        token : int32 array, shape (rows, positions)
            At and beyond a row's length the values mean nothing.
        length : int32 array, shape (rows,)

        Returns
        -------
        finish
            Waits for the choices, in any thread, and gives

            expert : uint8 or uint16 array, shape (rows, positions, layers, k)
                In order of falling weight; anything at and beyond a row's length.
            weight : float16 array, same shape
        """
        ...


def micro_batches(length: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Row indices of each micro-batch, of rows alike in length: padded size at most `batch_tokens`, one row at least.

    A micro-batch also ends where its padding would cost more than another one does: real text then takes 8 % more than
    its tokens alone would, 10 % without (speeches; simulated with that cost). The largest padded size comes first: what
    does not fit fails at once.
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
    return sorted(batches, key=lambda batch: -len(batch) * int(length[batch[0]]))  # of equals, longer rows first


def route_rows(
    engine: Engine,
    rows: Rows,
    layout: Layout,
    batch_tokens: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Callable[[], Routes]:
    """The choices of a shard's rows, in the rows' own order, fill values at and beyond each length.

    Returns
    -------
    finish
        All micro-batches are begun, the last one perhaps not done: this waits for it, in any thread, and gives
        expert, weight : arrays, shape (rows, P, layers, k).

    Raises
    ------
    OutOfMemory, DeviceLost
        From the engine.
    RoutingError
        From the engine, or when its shapes are not the layout's; of the last micro-batches from `finish`.
    """
    shape = (len(rows.length), layout.sequence_length, len(layout.layers), layout.experts_per_token)
    spec = layout.arrays()["expert"]
    expert = np.full(shape, layout.missing_expert, dtype=spec.dtype)
    weight = np.zeros(shape, dtype=np.float16)

    def put(batch: np.ndarray, length: np.ndarray, width: int, finish: Callable[[], Routes]) -> None:
        try:
            experts, weights = finish()
        except RoutingError as error:
            if error.row is None:
                raise
            raise RoutingError(f"{error} of row {batch[error.row]} of the shard") from error
        if experts.shape != (len(batch), width, *shape[2:]) or weights.shape != experts.shape:
            raise RoutingError(f"the engine gave {experts.shape} for {len(batch)} rows of {width} in {layout}")
        filled = np.arange(width) < length[:, None]
        legal = experts[filled] < layout.num_experts
        if not legal.all():
            layer = layout.layers[int(np.nonzero(~legal)[1][0])]
            raise RoutingError(f"layer {layer} chose an expert at or beyond num_experts = {layout.num_experts}")
        row, position = np.nonzero(filled)
        expert[batch[row], position] = experts[filled]
        weight[batch[row], position] = weights[filled]

    putter = ThreadPoolExecutor(1, thread_name_prefix="put")  # beside the next micro-batch
    pending: Future[None] | None = None
    try:
        for batch in micro_batches(rows.length, batch_tokens):
            length = rows.length[batch]
            width = int(length.max())
            begun = engine.start(rows.token[batch, :width], length)
            if pending is not None:
                pending.result()
            pending = putter.submit(put, batch, length, width, begun)
            progress(int(length.sum()))
    finally:
        putter.shutdown(wait=False)  # ends with what was submitted

    def finish() -> Routes:
        if pending is not None:
            pending.result()
        return expert, weight

    return finish


def capture_shard(
    group: CaptureGroup,
    shard: int,
    rows: Rows,
    engine: Engine,
    *,
    batch_tokens: int,
    max_halvings: int = 6,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Callable[[], tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    """Route one shard's rows; the caller commits them with `CaptureGroup.commit`.

    Returns
    -------
    finish
        Waits for the last micro-batch, in any thread, and gives

        expert, weight
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
                routed = route_rows(engine, rows, layout, max(1, batch_tokens >> halvings), progress)
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

    def finish() -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        with _naming(group, shard):
            expert, weight = routed()
        return expert, weight, {"seconds": time.perf_counter() - start, "halvings": halvings}

    return finish


@contextmanager
def _naming(group: CaptureGroup, shard: int) -> Iterator[None]:
    try:
        yield
    except RoutingError as error:
        raise RoutingError(f"shard {shard} of {group.dataset}: {error}") from error
