"""Do two captures of the same text agree? `python jobs/compare.py A B`, each STORE/DATASET."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.interrupts import end_on_interrupt

end_on_interrupt()

import tyro

from jobs.console.places import capture_at
from jobs.console.tables import Column, Facts, print_line, print_table, stdout_console
from jobs.console.terminal import reporting, run_job

MEASURES = ("same_set", "overlap", "same_first", "first_difference", "margin", "margin_at_flips")


def _number(measure: str) -> Callable[[Facts], str]:
    return lambda row: "" if row[measure] is None else f"{row[measure]:.4f}"


COLUMNS = (
    Column(name="layer", text=lambda row: row["layer"]),
    *(Column(name=name.replace("_", " "), text=_number(name), spare=at) for at, name in enumerate(MEASURES)),
)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare what two captures of the same rows chose, token by token and layer by layer.

    For the same text under another quantization, revision, back-end or machine. Exit status: 0 compared, whatever came
    out, 2 when they cannot be.
    """

    one: Annotated[str, tyro.conf.Positional]
    """A capture, as STORE/DATASET: demo.zarr/demo-prose, or s3://bucket/routes.zarr/wikitext-103."""
    other: Annotated[str, tyro.conf.Positional]
    """Another one."""
    allow_incomplete: bool = False
    """Compare as far as both captures go."""
    phase: Annotated[tuple[Literal["prompt", "generated"], ...], tyro.conf.UseAppendAction] = ()
    """Only tokens of this phase, where the first capture says it (imported routes do). May be repeated."""
    role: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only tokens of this speaker, where the first capture is of conversations: assistant. May be repeated."""


def main(arguments: list[str]) -> int:
    """Print the table."""
    config = tyro.cli(CompareConfig, prog="python jobs/compare.py", args=arguments, use_underscores=True)

    from analysis.metrics.agreement import Agreement, paired  # numba takes a second: --help does not wait for it
    from analysis.scanning import Selection, scan
    from store import attributes, model_differences, open_capture

    captures = []
    for place in (config.one, config.other):
        captures.append(open_capture(*capture_at(place), allow_incomplete=config.allow_incomplete))
    only = Selection(roles=config.role or None, phases=config.phase or None)
    with reporting("compare", unit="shards") as report:
        found = scan(paired(*captures), [Agreement()], only=only, progress=lambda done, total: report.to(done))[0]
    rows: list[Facts] = [
        {"layer": str(number), **{column: float(found[column].sel(layer=number)) for column in MEASURES}}
        for number in found["layer"].values.tolist()
    ]
    rows.append({"layer": "by chance", **{column: found[column].attrs["null"] for column in MEASURES}})
    console = stdout_console()
    print_table(console, COLUMNS, rows)
    provenance = [attributes(capture) for capture in captures]
    differ = model_differences(*provenance)
    one, other = (each.get("environment") for each in provenance)
    for name, values in {**differ, **({"environment": (one, other)} if one != other else {})}.items():
        print_line(console, f"{name}: {values[0]} and {values[1]}")
    n, different = found.attrs["n"], found.attrs["any_difference"]
    print_line(console, f"{n:,} tokens in both; {different:.2%} of them differ in some layer's experts")
    return 0


if __name__ == "__main__":
    run_job(main)
