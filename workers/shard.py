"""Fill one shard: its rows through the model in micro-batches, sorted by length, and back into their order.

What a micro-batch is made of depends on the shard and on `batch_tokens` alone, never on the worker or on what ran
before: with equal identity, halvings, device type and versions the bytes are equal. Nothing here imports torch; an
engine is whatever routes rows.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from store.group import CaptureGroup
from store.layout import Layout
from store.plan import Rows

BATCH_COST_TOKENS = 1400  # as long as so many tokens takes what each micro-batch costs (measured: gpu-engine.json)


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

    def route(self, token: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The choices for right-padded rows.

        Parameters
        ----------
        token : int32 array, shape (rows, positions)
            At and beyond a row's length the values mean nothing.
        length : int32 array, shape (rows,)

        Returns
        -------
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
) -> tuple[np.ndarray, np.ndarray]:
    """The choices of a shard's rows, in the rows' own order, fill values at and beyond each length.

    Returns
    -------
    expert, weight : arrays, shape (rows, P, layers, k)

    Raises
    ------
    OutOfMemory, RoutingError
        From the engine.
    ValueError
        When the engine's shapes are not the layout's.
    """
    shape = (len(rows.length), layout.sequence_length, len(layout.layers), layout.experts_per_token)
    spec = layout.arrays()["expert"]
    expert = np.full(shape, layout.missing_expert, dtype=spec.dtype)
    weight = np.zeros(shape, dtype=np.float16)

    def put(batch: np.ndarray, length: np.ndarray, width: int, experts: np.ndarray, weights: np.ndarray) -> None:
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

    with ThreadPoolExecutor(1, thread_name_prefix="put") as putter:  # beside the next micro-batch
        pending: Future[None] | None = None
        for batch in micro_batches(rows.length, batch_tokens):
            length = rows.length[batch]
            width = int(length.max())
            try:
                routes = engine.route(rows.token[batch, :width], length)
            except RoutingError as error:
                if error.row is None:
                    raise
                raise RoutingError(f"{error} of row {batch[error.row]} of the shard") from error
            if pending is not None:
                pending.result()
            pending = putter.submit(put, batch, length, width, *routes)
            progress(int(length.sum()))
        if pending is not None:
            pending.result()
    return expert, weight


def capture_shard(
    group: CaptureGroup,
    shard: int,
    engine: Engine,
    *,
    batch_tokens: int,
    max_halvings: int = 6,
    progress: Callable[[int], None] = lambda tokens: None,
) -> tuple[Rows, np.ndarray, np.ndarray, dict[str, Any]]:
    """Route one shard's rows; the caller commits them with `CaptureGroup.commit`.

    Returns
    -------
    rows, expert, weight
        What `commit` takes.
    facts : dict
        `seconds` and `halvings`: how often the micro-batch was halved because it did not fit.

    Raises
    ------
    RoutingError
        When the routes cannot be trusted; the message names the shard.
    OutOfMemory
        When even the smallest micro-batch does not fit.
    """
    start = time.perf_counter()
    layout, rows = group.layout, group.read_rows(shard)
    halvings = 0
    while True:
        try:
            expert, weight = route_rows(engine, rows, layout, max(1, batch_tokens >> halvings), progress)
        except RoutingError as error:
            raise RoutingError(f"shard {shard} of {group.dataset}: {error}") from error
        except OutOfMemory as error:
            if halvings == max_halvings:
                tokens = max(1, batch_tokens >> halvings)
                raise OutOfMemory(
                    f"shard {shard} of {group.dataset} does not fit, not even in micro-batches of {tokens} tokens:"
                    f" use a smaller --sequence_length or a larger device ({error})"
                ) from error
            halvings += 1
            continue
        return rows, expert, weight, {"seconds": time.perf_counter() - start, "halvings": halvings}
