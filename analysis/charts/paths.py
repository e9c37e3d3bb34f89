"""All layers and experts as circles, and consecutive first choices as links.

A picture holds several ways: all tokens of each data set, and some single tokens. Its rows cover all of them, and it
shows one (`way`) at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from analysis.charts.theme import LINKS, Drawing, expert_axis, layer_step, layered, number, percent, rounded
from analysis.scanning import Array

CIRCLES = "circles"
MAX_LINKS, MAX_TOKEN_LINKS = 2_000, 150  # most links drawn, to keep the page small; arbitrary
SURE_BITS = 10.0  # of evidence for a link; by chance at most one in 2**10 reaches it (Chernoff bound)
STRONG_LINK = 0.5  # share of an expert's tokens at which a link is drawn in full strength; arbitrary


@dataclass(frozen=True, kw_only=True)
class Way:
    """First choices of some tokens, and how they follow each other."""

    counted: str
    """What was counted, in words: "tokens"."""
    n: int
    first: xr.DataArray
    """Counts (layer, expert)."""
    followed: xr.DataArray
    """Counts (lower layer, expert, next_expert)."""
    whole: bool = True
    """Whether it covers all tokens: then all circles and many links are drawn, otherwise only circles that links
    touch."""


def path_chart(ways: Sequence[Way]) -> tuple[Drawing, list[list[str]]]:
    """The picture of several ways through the layers of one model, and the subtitle of each.

    Parameters
    ----------
    ways : sequence of Way
        Ways over the same layers and experts; the drawing has the subtitle of the first one.

    Returns
    -------
    Drawing
        Links and circles, whose rows name their way by its index in `ways`.
    list of list of str
        The subtitle lines for each way.
    """
    layers = [int(layer) for layer in ways[0].first["layer"].values]
    experts, links, circles, subtitles = ways[0].first.sizes["expert"], [], [], []
    for index, way in enumerate(ways):
        own, sure = link_rows(way, MAX_LINKS if way.whole else MAX_TOKEN_LINKS)
        links += [{"way": index, **row} for row in own]
        circles += [{"way": index, **row} for row in circle_rows(way, own)]
        subtitles.append(
            [
                f"n = {way.n:,} {way.counted}, first choices; expected by chance: {number(100 / experts)}%",
                f"{len(own):,} of {sure:,} links clearly above chance; full strength from {_strong(experts):g}×",
            ]
        )
    chart = layered(
        _links(experts, layers),
        _circles(experts, layers),
        title=alt.Title("Paths: share of tokens relative to chance", subtitle=subtitles[0]),
        width="container",
        height=1.6 * layer_step(len(layers)) * len(layers),
        description="Transitions of first choices between neighbouring layers.",
    )
    return Drawing(chart, {LINKS: links, CIRCLES: circles}), subtitles


def link_rows(way: Way, most: int) -> tuple[list[dict[str, Any]], int]:
    """The links most clearly above chance, in reverse order for drawing, and the number of all links clearly above
    chance."""
    count = way.followed.transpose(..., "expert", "next_expert").values
    experts, layers = count.shape[-1], way.first["layer"].values
    bits = evidence(count)
    order = np.argsort(-bits, axis=None, kind="stable")  # ties by index
    order = order[bits.ravel()[order] >= SURE_BITS]
    share = count / np.maximum(count.sum(-1, keepdims=True), 1)
    places = zip(*np.unravel_index(order[:most][::-1], count.shape), strict=True)
    rows = [
        {
            "layer": int(layers[at]),
            "expert": int(here),
            "next_layer": int(layers[at + 1]),
            "next_expert": int(there),
            "tokens": int(count[at, here, there]),
            "share": percent(share[at, here, there]),
            "times_chance": rounded(experts * share[at, here, there]),
        }
        for at, here, there in places
    ]
    return rows, int(order.size)


def evidence(count: Array) -> Array:
    """The evidence that a transition is above chance, in bits; 0 if it is not above.

    Of the n tokens at an expert, x go to a given one of the E experts of the next layer. If their choices were even and
    independent, the probability of x or more would be at most 2 ** -(n · KL(x/n, 1/E)), which is Chernoff's bound; this
    function returns its exponent.

    Parameters
    ----------
    count : array, shape (..., expert, next_expert)
    """
    n, chance = count.sum(-1, keepdims=True).astype(float), 1 / count.shape[-1]
    share = count / np.maximum(n, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = [
            np.where(part > 0, part * np.log2(part / expected), 0.0)
            for part, expected in ((share, chance), (1 - share, 1 - chance))
        ]
    above: Array = np.where(share > chance, n * sum(bits), 0.0)
    return above


def circle_rows(way: Way, links: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The share of the first choices of each expert, or only of those that links touch."""
    first, layers = way.first.transpose("layer", "expert").values, way.first["layer"].values
    touched = {(row[f"{end}layer"], row[f"{end}expert"]) for row in links for end in ("", "next_")}
    return [
        {"layer": int(layer), "expert": expert, "first": percent(tokens / max(way.n, 1))}
        for at, layer in enumerate(layers)
        for expert, tokens in enumerate(first[at])
        if way.whole or (int(layer), expert) in touched
    ]


