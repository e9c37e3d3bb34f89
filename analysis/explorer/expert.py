"""One expert's profile: its load in every data set, its tokens and contexts, the experts chosen together with it, and
its positions.

Promises: numbers come from the metrics' own functions, over what is indexed, each next to the value expected by chance.
Does not know how it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import xarray as xr

from analysis.explorer.excess import Excess
from analysis.explorer.similar import Similar
from analysis.explorer.summary import SURE, Set, summary
from analysis.explorer.view import TOP_TOKENS, View
from analysis.metrics.choices import coactivation_of, transitions_of
from analysis.metrics.load import share_of_experts
from analysis.metrics.token_contributions import contributions_of
from analysis.metrics.tokens import TokenOrder
from analysis.scanning import Array
from analysis.statistics.jackknife import interval

ELSEWHERE = 4  # places shown from each other data set (arbitrary)
SIDE_BY_SIDE = 6  # tokens shown for each data set in the table of all (arbitrary)


@dataclass(frozen=True)
class Alike:
    """Another data set whose experts can be shown next to those of this one."""

    profiles: Profiles
    differs: str
    """How its model differs, in words; empty if it does not."""


class Profiles:
    """The profiles of a capture's experts; what all of them share is computed once.

    Parameters
    ----------
    view : View
        The capture.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        load = view.now.result("load")
        self.share = load["share"]
        self.load = interval(self.share, scale="share")
        self._bounds: dict[int, tuple[Array, Array, Array]] = {}
        self.choices_of_units = load[["counts"]].sum("k").assign_attrs(load.attrs, experts_per_token=view.choices)
        self.mass = load["mass_share"].isel(replicate=0)
        choices = view.now.result("choices")
        self.together = coactivation_of(choices)
        self.moves = transitions_of(choices)
        position = view.now.result("position")
        self.position = position.assign(share=share_of_experts(position["counts"]))
        self.contexts = view.now.result("contexts") if "weight" in view.capture else None
        routes = view.now.result("sample")
        self.similar, self.excess = Similar(routes), Excess(view, routes)
        self.ranked: dict[int, tuple[list[View], xr.Dataset]] = {}

    def expert(self, layer: int, expert: int, alike: Sequence[Alike] = ()) -> dict[str, Any]:
        """Everything about one expert; `alike` are the other data sets whose experts can be shown next to it.

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
        even, others = 1 / view.experts, [each.profiles for each in alike if not each.differs]
        sets = [self._set(layer, expert), *(each.profiles._set(layer, expert, each.differs) for each in alike)]
        positions = self._positions(layer, expert)
        return {
            "layer": layer,
            "expert": expert,
            "even": even,
            "summary": self.summary(layer, expert, others),
            "sets": sets,
            "most": max(even, *(each["estimate"] or 0 for each in sets)),
            "positions": positions,
            "most_at": max(even, *(each["share"] or 0 for each in positions)),
            "by_lift": self._tokens(layer, expert, "lift"),
            "by_count": self._tokens(layer, expert, "count"),
            "against": self._against(layer, expert, [each.view for each in others]),
            "contexts": self.contexts_of(layer, expert),
            "elsewhere": [
                (each.view.dataset, found)
                for each in others
                if (found := each.contexts_of(layer, expert, ELSEWHERE)) and each is not self
            ],
            "together": self._together(layer, expert),
            "similar": self.similar.of(view.layers.index(layer), expert),
            "sampled": self.similar.expert.shape[1],
            **self._neighbours(layer, expert),
        }

    def summary(self, layer: int, expert: int, others: Sequence[Profiles]) -> Mapping[str, Any]:
        """What it does, in words."""
        sets = [each._busy(layer, expert, 1 + len(others)) for each in (self, *others)]
        reach = self.view.choices * sets[0].share
        classes, tokens = self.excess.kinds(layer, expert)
        return summary(sets[0], reach, classes, tokens, sets[1:])

    def _busy(self, layer: int, expert: int, sets: int) -> Set:
        """Its share, with an interval that holds simultaneously for all experts and layers of so many data sets."""
        at = self.view.layers.index(layer), expert
        return Set(self.view.dataset, *(float(found[at]) for found in self.bounds(sets)))

    def bounds(self, sets: int) -> tuple[Array, Array, Array]:
        """Shares of the choices (layer, expert), and the ends of intervals that hold simultaneously for all experts and
        layers of so many data sets."""
        if sets not in self._bounds:
            level = 1 - SURE / (sets * len(self.view.layers) * self.view.experts)
            found = interval(self.share, level, scale="share")
            one, other, last = (found[name].values for name in ("estimate", "low", "high"))
            self._bounds[sets] = one, other, last
        return self._bounds[sets]

    def _against(self, layer: int, expert: int, others: list[View]) -> dict[str, Any] | None:
        """The tokens that explain why its share differs from that in the other data sets together; None without
        others."""
        if not others:
            return None
        if layer not in self.ranked or self.ranked[layer][0] != others:
            self.ranked[layer] = others, contributions(self.view, others, self.view.layers.index(layer))
        found = self.ranked[layer][1].sel(expert=expert)
        names = ("token_id", "contribution", "token_usage", "token_routing")
        rows = [
            dict(zip(names, row, strict=True))
            for row in zip(*(found[name].values.tolist() for name in names), strict=True)
        ]
        return {
            **{name: float(found[name]) for name in ("difference", "usage", "routing")},
            "names": [other.dataset for other in others],
            "rows": [row | {"text": self.view.texts[row["token_id"]]} for row in rows if row["token_id"] >= 0],
        }

    def _set(self, layer: int, expert: int, differs: str = "") -> dict[str, Any]:
        """Its row in the table of all data sets."""
        own = self.load.sel(layer=layer, expert=expert)
        return {
            "dataset": self.view.dataset,
            "differs": differs,
            "tokens": self._tokens(layer, expert, "lift")[:SIDE_BY_SIDE],
            **{name: _number(own[name]) for name in ("estimate", "low", "high")},
            "mass": _number(self.mass.sel(layer=layer, expert=expert)),
        }

    def _tokens(self, layer: int, expert: int, by: TokenOrder) -> list[dict[str, Any]]:
        """The first tokens."""
        found = self.view.top(layer, by).sel(expert=expert)
        columns = {name: found[name].values.tolist() for name in ("token_id", "counts", "tokens", "share", "lift")}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [row | {"text": self.view.texts[row["token_id"]]} for row in rows if row["token_id"] >= 0]

    def contexts_of(self, layer: int, expert: int, most: int | None = None) -> list[dict[str, Any]] | None:
        """Where its weights are largest, each token shaded by its weight; None if routes were imported without
        weights."""
        if self.contexts is None:
            return None
        found = self.contexts.sel(layer=layer, expert=expert)
        shares = found["around"].values.astype(float)
        shares = np.nan_to_num(shares / (shares.max(initial=0) or 1)).clip(0)
        columns = (found[name].values.tolist() for name in ("row", "position", "weight"))
        rows = []
        for row, position, weight, own in zip(*columns, shares, strict=True):
            part = self.view.now.part_of(row) if row >= 0 else None
            if part is not None:
                rows.append(self.view.place(part, row, position, own) | {"weight": weight})
        return rows[:most]

    def _together(self, layer: int, expert: int) -> dict[str, Any]:
        """Experts chosen together with it: the other choices of its tokens."""
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
        """Its share of the choices by range of positions, and the number of choices."""
        own = self.position["share"].sel(layer=layer, expert=expert)
        choices = self.position["counts"].sel(layer=layer).sum("expert").values.tolist()
        return [
            {"start": int(start), "share": _number(share), "choices": number}
            for start, share, number in zip(own["start"].values, own.values, choices, strict=True)
        ]


def contributions(one: View, others: Sequence[View], at: int, top: int = TOP_TOKENS) -> xr.Dataset:
    """The tokens that explain why the shares of a layer's experts (layer by index) differ from those in other data
    sets."""
    mine, theirs = (
        xr.Dataset(
            {
                "counts": (("token_id", "expert"), reduce(np.add, [view.table(at) for view in views])),
                "tokens": ("token_id", reduce(np.add, [view.token_counts for view in views])),
            }
        )
        for views in ([one], others)
    )
    return contributions_of(mine, theirs, np.array(one.pieces, object), top)


def _ranked(share: Array, leave_out: int | None = None) -> list[dict[str, Any]]:
    """Experts by their share, the largest first; experts without a share are left out."""
    order = np.argsort(-np.nan_to_num(share), kind="stable")
    return [{"expert": int(e), "share": float(share[e])} for e in order if share[e] > 0 and e != leave_out]


def _number(value: xr.DataArray | Array | float) -> float | None:
    """A float, or None for NaN."""
    number = float(value)
    return None if np.isnan(number) else number
