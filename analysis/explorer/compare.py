"""Two data sets of one model: which experts they use differently; of equal tokens, how far they agree, and the effect.

Promises: numbers are those of the metrics' own functions. What needs a scan is kept in the index's folder, like all
answers, and is counted while nobody waits for more than `PATIENCE_S`. Does not know HTML.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from analysis.explorer.effect import same_rows
from analysis.explorer.expert import contributions
from analysis.explorer.live import Shown
from analysis.explorer.view import View
from analysis.metrics.agreement import Agreement, OtherTokens, paired
from analysis.metrics.contrast import contrast_of, refuse_incomparable
from analysis.metrics.differing import beyond_chance, expert_row, largest_cells
from analysis.metrics.document_scores import document_scores_by
from analysis.metrics.effect import effect_asked, effect_of, losing_tokens
from analysis.results import answers
from analysis.scanning import Reducer, Selection

PATIENCE_S = 2.0  # that a visitor waits before being told how far it is (arbitrary)
EXPERTS, TOKENS, PLACES, DOCUMENTS = 12, 5, 3, 5  # rows of the page's lists
EXAMPLES = 3  # experts that are shown with examples
OF_LAYER = ("divergence", "divergence_corrected", "divergence_low", "divergence_high", "divergence_by_chance", "p")
OF_AGREEMENT = ("same_set", "overlap", "same_first")


class Comparisons:
    """What is known of pairs of data sets.

    Parameters
    ----------
    folder : Path
        Where answers are kept.
    only : Selection
        The tokens that are counted.
    threads : int, optional
        For scans; default one a processor.
    """

    def __init__(self, folder: Path, only: Selection, threads: int | None = None) -> None:
        self.folder, self.only, self.threads = folder, only, threads
        self.progress: dict[tuple[str, str], tuple[int, int]] = {}
        """Shards that were read for a pair, and that are to be, in the scan that is at work."""
        self.known: dict[tuple[str, str], tuple[tuple[str, str], Future[dict[str, Any]]]] = {}
        self.lock, self.pool = threading.Lock(), ThreadPoolExecutor(1)

    def of(self, one: Shown, other: Shown) -> dict[str, Any] | None:
        """How two data sets compare; None while that is counted.

        Raises
        ------
        ValueError
            When they cannot be compared.
        """
        pair, digests = (one.view.dataset, other.view.dataset), (one.digest, other.digest)
        with self.lock:
            if pair not in self.known or self.known[pair][0] != digests:
                self.known[pair] = digests, self.pool.submit(self._compared, one, other)
            found = self.known[pair][1]
        try:
            return found.result(PATIENCE_S)
        except NotYet:
            return None

    def _compared(self, one: Shown, other: Shown) -> dict[str, Any]:
        refuse_incomparable({each.view.dataset: each.view.capture for each in (one, other)})
        if same_rows(one.view, other.view):
            try:
                return self._agreement(one, other)
            except OtherTokens:  # rows of the same lengths
                pass
        return self._contrast(one, other)

    def _ask(self, opened: xr.Dataset, reducers: Sequence[Reducer], shown: Sequence[Shown]) -> list[xr.Dataset]:
        """Answers of one data set, or of a pair."""
        name = shown[0].view.dataset
        about = [part for each in shown for part in (each.identity, each.view.now.state.digest)]
        report = lambda done, total: self.progress.__setitem__((name, shown[-1].view.dataset), (done, total))
        return answers(
            opened, reducers, self.folder, name, about, only=self.only, threads=self.threads, progress=report
        )

    def _agreement(self, one: Shown, other: Shown) -> dict[str, Any]:
        """Of equal tokens: how far they agree, and the effect where both recorded log-probabilities."""
        both = paired(one.view.capture, other.view.capture)
        measured = all("logprob" in each.view.capture for each in (one, other))
        found, *counted = self._ask(both, [Agreement(), *(effect_asked() if measured else [])], (one, other))
        return {
            "shows": "agreement",
            "tokens": found.attrs["n"],
            "any_difference": found.attrs["any_difference"],
            "layers": [
                {"layer": layer, **{name: float(found[name].sel(layer=layer)) for name in OF_AGREEMENT}}
                for layer in one.view.layers
            ],
            "chance": {name: found[name].attrs["null"] for name in OF_AGREEMENT},
            "effect": _effect(one.view, effect_of(counted)) if counted else None,
        }

    def _contrast(self, one: Shown, other: Shown) -> dict[str, Any]:
        """Of other tokens: which experts differ, which tokens carry that, and how well a document is told."""
        shown = {each.view.dataset: each for each in (one, other)}
        if not all(each.view.now.tokens for each in shown.values()):
            raise ValueError(f"nothing of {' or '.join(shown)} is indexed yet: they can be compared soon")
        counts = {name: each.profiles.choices_of_units for name, each in shown.items()}
        found = contrast_of(counts, threads=self.threads)
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
            **self._documents(shown),
        }

    def _documents(self, shown: dict[str, Shown]) -> dict[str, Any]:
        """How well documents are told, and those that look most like the other data set."""
        ask: Callable[[str, Reducer], xr.Dataset] = lambda name, reducer: self._ask(
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
            told.append(
                {"name": name, "right": float(found["right"][at]), "documents": own.sizes["document"], "odd": odd}
            )
        return {"told": told, "auc": float(found["auc"][0]), "why": ""}


def _effect(view: View, found: xr.Dataset) -> dict[str, Any]:
    """What predictions lose: in all, by token, and where."""
    worst, places = losing_tokens(found, TOKENS * 2).tolist(), []
    for effect, row, at in zip(*(found[name].values.tolist() for name in ("of_place", "row", "position")), strict=True):
        part = view.now.part_of(row)
        if part is not None:
            places.append(view.place(part, row, at) | {"effect": effect})
    return {
        **{name: float(found[name]) for name in ("effect", "low", "high", "p")},
        **{name: found.attrs[name] for name in ("n", "documents", "untested", "level")},
        "known": not math.isnan(float(found["p"])),
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
