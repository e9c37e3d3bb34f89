"""Write a report on the experts as one HTML page that works offline.

usage: python jobs/report.py STORE[/DATASET] [STORE[/DATASET] ...] [options]

Examples:
  python jobs/report.py demo.zarr
  python jobs/report.py demo.zarr/demo-prose demo.zarr/demo-code -o two.html
  python jobs/report.py ~/expert-atlas/routes.zarr --figures figures

Output:
  --output FILE, -o FILE    the page (report.html)
  --figures FOLDER          also every chart as SVG, PDF and PNG
  --explorer ADDRESS        link findings to an explorer at this address: http://127.0.0.1:8177

What counts:
  --phase PHASE             only tokens of the prompt, or only generated ones
  --role ROLE               only tokens of this speaker of a conversation; repeat for more
  --block_tokens N          use blocks of so many tokens instead of documents

Where to run:
  --cluster                 read the stores on a Ray cluster

For an incomplete capture, the captured part is used. docs/options.md explains every option.
Exit status: 0 written, 2 there is no such store, or it is empty.
"""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

# Set before numpy is imported: a scan has a thread for each processor, and additional threads of the linear algebra
# would only wait (a seventh of a report's processor time, measured on two cores).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import command_line, start

start(__name__, __doc__)

import tyro

from jobs.console.arguments import parse
from jobs.console.places import by_store, refuse_no_file
from jobs.console.terminal import LOG_EVERY_S, log, run_job, say_next


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Report what the experts did, for every data set of one or more stores, as one HTML file that works offline.

    For an incomplete capture, the captured part is used, and the page says so. Prints the path of the file. Exit
    status: 0 written, 2 there is no such store, or it is empty.
    """

    places: Annotated[tuple[str, ...], tyro.conf.Positional]
    """STORE for all of its data sets, STORE/DATASET for one; any number of them."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """The file to write; an existing one is replaced."""
    figures: Path | None = None
    """A folder, created if missing, for every chart as SVG, PDF and PNG, for papers. The paths of single tokens can be
    saved from the page."""
    block_tokens: int | None = None
    """Use blocks of so many tokens instead of documents in intervals and tests, for texts that are one long document.
    This ignores that neighbouring blocks resemble each other, so intervals are somewhat too narrow."""
    phase: Annotated[tuple[Literal["prompt", "generated"], ...], tyro.conf.UseAppendAction] = ()
    """Count only tokens of this phase, if captures record it (imported routes do). May be repeated."""
    role: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Count only tokens of this speaker, if captures contain conversations: assistant. May be repeated."""
    explorer: str | None = None
    """Link findings to an explorer of the store at this address: http://127.0.0.1:8177. Default: the page shows
    commands that start one."""
    cluster: bool = False
    """Read the stores on the Ray cluster at $RAY_ADDRESS, which must have access to them, or on one that is started
    here."""


def main(arguments: list[str]) -> int:
    """Write the report and print its path."""
    config = parse(ReportConfig, "report", arguments)
    if not config.places:
        raise ValueError("name at least one STORE or STORE/DATASET, such as demo.zarr")
    if config.block_tokens is not None and config.block_tokens < 1:
        raise ValueError(f"--block_tokens {config.block_tokens}: must be at least 1")
    if config.explorer is not None and not config.explorer.startswith(("http://", "https://")):
        raise ValueError(f"--explorer {config.explorer}: must begin with http:// or https://")
    refuse_no_file("output", config.output)
    datasets = by_store(config.places)
    _give_memory_back()
    from analysis.report.page import (  # the chart libraries take a second: --help must not wait for them
        write_figures,
        write_report,
    )
    from analysis.scanning import Selection

    only = Selection(roles=config.role or None, phases=config.phase or None)
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        if config.cluster:
            from jobs.cluster.connection import connection
            from jobs.cluster.scans import ClusterRunner

            stack.enter_context(connection())
            where["runner_of"] = ClusterRunner
        drawn = write_report(
            list(datasets),
            config.output,
            datasets=datasets,
            progress=_progress(),
            block_tokens=config.block_tokens,
            only=only,
            explorer=config.explorer,
            **where,
        )
    for answers in drawn.answers:
        if not answers.state.complete:
            log(f"note: {answers.state}")
    print(config.output.absolute())
    if config.figures is not None:
        log(f"{len(write_figures(drawn, config.figures))} files in {config.figures}")
    say_next(*(command_line("explore", place) for place in datasets))
    return 0


def _progress() -> Callable[[str, int, int], None]:
    """Logs the progress of a data set's scan every ten seconds."""
    logged = time.monotonic()

    def progress(label: str, done: int, total: int) -> None:
        nonlocal logged
        if time.monotonic() - logged >= LOG_EVERY_S:
            logged = time.monotonic()
            log(f"{label}: {done:,} of {total:,} shards read")

    return progress


def _give_memory_back() -> None:
    """Return freed arrays to the system at once: otherwise glibc keeps them, and the memory peak grows.

    Measured with two threads and 32 layers, from one to five million tokens: see tests/analysis/test_memory.py.
    """
    m_mmap_threshold = -3  # from malloc.h
    with contextlib.suppress(OSError, AttributeError):  # no glibc: the allocator is left alone
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)


if __name__ == "__main__":
    run_job(main)
