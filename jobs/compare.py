"""Do two captures of the same text agree, and does one predict it better? `python jobs/compare.py A B`."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.interrupts import end_on_interrupt

end_on_interrupt()

import tyro

from jobs.console.places import capture_at
from jobs.console.tables import Column, Facts, print_json, print_line, print_table, stdout_console
from jobs.console.terminal import reporting, run_job

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import Console

    from analysis.scanning import Selection

MEASURES = ("same_set", "overlap", "same_first", "first_difference", "margin", "margin_at_flips")


def _number(measure: str) -> Callable[[Facts], str]:
    return lambda row: "" if row[measure] is None else f"{row[measure]:.4f}"


COLUMNS = (
    Column(name="layer", text=lambda row: row["layer"]),
    *(Column(name=name.replace("_", " "), text=_number(name), spare=at) for at, name in enumerate(MEASURES)),
)
OF_TOKENS = (
    Column(name="tokens that lose most", text=lambda row: row["piece"], left=True),
    Column(name="predicted", text=lambda row: f"{row['tokens']:,}"),
    Column(name="effect", text=lambda row: f"{row['effect']:+.4f}"),
    Column(name="in all", text=lambda row: f"{row['effect'] * row['tokens']:+.3f}"),
)
MOST_TOKENS = 10  # that are named (arbitrary)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare what two captures of the same rows chose, token by token and layer by layer, and what they predicted.

    For the same text under another quantization, revision, back-end or machine, or with experts masked. Where both
    recorded log-probabilities (--record logprob), the effect of the second one on each predicted token is shown. Exit
    status: 0 compared, whatever came out, 2 when they cannot be.
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
    json: bool = False
    """For scripts: one JSON document on standard output instead of the table, with the keys layers (rows as in the
    table), differ (what the captures say differently of themselves, with both values), n (tokens), any_difference (the
    share of tokens whose experts differ at some layer), and effect: null where one did not record log-probabilities,
    else effect, low, high (nats a predicted token), p, level, untested (why there is no interval, else empty), n,
    documents, estimator, definition, and lose_most (token_id, piece, tokens and effect of those that lose most)."""


def main(arguments: list[str]) -> int:
    """Print what was found."""
    config = tyro.cli(CompareConfig, prog="python jobs/compare.py", args=arguments, use_underscores=True)

    from analysis.metrics.agreement import Agreement, paired  # numba takes a second: --help does not wait for it
    from analysis.scanning import Selection, scan
    from store import open_capture

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
    told = {
        "layers": rows,
        "differ": _differences(captures),
        "n": found.attrs["n"],
        "any_difference": found.attrs["any_difference"],
        "effect": _effect(captures, only) if all("logprob" in capture for capture in captures) else None,
    }
    if config.json:
        print_json(told)
    else:
        _print(stdout_console(), told)
    return 0


def _differences(captures: "Sequence[xr.Dataset]") -> dict[str, Any]:
    """In what the models and the environments differ, with both values."""
    from store import attributes, model_differences

    provenance = [attributes(capture) for capture in captures]
    one, other = (each.get("environment") for each in provenance)
    return {**model_differences(*provenance), **({"environment": (one, other)} if one != other else {})}


def _effect(captures: "Sequence[xr.Dataset]", only: "Selection") -> Facts:
    """How the second capture predicts the tokens, beside the first, and which tokens lose most in all."""
    from analysis.metrics.effect import effect

    with reporting("effect", unit="shards") as report:
        found = effect(*captures, only=only, progress=lambda done, total: report.to(done))
    mean, tokens = found["of_token"].fillna(0).values, found["tokens"].values
    worst = (mean * tokens).argsort(kind="stable")[:MOST_TOKENS]
    losing: list[Facts] = [
        {
            "token_id": each,
            "piece": str(captures[0]["piece"].values[each]),
            "tokens": int(tokens[each]),
            "effect": float(mean[each]),
        }
        for each in worst.tolist()
        if mean[each] < 0
    ]
    values = {name: float(found[name]) for name in ("effect", "low", "high", "p")}
    said = {name: found.attrs[name] for name in ("level", "untested", "n", "documents", "estimator", "definition")}
    return {**values, **said, "lose_most": losing}


def _print(console: "Console", told: Facts) -> None:
    print_table(console, COLUMNS, told["layers"])
    for name, values in told["differ"].items():
        print_line(console, f"{name}: {values[0]} and {values[1]}")
    different = told["any_difference"]
    print_line(console, f"{told['n']:,} tokens in both; {different:.2%} of them differ in some layer's experts")
    if (effect := told["effect"]) is None:
        return
    sure = f"{effect['level']:.0%} interval {effect['low']:+.4f} to {effect['high']:+.4f}, p {effect['p']:.4f}"
    print_line(
        console,
        f"effect on predictions: {effect['effect']:+.4f} nats a token in the second capture, below 0 where it predicts"
        f" worse ({effect['untested'] or sure}; {effect['n']:,} tokens)",
    )
    if effect["lose_most"]:
        print_table(console, OF_TOKENS, effect["lose_most"])


if __name__ == "__main__":
    run_job(main)
