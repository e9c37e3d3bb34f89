"""Capture in this process: the shards that are missing, one after the other, on one device.

While one shard is encoded and written by a thread, the next one is computed; at most one waits to be written, so
that memory is bounded and nothing is lost in a queue.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from store.coverage import coverage
from store.group import CaptureGroup
from workers.shard import Engine, capture_shard


def capture_missing(
    group: CaptureGroup,
    engine: Engine,
    *,
    batch_tokens: int,
    facts: Mapping[str, Any],
    heal: Callable[[int, str], None] = lambda shard, reason: None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> int:
    """Fill every planned shard that has no valid commit.

    Parameters
    ----------
    engine
        Routes the rows.
    batch_tokens
        Padded tokens in a micro-batch at most.
    facts
        What every commit record says of this worker.
    heal
        Told of each shard whose commit does not hold, before it is taken back and captured again.
    progress
        Told of tokens as they are routed.

    Returns
    -------
    int
        Shards committed by this call.
    """
    state = coverage(group.path, group.dataset)
    for shard, reason in state.wrong.items():
        heal(shard, reason)
        group.discard(shard)
    written = []
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        pending: Future[bool] | None = None
        for shard in state.missing:
            rows, expert, weight, own = capture_shard(
                group, shard, engine, batch_tokens=batch_tokens, progress=progress
            )
            if pending is not None:
                written.append(pending.result())
            pending = writer.submit(group.commit, shard, expert, weight, rows=rows, facts={**facts, **own})
        if pending is not None:
            written.append(pending.result())
    return sum(written)
