"""One expert's profile: its load in every data set, its tokens and contexts, whom it works with, where it likes to be.

Promises: numbers are those of the metrics' own functions, over what is indexed, each with what chance gives beside it.
Does not know how it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from analysis.explorer.view import View
from analysis.metrics.choices import coactivation_of, transitions_of
from analysis.metrics.position import position_load_of
from analysis.metrics.tokens import TokenOrder
from analysis.scanning import Array
from analysis.statistics.jackknife import interval


class Profiles:
    """The profiles of a capture's experts; what all of them need is computed once.

    Parameters
    ----------
    view : View
        The capture.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        load = view.now.result("load")
        self.load = interval(load["share"], scale="share")
        self.mass = load["mass_share"].isel(replicate=0)
        choices = view.now.result("choices")
        self.together = coactivation_of(choices)
        self.moves = transitions_of(choices)
        self.position = position_load_of(view.now.result("position"))
        self.contexts = view.now.result("contexts") if "weight" in view.capture else None

    def expert(self, layer: int, expert: int, others: Sequence[Profiles] = ()) -> dict[str, Any]:
        """All about one expert; `others` are the data sets of the same model, this one included.

        Raises
        ------
        ValueError
            When there is no such layer or expert.
        """
        view = self.view
        if layer not in view.layers or not 0 <= expert < view.experts:
            raise ValueError(
                f"expert {expert} of layer {layer}: {view.dataset} has experts 0 to {view.experts - 1} at layers"
                f" {view.layers[0]} to {view.layers[-1]}"
            )
        even = 1 / view.experts
        loads = [each._load(layer, expert) for each in others or [self]]
        positions = self._positions(layer, expert)
        return {
            "layer": layer,
            "expert": expert,
            "even": even,
            "loads": loads,
            "most": max(even, *(each["estimate"] or 0 for each in loads)),
            "positions": positions,
            "most_at": max(even, *(each["share"] or 0 for each in positions)),
            "by_lift": self._tokens(layer, expert, "lift"),
            "by_count": self._tokens(layer, expert, "count"),
            "contexts": self._contexts(layer, expert),
            "together": self._together(layer, expert),
            **self._neighbours(layer, expert),
        }

    def _load(self, layer: int, expert: int) -> dict[str, Any]:
        own = self.load.sel(layer=layer, expert=expert)
        return {
            "dataset": self.view.dataset,
            **{name: _number(own[name]) for name in ("estimate", "low", "high")},
            "mass": _number(self.mass.sel(layer=layer, expert=expert)),
        }

    def _tokens(self, layer: int, expert: int, by: TokenOrder) -> list[dict[str, Any]]:
        """The first tokens."""
        found = self.view.top(layer, by).sel(expert=expert)
        columns = {name: found[name].values.tolist() for name in ("token_id", "counts", "tokens", "share", "lift")}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [row | {"text": self.view.texts[row["token_id"]]} for row in rows if row["token_id"] >= 0]

    def _contexts(self, layer: int, expert: int) -> list[dict[str, Any]] | None:
        """Where its weights are largest; None of routes that came without weights."""
        if self.contexts is None:
            return None
        found = self.contexts.sel(layer=layer, expert=expert)
        rows = []
        for row, position, weight in zip(*(found[name].values.tolist() for name in found), strict=True):
            part = self.view.now.part_of(row) if row >= 0 else None
            if part is not None:
                rows.append(self.view.place(part, row, position) | {"weight": weight})
        return rows

    def _together(self, layer: int, expert: int) -> dict[str, Any]:
        """Whom it works with: the other choices of its tokens."""
        own = self.together.sel(layer=layer, expert=expert)["probability"]
        return {
            "chance": self.together.attrs["null"],
            "experts": _ranked(own.values, leave_out=expert),
        }

    def _neighbours(self, layer: int, expert: int) -> dict[str, Any]:
        """Where its tokens come from, and where they go next: first choices."""
        at, view = self.view.layers.index(layer), self.view
        found: dict[str, Any] = {"comes_from": None, "goes_to": None}
        if at > 0:
            arriving = self.moves["counts"].isel(layer=at - 1).sel(next_expert=expert).values
            share = arriving / arriving.sum() if arriving.sum() else np.full(view.experts, np.nan)
            found["comes_from"] = {"layer": view.layers[at - 1], "experts": _ranked(share)}
        if at < len(view.layers) - 1:
            leaving = self.moves["probability"].isel(layer=at).sel(expert=expert).values
            found["goes_to"] = {"layer": view.layers[at + 1], "experts": _ranked(leaving)}
        return found

    def _positions(self, layer: int, expert: int) -> list[dict[str, Any]]:
        """Its share of the choices by range of positions, and of how many."""
        own = self.position["share"].sel(layer=layer, expert=expert)
        choices = self.position["counts"].sel(layer=layer).sum("expert").values.tolist()
        return [
            {"start": int(start), "share": _number(share), "choices": number}
            for start, share, number in zip(own["start"].values, own.values, choices, strict=True)
        ]


def _ranked(share: Array, leave_out: int | None = None) -> list[dict[str, Any]]:
    """Experts by their share, the largest first; those without one are left out."""
    order = np.argsort(-np.nan_to_num(share), kind="stable")
    return [{"expert": int(e), "share": float(share[e])} for e in order if share[e] > 0 and e != leave_out]


def _number(value: xr.DataArray | Array | float) -> float | None:
    """A float, or None where there is none."""
    number = float(value)
    return None if np.isnan(number) else number
