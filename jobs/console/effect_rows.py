"""What `jobs/compare.py` reports about predictions: the effect of a second capture, by class, token, place and data
set.

Promises: the table and the JSON output have the same rows. Does not know about the command line.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from jobs.console.tables import Column, Facts, count, number, print_line, print_table
from jobs.console.terminal import reporting

if TYPE_CHECKING:
    import xarray as xr

    from analysis.scanning import Selection

BEFORE, AFTER = 10, 5  # tokens of context on both sides (arbitrary)
SURE = (
    number("effect", "effect", "+.4f"),
    number("from", "low", "+.4f", spare=2),
    number("to", "high", "+.4f", spare=2),
    number("p", "p", ".4f", spare=1),
)
CLASSES = (
    Column(name="class", text=lambda row: row["class"], left=True),
    count("predicted", "tokens"),
    *SURE,
)
DATA_SETS = (
    Column(name="data set", text=lambda row: row["data_set"], left=True),
    count("predicted", "tokens"),
    *SURE,
    number("difference from the others", "difference", "+.4f", spare=3),
    number("from", "difference_low", "+.4f", spare=4),
    number("to", "difference_high", "+.4f", spare=4),
    number("p", "difference_p", ".4f", spare=3),
)
OF_CLASS = {"tokens": "class_tokens", "effect": "of_class", "low": "class_low", "high": "class_high", "p": "class_p"}
OF_PLACES = (
    number("effect", "effect", "+.4f"),
    Column(name="document", text=lambda row: row["name"], left=True, spare=2),
    Column(name="position", text=lambda row: str(row["position"]), spare=1),
    Column(name="token", text=lambda row: row["token"], left=True),
    Column(
        name="in context", text=lambda row: f"{row['before']}⟦{row['token']}⟧{row['after']}", left=True, elastic=True
    ),
)
OF_TOKENS = (
    Column(name="tokens with the largest losses", text=lambda row: row["piece"], left=True),
    count("predicted", "tokens"),
    number("effect", "effect", "+.4f"),
    Column(name="total", text=lambda row: f"{row['effect'] * row['tokens']:+.3f}"),
)


def effect_told(captures: "Sequence[xr.Dataset]", only: "Selection", top: int) -> Facts:
    """How the second capture predicts the tokens relative to the first, and the tokens with the largest total
    losses."""
    from analysis.metrics.effect import effect

    one, other = captures
    with reporting("effect", unit="shards", transient=True) as report:
        found = effect(one, other, places=top, only=only, progress=lambda done, total: report.to(done))
    values = {name: float(found[name]) for name in ("effect", "low", "high", "p")}
    said = {name: found.attrs[name] for name in ("level", "untested", "n", "documents", "estimator", "definition")}
    return {
        **values,
        **said,
        "classes": _classes(found),
        "lose_most": _losing_tokens(one, found, top),
        "places": _losing_places(one, found),
    }


def effects_told(pairs: "Mapping[str, tuple[xr.Dataset, xr.Dataset]]", only: "Selection") -> Facts:
    """How the second captures predict the tokens of several data sets, and how the effects differ."""
    from analysis.metrics.effect_by_data_set import effect_by_data_set

    with reporting("effect", unit="shards", transient=True) as report:
        found = effect_by_data_set(pairs, only=only, progress=lambda done, total: report.add(1))
    keys = {name: name for name in ("effect", "low", "high", "p")} | {"tokens": "predicted"}
    apart = ("difference", "difference_low", "difference_high", "difference_p")
    rows = []
    for name in pairs:
        own = found.sel(data_set=name)
        values = {key: own[variable].item() for key, variable in keys.items()}
        values |= {key: own[key].item() if key in own else math.nan for key in apart}
        rows.append({"data_set": name, **values, "classes": _classes(own)})
    said = ("level", "documents", "untested", "untested_difference", "estimator", "definition")
    return {"data_sets": rows, **{name: found.attrs[name] for name in said}}


def _classes(found: "xr.Dataset") -> list[dict[str, Any]]:
    """The classes that occur, the largest loss per token first."""
    columns = {key: found[name].values.tolist() for key, name in OF_CLASS.items()}
    names = found["token_class"].values.tolist()
    rows = [{"class": name, **{key: values[at] for key, values in columns.items()}} for at, name in enumerate(names)]
    return sorted((row for row in rows if row["tokens"]), key=lambda row: float(row["effect"]))


def _losing_tokens(capture: "xr.Dataset", found: "xr.Dataset", top: int) -> list[dict[str, Any]]:
    """The tokens with the largest losses over all their occurrences."""
    from analysis.metrics.effect import losing_tokens

    return [
        {
            "token_id": token,
            "piece": str(capture["piece"].values[token]),
            "tokens": int(found["tokens"][token]),
            "effect": float(found["of_token"][token]),
        }
        for token in losing_tokens(found, top).tolist()
    ]


def _losing_places(capture: "xr.Dataset", found: "xr.Dataset") -> list[dict[str, Any]]:
    """The places with the largest losses, with the text around them."""
    from analysis.explorer.pieces import readable

    rows, reads = [], readable([str(piece) for piece in capture["piece"].values])
    for effect, row, at in zip(*(found[name].values.tolist() for name in ("of_place", "row", "position")), strict=True):
        length, start = int(capture["length"][row]), max(0, at - BEFORE)
        ids = capture["token"].isel(doc=row, position=slice(start, min(length, at + 1 + AFTER))).values
        texts = [reads[token] for token in ids.tolist()]
        document = int(capture["document_id"][row])
        place = {"row": row, "position": at, "document": document, "name": str(capture["name"].values[document])}
        text = {"before": texts[: at - start], "token": texts[at - start : at - start + 1]}
        text["after"] = texts[at - start + 1 :]
        rows.append({"effect": effect, **place, **{name: "".join(part) for name, part in text.items()}})
    return rows


def print_effect(console: Console, effect: Facts) -> None:
    """Print the effect and the largest losses."""
    sure = f"{effect['level']:.0%} interval {effect['low']:+.4f} to {effect['high']:+.4f}, p = {effect['p']:.4f}"
    print_line(
        console,
        f"effect on predictions: {effect['effect']:+.4f} nats per token in the second capture, negative if it predicts"
        f" worse ({effect['untested'] or sure}; {effect['n']:,} tokens)",
    )
    print_table(console, CLASSES, effect["classes"])
    print_line(console, "by class of the predicted token; p-values are corrected for all classes")
    if effect["lose_most"]:
        print_table(console, OF_TOKENS, effect["lose_most"])
    if effect["places"]:
        print_line(console, "the largest losses, at most one per row of the capture:")
        print_table(console, OF_PLACES, effect["places"])


def print_effects(console: Console, told: Facts) -> None:
    """Print the effect on each data set, and on each class of each."""
    print_table(console, DATA_SETS, told["data_sets"])
    print_line(
        console,
        "nats per token in the second capture, negative if it predicts worse; difference from the others: from the mean"
        f" of the other data sets' effects; {told['level']:.0%} intervals",
    )
    for name, reason in {**told["untested_difference"], **told["untested"]}.items():
        print_line(console, f"not tested: {name}: {reason}")
    for row in told["data_sets"]:
        print_line(
            console, f"{row['data_set']}, by class of the predicted token; p-values are corrected for all classes:"
        )
        print_table(console, CLASSES, row["classes"])
