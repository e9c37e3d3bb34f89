"""The progress display of a capture: a bar and its workers in a terminal, occasional lines in a log."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from jobs.capturing.captures import Capture
from jobs.capturing.dispatch import Dispatcher, Unit, WorkerState
from jobs.console.terminal import LOG_EVERY_S, duration, log

WORKERS_SHOWN = 16
DRAW_EVERY_S = 0.1  # arbitrary


class Progress:
    """Counts what workers report, and shows it: a `jobs.capturing.loop.Watcher`.

    Parameters
    ----------
    captures
        The data sets of the job.
    """

    def __init__(self, captures: Sequence[Capture]) -> None:
        self._captures = captures
        self._before_tokens = sum(capture.before.tokens_done for capture in captures)
        self._before_shards = sum(capture.before.shards_done for capture in captures)
        self._finished: Counter[int] = Counter()  # tokens committed, by worker
        self._first: float | None = None  # when the first worker was ready, so that loading is not in the rate
        self._logged = time.monotonic()
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._drawn = 0.0
        self._troubles: list[str] = []

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        if tokens := self._finished.total():
            seconds = time.monotonic() - (self._first or time.monotonic())
            rate = f"{tokens / max(1e-9, seconds):,.0f} tokens/s"
            log("; ".join([f"captured {tokens:,} tokens in {duration(seconds)}, {rate}", *self._troubles]))

    def finished(self, worker: WorkerState, unit: Unit, facts: Mapping[str, Any]) -> None:
        """A worker has committed a shard."""
        self._finished[worker.number] += facts["tokens"]

    def show(self, dispatcher: Dispatcher) -> None:
        """Show the progress of the job."""
        now = time.monotonic()
        if self._first is None and any(worker.stage == "ready" for worker in dispatcher.workers.values()):
            self._first = now
        self._troubles = _troubles(dispatcher)
        if self._console.is_terminal:
            if now - self._drawn >= DRAW_EVERY_S:
                self._drawn = now
                self._live.update(self._picture(dispatcher), refresh=True)
        elif now - self._logged >= LOG_EVERY_S:
            self._logged = now
            log("capture: " + self.line(dispatcher))

    def line(self, dispatcher: Dispatcher) -> str:
        """The progress of the job, in one line."""
        planned = sum(capture.planner.plan.tokens for capture in self._captures)
        shards = sum(capture.planned_shards for capture in self._captures)
        run_s = time.monotonic() - (self._first or time.monotonic())
        done = min(planned, self._before_tokens + self._routed(dispatcher))  # a shard may be computed twice
        rate = self._routed(dispatcher) / run_s if run_s > 0 else 0.0
        parts = [
            f"{self._before_shards + len(dispatcher.done):,} of {shards:,} shards",
            f"{done:,} of {planned:,} tokens" + ("" if dispatcher.all_added else " planned so far"),
            f"{rate:,.0f} tokens/s",
        ]
        if dispatcher.all_added and rate:
            parts.append(f"{duration(max(0, planned - done) / rate)} left")
        stages = Counter(_doing(worker) for worker in dispatcher.workers.values())
        parts.append(
            "workers: " + (", ".join(f"{number} {stage}" for stage, number in sorted(stages.items())) or "none")
        )
        return "; ".join([*parts, *_troubles(dispatcher)])

    def _routed(self, dispatcher: Dispatcher) -> int:
        """Tokens committed by this job, plus those of unfinished shards."""
        in_work = sum(max(0, w.tokens - self._finished[w.number]) for w in dispatcher.workers.values())
        return self._finished.total() + in_work

    def _picture(self, dispatcher: Dispatcher) -> Group:
        planned = sum(capture.planner.plan.tokens for capture in self._captures)
        done = self._before_tokens + self._routed(dispatcher)
        table = Table(box=None, header_style="dim")
        for column in ("worker", "host", "doing", "tokens", "shards"):
            table.add_column(column, justify="right" if column == "tokens" else "left")
        for worker in list(dispatcher.workers.values())[:WORKERS_SHOWN]:
            units = ", ".join(map(str, worker.units))
            table.add_row(str(worker.number), escape(worker.host), _doing(worker), f"{worker.tokens:,}", escape(units))
        more = len(dispatcher.workers) - WORKERS_SHOWN
        if more > 0:
            table.add_row("", f"and {more} more")
        return Group(ProgressBar(total=max(1, planned), completed=done), escape(self.line(dispatcher)), table)


def _troubles(dispatcher: Dispatcher) -> list[str]:
    """Retries and failures."""
    counts = {
        "workers lost": dispatcher.lost_workers,
        "retries": dispatcher.retries,
        "given twice": len(dispatcher.copied),
        "quarantined": len(dispatcher.quarantined),
    }
    return [f"{number:,} {what}" for what, number in counts.items() if number]


def _doing(worker: WorkerState) -> str:
    if worker.stage == "waiting":
        return "waiting for a place"
    return worker.stage if worker.stage == "loading" else "capturing" if worker.units else "idle"
