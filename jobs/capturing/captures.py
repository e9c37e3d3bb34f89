"""Data sets opened for writing: group, lease and planner; the state before, the missing shards, and the result.

Shared by `--local` and a cluster. Does not know who plans and who fills the shards.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.capturing.planner import Planner
from jobs.console.terminal import log, planned
from jobs.sources.documents import Source
from store.coverage import Coverage, coverage
from store.group import CaptureGroup
from store.lease import Lease, lease

if TYPE_CHECKING:
    from jobs.capturing.run import Run


@dataclass(frozen=True, kw_only=True)
class Capture:
    """One data set, opened for writing under its lease."""

    name: str
    source: Source
    group: CaptureGroup
    lease: Lease
    planner: Planner
    before: Coverage
    """The state when it was opened, after damaged shards were reset."""

    @property
    def planned_shards(self) -> int:
        """Shards whose rows are durable; an incomplete last one counts once the plan is complete."""
        return -(-self.planner.plan.rows // self.group.layout.rows_per_shard)

    def missing(self, start: int, stop: int) -> list[int]:
        """Shards to fill among the planned ones from `start` to `stop`: neither committed before nor in quarantine."""
        known = self.before.shards_total
        old = [shard for shard in self.before.missing if shard not in self.before.quarantined]
        return [shard for shard in [*old, *range(known, stop)] if start <= shard < stop]

    def log_planned(self) -> None:
        """Log the content of the complete plan."""
        log(f"{self.name}: {planned(self.planner.plan, self.source.published_documents)}")

    def check_lease(self) -> None:
        """Raise a RuntimeError when another job has taken the group over."""
        if self.lease.lost:
            raise RuntimeError(
                f"{self.group.path}/{self.name} was taken over by another job while this one was suspended: this one"
                " ends"
            )


Fill = Callable[["Run", Sequence[Capture]], None]
"""Completes the plans of captures and commits their missing shards, as far as possible."""


def capture_datasets(run: "Run", sources: Sequence[tuple[str, Source]], fill: Fill) -> list[Coverage]:
    """Plan data sets and fill their missing shards; returns the resulting coverage.

    Raises
    ------
    ValueError
        When a data set or its group cannot be captured as requested; then nothing is captured.
    RuntimeError
        When another job holds a group, or the capture itself failed, for example because storage failed.
    """
    with ExitStack() as stack:
        captures = [stack.enter_context(_opened(run, name, source)) for name, source in sources]
        try:
            fill(run, captures)
        except BaseException as error:
            with suppress(OSError):  # a second storage failure must not hide the first error
                _reached(captures)
            if isinstance(error, OSError):
                raise RuntimeError(f"the capture ended early and can be resumed when this is fixed: {error}") from error
            raise
        return _reached(captures)


def exit_status(states: Sequence[Coverage]) -> int:
    """0 if everything is complete, 3 if only quarantined shards are missing, otherwise 1."""
    if all(state.complete for state in states):
        return 0
    given_up = [set(state.missing) == set(state.quarantined) and not state.lost for state in states]
    return 3 if all(given_up) and all(state.plan.complete for state in states) else 1


def _reached(captures: Sequence[Capture]) -> list[Coverage]:
    states = [coverage(capture.group.path, capture.name) for capture in captures]
    for capture, state in zip(captures, states, strict=True):
        _log_reached(capture, state)
    return states


@contextmanager
def _opened(run: "Run", name: str, source: Source) -> Iterator[Capture]:
    prepared = run.prepare(name, source)
    if source.note:
        log(f"{name}: {source.note}")
    config = run.config
    # Acquired before the group is created: two creators would mix layouts.
    with lease(CaptureGroup(config.store_path, name), waits=log) as held:
        group = run.open_group(prepared)
        before = _healed(group, retry_quarantined=config.retry_quarantined)
        planner = Planner(
            group,
            source,
            run.tokenizer,
            bos=config.bos,
            limit_documents=config.limit_documents,
            skip_unrenderable=config.skip_unrenderable,
        )
        yield Capture(name=name, source=source, group=group, lease=held, planner=planner, before=before)


def _healed(group: CaptureGroup, *, retry_quarantined: bool) -> Coverage:
    """The state after damaged shards were reset."""
    group.settle()
    state = coverage(group.path, group.dataset)
    if state.lost:
        raise ValueError(f"{group.path}: {state}")
    for shard, reason in (group.take_back_wrong() if state.wrong else {}).items():
        log(f"{group.dataset}: shard {shard} is captured again: {reason}")
    group.drop_void()
    for shard in state.quarantined:
        if retry_quarantined:
            log(f"{group.dataset}: shard {shard} is taken out of quarantine")
            group.release(shard)
    return coverage(group.path, group.dataset) if state.wrong or state.quarantined else state


def _log_reached(capture: Capture, state: Coverage) -> None:
    before = capture.before
    if before.complete:
        log(f"{state}; nothing to do")
        return
    failed = len(state.quarantined)
    left = len(state.missing) - failed
    parts = [f"{state.shards_done - before.shards_done:,} shards done"]
    parts += [f"{before.shards_done:,} skipped, committed before"] * bool(before.shards_done)
    parts += [f"{failed:,} failed"] * bool(failed) + [f"{left:,} not done"] * bool(left)
    log(f"{state}, {state.bytes_done:,} bytes ({'; '.join(parts)}) in {capture.group.path}")