def _strong(experts: int) -> float:
    """The multiple of chance at which a link is drawn in full strength."""
    return max(2.0, STRONG_LINK * experts)


def _layer_axis(layers: Sequence[int]) -> alt.Y:
    return alt.Y("layer:O", title="layer").scale(domain=list(layers), type="point", padding=0.5)


def _links(experts: int, layers: Sequence[int]) -> alt.Chart:
    """A rule for each link: its strength shows how far above chance it is, its width how many tokens take it.

    Hovering over an expert leaves only the links to and from it.
    """
    touches = " || ".join(
        f"(datum.{of}layer == hovered.layer[0] && datum.{of}expert == hovered.expert[0])" for of in ("", "next_")
    )
    lit = f"!isValid(hovered.layer) || {touches}"
    ink = alt.Scale(domain=[1, _strong(experts)], range=[0.06, 0.95], clamp=True)
    chart: alt.Chart = (
        alt.Chart(alt.NamedData(name=LINKS), name=LINKS)
        .mark_rule(strokeCap="round", aria=False)
        .encode(
            x=expert_axis("expert", experts),
            x2="next_expert",
            y=_layer_axis(layers),
            y2="next_layer",
            opacity=alt.condition(lit, "times_chance:Q", alt.value(0.02), scale=ink, legend=None),
            strokeWidth=alt.StrokeWidth("tokens:Q", legend=None).scale(domainMin=0, range=[0.5, 5]),
            tooltip=[
                alt.Tooltip("layer:O"),
                alt.Tooltip("expert:O"),
                alt.Tooltip("next_layer:O", title="next layer"),
                alt.Tooltip("next_expert:O", title="next expert"),
                alt.Tooltip("share:Q", title="share of the expert's tokens, %"),
                alt.Tooltip("times_chance:Q", title="relative to chance"),
                alt.Tooltip("tokens:Q", format=","),
            ],
        )
    )
    return chart


def _circles(experts: int, layers: Sequence[int]) -> alt.Chart:
    """A circle for each expert; its size is the share of the first choices, up to eight times an even share."""
    hovered = alt.selection_point(name="hovered", on="pointerover", clear="pointerout", fields=["layer", "expert"])
    size = alt.Size("first:Q", legend=None).scale(
        domain=[0, 800 / experts], range=[4, 480 if experts <= 16 else 80], clamp=True
    )
    chart: alt.Chart = (
        alt.Chart(alt.NamedData(name=CIRCLES), name="experts")
        .mark_circle()
        .encode(
            x=expert_axis("expert", experts),
            y=_layer_axis(layers),
            size=size,
            tooltip=[
                alt.Tooltip("layer:O"),
                alt.Tooltip("expert:O"),
                alt.Tooltip("first:Q", title="share of first choices, %"),
            ],
        )
        .add_params(hovered)
    )
    return chart
