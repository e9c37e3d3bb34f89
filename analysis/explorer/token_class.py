"""A token class in a data set, such as digits or a regular expression: the experts it goes to, and some places.

Promises: counts are exact, and lifts have intervals over documents; what documents explain is separated out with a
sample of whole documents. Does not know HTML.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from analysis.explorer.counting import Counting
from analysis.explorer.live import Shown
from analysis.explorer.maps import expert_map
from analysis.explorer.view import MIN_COUNT, View
from analysis.metrics.class_experts import ClassCounts, class_excess_of, class_experts_of
from analysis.scanning import Array
from analysis.statistics.jackknife import Jackknife
from analysis.token_classes import CLASSES, compiled, is_expression, members_of

EXPERTS, TOKENS, PLACES = 12, 12, 20  # rows of the page's lists
SHOWN = ("share", "share_low", "share_high", "lift", "lift_low", "lift_high")


def classes_named(view: View, text: str) -> list[dict[str, Any]]:
    """The classes of a vocabulary that match a search: by part of their name, or as a regular expression."""
    wanted = text.strip().casefold()
    if is_expression(text.strip()):
        wrong = wrong_expression(text)
        return [] if wrong else [{"name": text.strip(), "description": "a regular expression", "count": None}]
    names = [name for name in view.classes if wanted and wanted in (name, *_words(name))]
    return [
        {
            "name": name,
            "description": CLASSES[name].description,
            "count": int(view.token_counts[view.classes[name]].sum()),
        }
        for name in names
    ]


def wrong_expression(text: str) -> str:
    """Why the text between slashes is not a valid regular expression; empty if it is valid, or if there are no
    slashes."""
    try:
        if is_expression(text.strip()):
            compiled(text.strip())
    except ValueError as error:
        return str(error)
    return ""


def _words(name: str) -> set[str]:
    """Other names of a class: its parts, and its singular."""
    return {name.removesuffix("s"), *name.split("-"), name.replace("-", " ")}


def class_page(
    counting: Counting, shown: Shown, which: str, layer: int | None, expert: int | None
) -> dict[str, Any] | None:
    """The experts a class goes to, and its places: all, or those where it went to an expert at a layer; None while
    counting.

    Raises
    ------
    ValueError
        When there is no such class, layer or expert.
    """
    view = shown.view
    at = view.chosen_layer(layer, expert)
    found = counting.result(("class", view.dataset, which), (shown,), lambda: _counted(counting, shown, which))
    if found is None:
        return None
    ids = np.flatnonzero(found["belongs"] & (view.token_counts > 0))
    frequent = ids[np.argsort(-view.token_counts[ids], kind="stable")][:TOKENS].tolist()
    return found | {
        "kinds": len(ids),
        "tokens": [{"id": n, "text": view.texts[n], "count": int(view.token_counts[n])} for n in frequent],
        "places": _places(view, ids, at, expert),
    }


def _counted(counting: Counting, shown: Shown, which: str) -> dict[str, Any]:
    """Its counts by layer and expert, and the experts with the highest lift."""
    view = shown.view
    belongs = members_of(which, view.pieces)
    [counts] = counting.ask(view.capture, [Jackknife(ClassCounts({which: belongs}))], (shown,))
    own = class_experts_of(counts).squeeze("token_class", drop=True)
    p = class_excess_of(view.now.result("sample"), {which: belongs})["p"]
    adjusted = (p * p.size).clip(max=1).squeeze("token_class", drop=True) if p.size else None
    lift = own["lift"].where(own["counts"] >= MIN_COUNT).values
    order = np.argsort(-np.nan_to_num(lift), axis=None, kind="stable")[:EXPERTS].tolist()
    cells = [divmod(cell, view.experts) for cell in order if lift.flat[cell] > 0]
    return {
        "which": which,
        "description": CLASSES[which].description if which in CLASSES else "a regular expression",
        "belongs": belongs,
        "count": int(own["tokens"]),
        "map": expert_map(view, np.nan_to_num(own["share"].transpose("layer", "expert").values)),
        "experts": [_row(view, own, adjusted, *cell) for cell in cells],
        "sampled": int(view.now.result("sample").attrs["n"]),
    }


def _row(view: View, own: xr.Dataset, p: xr.DataArray | None, at: int, expert: int) -> dict[str, Any]:
    cell = {"layer": at, "expert": expert}
    return {
        "layer": view.layers[at],
        "expert": expert,
        "count": int(own["counts"].isel(cell)),
        **{name: float(own[name].isel(cell)) for name in SHOWN},
        "p": float("nan") if p is None else float(p.isel(cell)),
    }


def _places(view: View, ids: Array, at: int | None, expert: int | None) -> list[dict[str, Any]]:
    """Some places, spread over the tokens of the first shards that have any."""
    rows: list[dict[str, Any]] = []
    for part in view.now.parts.values():
        found = part.find_all(ids, at, expert)
        some = found[np.unique(np.linspace(0, len(found) - 1, PLACES - len(rows)).astype(int))] if len(found) else found
        for row, position in zip(*(each.tolist() for each in part.places(some)), strict=True):
            rows.append(view.place(part, row, position))
        if len(rows) >= PLACES:
            break
    return rows
