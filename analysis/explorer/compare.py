"""Two data sets of one model: which experts they use differently or, if their tokens are equal, how far they agree, and
the effect on predictions.

Promises: numbers come from the metrics' own functions, over what is indexed or, where a scan is needed, over what was
captured at the time of the scan. Does not know HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from analysis.explorer.counting import Counting
from analysis.explorer.effect import same_rows
from analysis.explorer.expert import contributions
from analysis.explorer.live import Shown
from analysis.explorer.view import View
from analysis.metrics.agreement import Agreement, OtherTokens, paired
from analysis.metrics.contrast import contrast_of, refuse_incomparable
from analysis.metrics.differing import beyond_chance, expert_row, largest_cells
from analysis.metrics.document_scores import document_scores_by
from analysis.metrics.effect import effect_asked, effect_from, losing_tokens
from analysis.scanning import Reducer

EXPERTS, TOKENS, PLACES, DOCUMENTS = 12, 5, 3, 5  # rows of the page's lists
CLASSES_SHOWN = 10  # classes with the largest losses (arbitrary)
EXAMPLES = 3  # experts that are shown with examples
OF_LAYER = ("divergence", "divergence_corrected", "divergence_low", "divergence_high", "divergence_by_chance", "p")
OF_AGREEMENT = ("same_set", "overlap", "same_first")


def compared(counting: Counting, one: Shown, other: Shown) -> dict[str, Any] | None:
    """How two data sets compare; None while counting.

    Raises
    ------
    ValueError
        When they cannot be compared.
    """
    about = ("compare", one.view.dataset, other.view.dataset)
    return counting.result(about, (one, other), lambda: _compared(counting, one, other))


def _compared(counting: Counting, one: Shown, other: Shown) -> dict[str, Any]:
    refuse_incomparable({each.view.dataset: each.view.capture for each in (one, other)})
    if same_rows(one.view, other.view):
        try:
            return _agreement(counting, one, other)
        except OtherTokens:  # the rows have the same lengths
            pass
    return _contrast(counting, one, other)


def _agreement(counting: Counting, one: Shown, other: Shown) -> dict[str, Any]:
    """For equal tokens: how far they agree, and the effect if both recorded log-probabilities."""
    both = paired(one.view.capture, other.view.capture)
    measured = all("logprob" in each.view.capture for each in (one, other))
    found, *counted = counting.ask(
        both, [Agreement(), *(effect_asked(one.view.pieces) if measured else [])], (one, other)
    )
    return {
        "shows": "agreement",
        "tokens": found.attrs["n"],
        "any_difference": found.attrs["any_difference"],
        "layers": [
            {"layer": layer, **{name: float(found[name].sel(layer=layer)) for name in OF_AGREEMENT}}
            for layer in one.view.layers
        ],
        "chance": {name: found[name].attrs["null"] for name in OF_AGREEMENT},
        "effect": _effect(one.view, effect_from(counted)) if counted else None,
    }


def _contrast(counting: Counting, one: Shown, other: Shown) -> dict[str, Any]:
    """For different tokens: which experts differ, which tokens contribute to that, and how well documents are
    classified."""
    shown = {each.view.dataset: each for each in (one, other)}
    if not all(each.view.now.tokens for each in shown.values()):
        raise ValueError(f"nothing of {' or '.join(shown)} is indexed yet: try again soon")
    counts = {name: each.profiles.choices_of_units for name, each in shown.items()}
    found = contrast_of(counts, threads=counting.threads)
    cells = largest_cells(found["difference"].isel(data_set=0).values, EXPERTS)
    at = sorted({layer for layer, _ in cells})
    carried = xr.concat(
        [contributions(one.view, [other.view], layer, TOKENS) for layer in at],
        xr.DataArray([one.view.layers[layer] for layer in at], dims="layer", name="layer"),
    )
    rows = [expert_row(found, carried, one.view.layers[layer], expert) for layer, expert in cells]
    for row in rows:
        row["tokens"] = [each | {"text": one.view.texts[each["token_id"]]} for each in row["tokens"]]
    return {
        "shows": "contrast",
        "layers": [
            {"layer": layer, **{name: float(found[name].sel(layer=layer)) for name in OF_LAYER}}
            for layer in one.view.layers
        ],
        "experts": rows,
        "most": max(abs(end) for row in rows for end in (row["difference"], row["low"], row["high"]) if end == end),
        "examples": [
            {
                **row,
                "places": [each.profiles.contexts_of(row["layer"], row["expert"], PLACES) for each in (one, other)],
            }
            for row in rows[:EXAMPLES]
        ],
        "cells": found["difference"].isel(data_set=0).size,
        "beyond_chance": beyond_chance(found),
        **{name: found.attrs[name] for name in ("n", "documents", "untested", "level")},
        **_documents(counting, shown),
    }


def _documents(counting: Counting, shown: dict[str, Shown]) -> dict[str, Any]:
    """How well documents are classified, and those that look most like the other data set."""
    ask: Callable[[str, Reducer], xr.Dataset] = lambda name, reducer: counting.ask(
        shown[name].view.capture, [reducer], [shown[name]]
    )[0]
    try:
        found = document_scores_by(list(shown), ask)
    except ValueError as error:
        return {"told": None, "why": str(error)}
    told = []
    for at, (name, each) in enumerate(shown.items()):
        own = found.isel(document=found["data_set"].values == name)
        evidence = (own["score"].isel(candidate=at) - own["score"].isel(candidate=1 - at)).values
        order = np.argsort(evidence, kind="stable")[:DOCUMENTS].tolist()
        ids = own["document_id"].values[order].tolist()
        odd = [
            {"id": number, "name": each.view.names[number], "evidence": float(evidence[place])}
            for place, number in zip(order, ids, strict=True)
        ]
        told.append({"name": name, "right": float(found["right"][at]), "documents": own.sizes["document"], "odd": odd})
    return {"told": told, "auc": float(found["auc"][0]), "why": ""}


def _effect(view: View, found: xr.Dataset) -> dict[str, Any]:
    """What predictions lose: in total, by token, and at which places."""
    worst, places = losing_tokens(found, TOKENS * 2).tolist(), []
    for effect, row, at in zip(*(found[name].values.tolist() for name in ("of_place", "row", "position")), strict=True):
        part = view.now.part_of(row)
        if part is not None:
            places.append(view.place(part, row, at) | {"effect": effect})
    return {
        **{name: float(found[name]) for name in ("effect", "low", "high", "p")},
        **{name: found.attrs[name] for name in ("n", "documents", "untested", "level")},
        "known": not math.isnan(float(found["p"])),
        "classes": _classes(found),
        "lose_most": [
            {
                "id": token,
                "text": view.texts[token],
                "tokens": int(found["tokens"][token]),
                "effect": float(found["of_token"][token]),
            }
            for token in worst
        ],
        "places": places,
    }


def _classes(found: xr.Dataset) -> list[dict[str, Any]]:
    """The classes of predicted tokens, the largest loss per token first."""
    names = {"effect": "of_class", "low": "class_low", "high": "class_high", "p": "class_p", "tokens": "class_tokens"}
    rows = [
        {"name": name, **{key: found[variable].values[at].item() for key, variable in names.items()}}
        for at, name in enumerate(found["token_class"].values.tolist())
    ]
    return sorted((row for row in rows if row["tokens"]), key=lambda row: float(row["effect"]))[:CLASSES_SHOWN]
