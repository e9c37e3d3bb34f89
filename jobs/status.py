"""How far captures are, and whether they still hold: `python jobs/status.py STORE [--verify]`; works while they run."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro
from rich.console import Console
from rich.table import Table

from jobs.terminal import reporting, run_job, say
from store.coverage import Coverage, coverage
from store.group import CaptureGroup
from store.lease import lease_holder
from store.reader import dataset_names
from store.verify import verify


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Tell, for each data set of a store, what is captured and what is missing.

    Safe while a capture runs. Exit status: 0 when every data set is complete, 1 when something is missing or wrong,
    2 when there is no store.
    """

    store: Annotated[str, tyro.conf.Positional]
    """The store: a folder, or s3://bucket/prefix."""
    dataset: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only this data set; may be repeated. Default: all."""
    verify: bool = False
    """Read everything back and compare it with the commit records. What is wrong is noted in the store, and captured
    again by the next capture."""


def main(arguments: list[str]) -> int:
    """Print the table; 0 when every data set is complete."""
    config = tyro.cli(StatusConfig, prog="python jobs/status.py", args=arguments, use_underscores=True)
    names = list(config.dataset) or dataset_names(config.store)
    if not names:
        raise ValueError(f"{config.store} holds no data set yet")
    console = Console(width=None if sys.stdout.isatty() else 160)
    whole, states = True, []
    for name in names:
        try:
            group = CaptureGroup(config.store, name)
            whole &= not config.verify or _verified(group)
            states.append(coverage(config.store, name))
        except ValueError as error:
            whole = False
            say(f"error: {error}")
            continue
        if holder := lease_holder(group):
            say(f"{name}: being captured by {holder}")
    console.print(status_table(states))
    for state in states:
        if not state.complete:
            console.print(str(state), highlight=False, markup=False)
        for shard, reason in state.wrong.items():
            console.print(f"{state.dataset}: shard {shard} does not hold: {reason}", highlight=False, markup=False)
    return 0 if whole and all(state.complete for state in states) else 1


def _verified(group: CaptureGroup) -> bool:
    """Whether all that is committed could be read back as it was committed; says what is wrong with the plan.

    Shards that are wrong are noted in the store, and told with what is missing.
    """
    tokens = coverage(group.path, group.dataset).tokens_done
    with reporting(f"verify {group.dataset}", total=tokens) as report:
        found = verify(group, report.add)
    for fault in found.plan:
        say(f"{group.dataset}: the plan is damaged: {fault}; {group.remedy}")
    if found.unnoted:
        for shard, reason in found.shards.items():
            say(f"{group.dataset}: shard {shard} does not hold: {reason}")
        say(f"error: the store cannot be written, so that the next capture will not know: {found.unnoted}")
    return not found.shards and not found.plan


def status_table(states: list[Coverage]) -> Table:
    """One line a data set."""
    table = Table()
    table.add_column("data set")
    for column in (
        "shards",
        "missing",
        "documents",
        "tokens",
        "of planned",
        "bytes",
        "bytes/token",
        "tokens/s a worker",
    ):
        table.add_column(column, justify="right")
    for state in states:
        tokens = state.tokens_done
        table.add_row(
            state.dataset,
            f"{state.shards_done:,}/{state.shards_total:,}{'' if state.plan.complete else '+'}",
            f"{len(state.missing):,}",
            f"{state.plan.documents:,}",
            f"{tokens:,}",
            f"{tokens / state.plan.tokens:.1%}" if state.plan.tokens else "-",
            f"{state.bytes_done:,}",
            f"{state.bytes_done / tokens:.1f}" if tokens else "-",
            f"{tokens / state.seconds:,.0f}" if state.seconds else "-",
        )
    return table


if __name__ == "__main__":
    run_job(main)
