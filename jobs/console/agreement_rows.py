"""What `jobs/compare.py` reports about two captures of the same tokens: how far they agree.

Promises: the table and the JSON output have the same rows. Does not know about the command line.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from jobs.console.effect_rows import effect_told, print_effect
from jobs.console.tables import Column, Facts, number, print_line, print_table
from jobs.console.terminal import reporting

if TYPE_CHECKING:
    import xarray as xr

    from analysis.scanning import Selection

MEASURES = ("same_set", "overlap", "same_first", "first_difference", "margin", "margin_at_flips")
COLUMNS = (
    Column(name="layer", text=lambda row: row["layer"]),
    *(number(name.replace("_", " "), name, ".4f", spare=at) for at, name in enumerate(MEASURES)),
)
CHANGED = Column(name="changed", text=lambda row: row["changed"], left=True)


def agreement_told(captures: "Sequence[xr.Dataset]", only: "Selection", top: int) -> Facts:
    """How far two captures agree, layer by layer, and the effect if both recorded log-probabilities.

    Raises
    ------
    OtherTokens
        When they do not hold the same tokens; see `analysis.metrics.agreement`.
    """
    from analysis.metrics.agreement import Agreement, paired  # numba takes a second: --help must not wait for it
    from analysis.scanning import scan

    with reporting("compare", unit="shards", transient=True) as report:
        found = scan(paired(*captures), [Agreement()], only=only, progress=lambda done, total: report.to(done))[0]
    changed = _changed(captures)
    rows: list[Facts] = [
        {
            "layer": str(layer),
            **{measure: float(found[measure].sel(layer=layer)) for measure in MEASURES},
            "changed": "; ".join(f"{field} {', '.join(experts)}" for field, experts in changed.get(layer, {}).items()),
        }
        for layer in found["layer"].values.tolist()
    ]
    rows.append({"layer": "by chance", **{name: found[name].attrs["null"] for name in MEASURES}, "changed": ""})
    return {
        "layers": rows,
        "moved": _moved(found["same_set"], sorted(changed)),
        "n": found.attrs["n"],
        "any_difference": found.attrs["any_difference"],
        "effect": effect_told(captures, only, top) if all("logprob" in capture for capture in captures) else None,
    }


def _changed(captures: "Sequence[xr.Dataset]") -> dict[int, dict[str, list[str]]]:
    """The experts by layer that only one of two captures masks or forces, by field."""
    from store import attributes, model_differences

    changed: dict[int, dict[str, list[str]]] = {}
    differ = model_differences(*map(attributes, captures))
    for field in ("mask", "force"):
        one, other = differ.get(field, ((), ()))
        for place in [place for place in (*one, *other) if (place in one) != (place in other)]:
            layer, _, expert = place.partition(":")
            changed.setdefault(int(layer), {}).setdefault(field, []).append(expert)
    return changed


def _moved(same_set: "xr.DataArray", changed: list[int]) -> Facts | None:
    """The share of tokens with a different set of experts, on average over the layers below the changed ones, over the
    changed ones, and over the unchanged layers above the lowest changed one; None if no layer was changed."""
    if not changed:
        return None
    layer = same_set["layer"]
    parts = {"below": layer < changed[0], "changed": layer.isin(changed)}
    parts["above"] = (layer > changed[0]) & ~parts["changed"]
    return {"layers": changed, **{name: float(1 - same_set[part].mean()) for name, part in parts.items()}}


def print_agreement(console: Console, told: Facts) -> None:
    """Print the table of layers, and the effect on predictions."""
    moved = told["moved"]
    print_table(console, COLUMNS if moved is None else (*COLUMNS, CHANGED), told["layers"])
    if moved is not None:
        print_line(console, _moved_in_words(moved))
    different = told["any_difference"]
    print_line(
        console, f"{told['n']:,} tokens in both; {different:.2%} of them differ in the experts of one layer or more"
    )
    if told["effect"] is not None:
        print_effect(console, told["effect"])


def _moved_in_words(moved: Facts) -> str:
    """How routes changed below, in and above the changed layers."""
    layers = moved["layers"]
    which = f"layer {layers[0]}" if len(layers) == 1 else f"the {len(layers)} changed layers"
    shares = {"below": f"below layer {layers[0]}", "changed": f"at {which}", "above": "at the unchanged layers above"}
    known = [f"{moved[name]:.2%} {words}" for name, words in shares.items() if not math.isnan(moved[name])]
    return f"tokens with a different set of experts, on average over layers: {'; '.join(known)}"
