"""Capture four contrasting texts with a tiny Mixtral on the CPU and make a report, in three minutes.

usage: python jobs/demo.py

It has no options and only does what the commands that it prints do: it captures into
demo.zarr and writes demo.html. The texts were held out when the model was trained.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import command_line, start

start(__name__, __doc__)

from rich.console import Console

from jobs import capture
from jobs.capturing.options import parse_capture
from jobs.console.tables import Bars, Column, Facts, print_line, print_table, stdout_console
from jobs.console.terminal import run_job
from jobs.sources.demo import demo_source

if TYPE_CHECKING:
    import xarray as xr

    from analysis.report.section import Answers

ROOT = Path(__file__).resolve().parent.parent
STORE, REPORT = ROOT / "demo.zarr", ROOT / "demo.html"
# Documents differ in length: these numbers give about 100,000 tokens of each text.
TEXTS = {"demo:prose": 9, "demo:code": 29, "demo:legal": 67, "demo:maths": 35}
MODEL = "--local --model tiny --quantization none --device cpu --sequence_length 512 --rows_per_shard 64"
RECORD = "--record logits --record output_norm --record logprob"


def main(arguments: list[str]) -> int:
    """Capture, report, and print what was found; returns the status of the first capture that fails, otherwise 0.

    The last lines name the explorer, then the report's path.
    """
    if arguments:
        raise ValueError(f"the demo has no options, but got {arguments[0]!r}: use python jobs/capture.py instead")
    for text in TEXTS:
        demo_source(text)  # reports a missing package before the first capture
    started = time.monotonic()
    for text, documents in TEXTS.items():
        options = ["--dataset", text, "--limit_documents", str(documents), "--store", str(STORE)]
        if status := capture.carry_out(parse_capture([*options, *MODEL.split(), *RECORD.split()])):
            return status

    from analysis.report.page import write_report  # takes seconds to load, and a capture does not need it

    report = write_report([STORE], REPORT)
    print_found(stdout_console(), report.answers, report.apart)
    tell_next(time.monotonic() - started)
    return 0


def tell_next(took_s: float) -> None:
    """Print the next commands; the explorer and the report come last, where they are noticed."""
    commands = (
        command_line("status", STORE),
        command_line("query", STORE / "demo-code", "--token", " return", "--layer", 2),
        command_line("compare", STORE / "demo-prose", STORE / "demo-code"),
        command_line("capture", "--local", "--model", "tiny", "--dataset", "README.md", "--store", STORE),
    )
    print("\nNext commands to try:", *commands, sep="\n  ")
    print(f"\nThe demo took {took_s:.0f} s. Explore the results in a browser:\n  {command_line('explore', STORE)}")
    print(f"The report:\n{REPORT}")


def print_found(console: Console, answers: "Sequence[Answers]", apart: "xr.Dataset | None") -> None:
    """Print the report's findings, and each data set's busiest expert, as LAYER:EXPERT."""
    from analysis.report.headline import sentences

    print_line(console, "")
    for sentence in sentences(answers, apart):
        print_line(console, f"- {sentence}")
    print_line(console, "")
    rows = [_busiest(each) for each in answers if each["load"].attrs["n"]]
    print_table(console, COLUMNS, rows, note="LAYER:EXPERT; a full bar means all choices of the layer")


def _busiest(each: "Answers") -> Facts:
    """A data set, and the expert with the largest share of its layer's choices."""
    share = each["load"]["share"].fillna(0)
    top = share.isel(share.argmax(("layer", "expert")))
    place: dict[str, Any] = {name: int(top[name]) for name in ("layer", "expert")}
    return {"data_set": each.label, **each["load"].attrs, "share": float(top), **place}


COLUMNS = (
    Column(name="data set", text=lambda row: row["data_set"], left=True, elastic=True),
    Column(name="tokens", text=lambda row: f"{row['n']:,}", spare=3),
    Column(name="busiest", text=lambda row: f"{row['layer']}:{row['expert']}"),
    Column(name="choices", text=lambda row: f"{row['share']:.1%}"),
    Bars(part=lambda row: row["share"]),
    Column(name="even", text=lambda row: f"{row['null']:.1%}", spare=2),
)


if __name__ == "__main__":
    run_job(main)
