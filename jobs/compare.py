"""Compare two captures of one model: agreement and effect for equal tokens, otherwise a contrast.

usage: python jobs/compare.py STORE/DATASET STORE/DATASET [options]

Examples:
  python jobs/compare.py demo.zarr/demo-prose demo.zarr/demo-code
  python jobs/compare.py routes.zarr/whole routes.zarr/masked --json
  python jobs/compare.py whole.zarr masked.zarr

What counts:
  --phase PHASE             only tokens of the prompt, or only generated ones
  --role ROLE               only tokens of this speaker of a conversation; repeat for more
  --allow_incomplete        compare the part that both captures have

Output:
  --top N                   experts or tokens to list (10)
  --json                    one JSON document, for scripts; docs/json.md names its keys

The first line of the output says what is compared and why. docs/options.md explains every option.
Exit status: 0 compared, whatever the result, 2 they cannot be compared.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import command_line, start

start(__name__, __doc__)

import tyro

from jobs.console.agreement_rows import agreement_told, print_agreement
from jobs.console.arguments import parse
from jobs.console.contrast_rows import contrast_told, print_contrast
from jobs.console.effect_rows import effects_told, print_effects
from jobs.console.places import by_store, capture_at, captures_at
from jobs.console.tables import Facts, print_json, print_line, stdout_console
from jobs.console.terminal import run_job, say_next

if TYPE_CHECKING:
    import xarray as xr
    from rich.console import Console

    from analysis.scanning import Selection


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare the choices of two captures of one model. The first line of the output says how.

    If both hold the same tokens in the same rows, for example with a different quantization, revision, back-end or
    machine, or with masked experts: agreement by layer and, if both recorded log-probabilities (--record logprob), the
    effect of the second one on each predicted token. Otherwise the contrast of the two data sets: the experts whose
    share of tokens differs most, and the tokens that contribute most. For two stores with the same data sets: the
    effect on each data set. Exit status: 0 compared, whatever the result, 2 when they cannot be compared.
    """

    one: Annotated[str, tyro.conf.Positional]
    """A capture, as STORE/DATASET: demo.zarr/demo-prose, or s3://bucket/routes.zarr/wikitext-103; or STORE for all."""
    other: Annotated[str, tyro.conf.Positional]
    """Another capture; or a store with the same data sets, captured in a different way."""
    allow_incomplete: bool = False
    """Compare the part that both captures have."""
    phase: Annotated[tuple[Literal["prompt", "generated"], ...], tyro.conf.UseAppendAction] = ()
    """Only tokens of this phase, if the captures record it (imported routes do); with equal tokens only the first one
    must record it. May be repeated."""
    role: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Only tokens of this speaker, if the captures contain conversations: assistant; with equal tokens only the first
    one must. May be repeated."""
    top: int = 10
    """Experts or tokens to list."""
    json: bool = False
    """One JSON document on standard output, for scripts: docs/json.md names its keys."""

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ValueError(f"--top is {self.top}, but must be at least 1")


def main(arguments: list[str]) -> int:
    """Print the results."""
    config = parse(CompareConfig, "compare", arguments)

    from analysis.scanning import Selection  # numba takes a second: --help must not wait for it

    only, places = Selection(roles=config.role or None, phases=config.phase or None), (config.one, config.other)
    told: dict[str, Any] = {"one": config.one, "other": config.other}
    told |= (_of_stores if _are_stores(*places) else _of_captures)(places, only, config)
    if config.json:
        print_json(told)
    else:
        _print(stdout_console(), told)
        say_next(*(command_line("explore", place) for place in by_store(places)))
    return 0


def _are_stores(one: str, other: str) -> bool:
    """Whether both name stores, at least one of them with several data sets."""
    names = [captures_at(place) for place in (one, other)]
    stores = [path == place.rstrip("/") for (path, _), place in zip(names, (one, other), strict=True)]
    return all(stores) and max(len(held) for _, held in names) > 1


def _of_stores(places: tuple[str, str], only: "Selection", config: CompareConfig) -> dict[str, Any]:
    """The effect on each data set that both stores hold."""
    from store import open_capture

    (one, names), (other, others) = map(captures_at, places)
    common = [name for name in names if name in others]
    if not common:
        raise ValueError(
            f"{one} has {', '.join(names)} and {other} has {', '.join(others)}: they have no data set in common"
        )
    opened = partial(open_capture, allow_incomplete=config.allow_incomplete)
    pairs = {name: (opened(one, name), opened(other, name)) for name in common}
    left_out = sorted(set(names) ^ set(others))
    shown = {"shows": "effects", "left_out": left_out, "differ": _differences(pairs[common[0]])}
    return {**shown, **effects_told(pairs, only)}


def _of_captures(places: tuple[str, str], only: "Selection", config: CompareConfig) -> dict[str, Any]:
    """Agreement and effect if the captures hold the same tokens, otherwise the contrast of the two data sets."""
    from analysis.metrics.agreement import OtherTokens
    from store import open_capture

    captures = [open_capture(*capture_at(place), allow_incomplete=config.allow_incomplete) for place in places]
    differ = _differences(captures)
    try:
        return {"shows": "agreement", "differ": differ, **agreement_told(captures, only, config.top)}
    except OtherTokens as reason:
        by_place = dict(zip(places, captures, strict=True))
        told = contrast_told(by_place, only, config.top)
        return {"shows": "contrast", "why": str(reason), "differ": differ, **told}


def _differences(captures: "Sequence[xr.Dataset]") -> dict[str, Any]:
    """How the models and the environments differ, with both values."""
    from store import attributes, model_differences

    provenance = [attributes(capture) for capture in captures]
    one, other = (each.get("environment") for each in provenance)
    return {**model_differences(*provenance), **({"environment": (one, other)} if one != other else {})}


def _print(console: "Console", told: Facts) -> None:
    print_line(console, _first_line(told))
    for name, values in told["differ"].items():
        print_line(console, f"{name}: {values[0]} and {values[1]}")
    shown = {"agreement": print_agreement, "contrast": print_contrast, "effects": print_effects}
    shown[told["shows"]](console, told)


def _first_line(told: Facts) -> str:
    """What is shown, of which captures, and why."""
    both = f"of {told['one']} and {told['other']}"
    if told["shows"] == "contrast":
        return f"contrast {both}: {told['why']}"
    if told["shows"] == "effects":
        beside = f"; only in one of them: {', '.join(told['left_out'])}" if told["left_out"] else ""
        return f"effect {both}, by data set{beside}"
    if told["effect"] is None:
        return f"agreement {both}: equal tokens; the effect needs --record logprob in both"
    return f"agreement and effect {both}: equal tokens"


if __name__ == "__main__":
    run_job(main)
