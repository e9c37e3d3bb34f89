"""How far captures are: `python jobs/status.py STORE`; works while they run."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import tyro
from rich.console import Console
from rich.table import Table

from jobs.terminal import run_job, say
from store.coverage import Coverage, coverage
from store.reader import dataset_names


@dataclass(frozen=True, kw_only=True)
class StatusConfig:
    """Tell, for each data set of a store, what is captured and what is missing.

    Safe while a capture runs. Exit status: 0 when every data set is complete, 1 when something is missing, 2 when
    there is no store.
    """

    store: Annotated[Path, tyro.conf.Positional]
    """The store."""
    dataset: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only this data set; may be repeated. Default: all."""


def main(arguments: list[str]) -> int:
    """Print the table; 0 when every data set is complete."""
    config = tyro.cli(StatusConfig, prog="python jobs/status.py", args=arguments, use_underscores=True)
    names = list(config.dataset) or dataset_names(config.store)
    if not names:
        raise ValueError(f"{config.store} holds no data set yet")
    states, unreadable = [], []
    for name in names:
        try:
            states.append(coverage(config.store, name))
        except ValueError as error:
            unreadable.append(str(error))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(status_table(states))
    for state in states:
        if not state.complete:
            console.print(str(state), highlight=False, markup=False)
        for shard, reason in state.wrong.items():
            console.print(f"{state.dataset}: shard {shard} does not hold: {reason}", highlight=False, markup=False)
    for reason in unreadable:
        say(f"error: {reason}")
    return 1 if unreadable or not all(state.complete for state in states) else 0


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
