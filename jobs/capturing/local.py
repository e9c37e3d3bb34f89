"""Capture in this process: the shards that are missing, one after the other, on one device.

While one shard is encoded and written by a thread, the next one is computed; at most one waits to be written, so
that memory is bounded and nothing is lost in a queue.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from jobs.capturing.captures import Capture
from jobs.console.terminal import reporting, say
from workers.replica import Replica

if TYPE_CHECKING:
    from jobs.capturing.run import Run


def capture_here(run: "Run", captures: Sequence[Capture]) -> None:
    """Plan the captures, then fill their missing shards: a `jobs.capturing.captures.Fill`."""
    for capture in captures:
        if not capture.planner.plan.complete:  # no bar where there is nothing to show
            with reporting(f"plan {capture.name}", done=capture.planner.plan.tokens) as report:
                capture.planner.run(lambda plan: report.to(plan.tokens, f"{plan.documents:,} documents"))
        capture.say_planned()
    left = [(capture, capture.missing(0, capture.planned_shards)) for capture in captures]
    if not any(shards for _, shards in left):
        return
    say(f"loading {run.config.model} ({run.config.quantization}) on {run.device}")
    replica = Replica(progress=lambda tokens: report.add(tokens))
    replica.load(run.assignment({capture.name: capture.lease.token for capture in captures}))
    for capture, shards in left:
        total, done = capture.planner.plan.tokens, capture.before.tokens_done
        with reporting(f"capture {capture.name}", total=total, done=done) as report:
            fill_shards(replica, capture, shards)
        say(f"{capture.name}: {report.rate():,.0f} tokens/s")


def fill_shards(replica: Replica, capture: Capture, shards: Iterable[int]) -> None:
    """Fill shards of one capture with a replica that is loaded."""
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        pending: Future[dict[str, Any]] | None = None
        for shard in shards:
            capture.check_lease()
            commit = replica.compute(capture.name, shard)
            before, pending = pending, writer.submit(commit)  # first: what is computed is written, whatever failed
            if before is not None:
                before.result()
        if pending is not None:
            pending.result()
