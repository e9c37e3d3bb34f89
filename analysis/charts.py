"""Charts of the metrics: one function a chart, from a labelled Dataset to an Altair chart, and one theme.

Promises: every title states the quantity and its unit, every subtitle n and the null; colours are safe for
colour-blind readers and name roles ("diverging", "ramp"), so that `theme` alone decides light or dark; the marks
that carry the numbers are named (`CELLS`, `LINKS`, `TOKENS`, `POINTS`), one a row of the chart's data. No files, no
network. Does not know stores: it draws what the metrics return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

# Names of the marks that carry a chart's numbers.
CELLS, LINKS, TOKENS, POINTS = "cells", "links", "tokens", "points"
MAX_LINKS = 2_000  # drawn links a chart: the page stays small and fast; arbitrary
STRONG_LINK = 0.5  # share of an expert's tokens at which a link is drawn in full strength; arbitrary
STRONG_LIFT = 8.0  # lift at which a token is coloured in full strength; arbitrary
_SMALL_SPREAD = 0.25  # load deviations up to a quarter of the even share stay pale; arbitrary

_QUIET = "#8a93a3"  # what chance gives: seen on both grounds, and no data set's colour
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# Blue to orange through the page's own paper: told apart with any colour vision.
_LIGHT: Mapping[str, Any] = {
    "ink": "#1d2129",
    "soft": "#5b6472",
    "line": "#d7dbe2",
    "accent": "#b4530a",
    "diverging": ["#1f5fa8", "#6aa0d8", "#c3d9ef", "#f3f2ef", "#f6cfa3", "#e08a35", "#a8480a"],
    "ramp": ["#f3f2ef", "#f6cfa3", "#e9a75c"],
    "category": ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5b6472", "#7b3294"],
}
_DARK: Mapping[str, Any] = {
    "ink": "#e8eaee",
    "soft": "#a3acba",
    "line": "#3a4150",
    "accent": "#f2a14e",
    "diverging": ["#8cc4ff", "#4d8fd6", "#2c5079", "#252a34", "#72471d", "#c77a2a", "#ffbe73"],
    "ramp": ["#252a34", "#553a20", "#875520"],
    "category": ["#56b4e9", "#f0903c", "#2ec49a", "#e29cc4", "#e6c229", "#a3c9ff", "#a3acba", "#c39bd3"],
}


def theme(dark: bool = False) -> dict[str, Any]:
    """Vega-Lite's `config` for all charts, on a light or a dark ground.

    Returns
    -------
    dict
        A configuration for `alt.theme.ThemeConfig` or a specification's `config`.
    """
    colour = _DARK if dark else _LIGHT
    quiet = {"labelColor": colour["soft"], "titleColor": colour["soft"], "titleFontWeight": "normal"}
    return {
        "font": _FONT,
        "background": "transparent",
        "view": {"stroke": None},
        "padding": {"left": 0, "right": 4, "top": 4, "bottom": 6},
        "title": {
            "anchor": "start",
            "frame": "group",
            "fontSize": 14,
            "fontWeight": 600,
            "color": colour["ink"],
            "subtitleColor": colour["soft"],
            "subtitleFontSize": 12,
            "subtitlePadding": 5,
            "offset": 10,
        },
        "axis": {
            **quiet,
            "domain": False,
            "ticks": False,
            "grid": False,
            "labelPadding": 6,
            "labelFontSize": 11,
            "titleFontSize": 12,
            "titlePadding": 8,
        },
        "legend": {**quiet, "labelFontSize": 11, "titleFontSize": 11, "titleLimit": 400, "gradientThickness": 8},
        "rect": {"stroke": None},
        "rule": {"color": colour["accent"]},
        "circle": {"color": colour["ink"], "opacity": 1},
        "text": {"color": colour["ink"], "fontSize": 12},
        "range": {name: colour[name] for name in ("diverging", "ramp", "category")} | {"heatmap": colour["ramp"]},
    }


@alt.theme.register("expert_atlas", enable=True)
def _light() -> alt.theme.ThemeConfig:
    return alt.theme.ThemeConfig(config=theme())  # type: ignore[typeddict-item]


def visible(text: str) -> str:
    r"""Text with what cannot be seen (controls, line separators, direction marks, surrogates) as `\uXXXX`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def load_heatmap(load: xr.Dataset, *, spread: float | None = None) -> alt.Chart:
    """Share of choices by layer and expert, coloured by its distance from the even share.

    Parameters
    ----------
    load : xr.Dataset
        From `analysis.load.expert_load`.
    spread : float, optional
        Distance from the even share (in the unit of `share`) that has the full colour; give one value for
        charts that lie side by side. Default: this load's own, see `load_spread`.
    """
    null, n = load.attrs["null"], load.attrs["n"]
    spread = load_spread(load) if spread is None else spread
    tokens = load["count"].sum("k").transpose("layer", "expert").values
    share, weight = (load[name].transpose("layer", "expert").values for name in ("share", "mass_share"))
    rows = [
        {
            "layer": int(layer),
            "expert": int(expert),
            "tokens": int(tokens[at, e]),
            "share": _percent(share[at, e]),
            "weight": _percent(weight[at, e]),
        }
        for at, layer in enumerate(load["layer"].values)
        for e, expert in enumerate(load["expert"].values)
    ]
    domain = [100 * max(0.0, null - spread), 100 * null, 100 * (null + spread)]
    return _heat_map(
        rows,
        alt.Color("share:Q", title="share of choices, %"),
        domain,
        [
            alt.Tooltip("share:Q", title="share of choices, %"),
            alt.Tooltip("weight:Q", title="share of gate weight, %"),
            alt.Tooltip("tokens:Q", format=","),
        ],
        load,
        title="Load: share of choices, %",
        subtitle=f"n = {n:,} tokens; even share {_number(100 * null)} % is neutral",
        description=f"Heat map of the share of choices of each expert at each layer, {n} tokens.",
    )


def load_spread(*loads: xr.Dataset) -> float:
    """A common colour range for loads: their largest distance from the even share, a quarter of it at least."""
    spreads: list[float] = [_SMALL_SPREAD * load.attrs["null"] for load in loads]
    for load in loads:
        distance = abs(load["share"] - load.attrs["null"]).values
        spreads.append(float(np.nanmax(distance, initial=0.0)))
    return max(spreads)


def path_chart(moves: xr.Dataset, load: xr.Dataset) -> alt.LayerChart:
    """All layers and experts as circles, the first-choice transitions above chance as links.

    Parameters
    ----------
    moves : xr.Dataset
        From `analysis.choices.transitions`, of at least two layers.
    load : xr.Dataset
        From `analysis.load.expert_load` of the same capture: first choices size the circles.
    """
    links, above = link_rows(moves)
    n, null = moves.attrs["n"], moves.attrs["null"]
    first = load["count"].isel(k=0).transpose("layer", "expert").values
    circles = [
        {
            "layer": int(layer),
            "expert": int(expert),
            "first": _percent(first[at, e] / max(n, 1)),
        }
        for at, layer in enumerate(load["layer"].values)
        for e, expert in enumerate(load["expert"].values)
    ]
    layers = [int(number) for number in load["layer"].values]
    x = _experts("expert", load.sizes["expert"])
    y = alt.Y("layer:O", title="layer").scale(domain=layers, type="point", padding=0.5)
    strong = max(2.0, STRONG_LINK / null)
    strength = alt.Scale(domain=[1, strong], range=[0.04, 0.95], clamp=True)
    width = alt.Scale(domain=[1, strong], range=[0.6, 3], clamp=True)
    # Hovering an expert leaves the links that come to it or go from it.
    hovered = alt.selection_point(name="hovered", on="pointerover", clear="pointerout", fields=["layer", "expert"])
    touches = " || ".join(
        f"(datum.{of}layer == hovered.layer[0] && datum.{of}expert == hovered.expert[0])" for of in ("", "next_")
    )
    lit = f"!isValid(hovered.layer) || {touches}"
    rules = (
        alt.Chart(alt.InlineData(values=links), name=LINKS)
        .mark_rule(strokeCap="round", aria=False)
        .encode(
            x=x,
            x2="next_expert",
            y=y,
            y2="next_layer",
            opacity=alt.condition(lit, "times_chance:Q", alt.value(0.02), scale=strength, legend=None),
            strokeWidth=alt.StrokeWidth("times_chance:Q", scale=width, legend=None),
            tooltip=[
                alt.Tooltip("layer:O"),
                alt.Tooltip("expert:O"),
                alt.Tooltip("next_layer:O", title="next layer"),
                alt.Tooltip("next_expert:O", title="next expert"),
                alt.Tooltip("share:Q", title="share of the expert's tokens, %"),
                alt.Tooltip("times_chance:Q", title="times chance"),
                alt.Tooltip("tokens:Q", format=","),
            ],
        )
    )
    area = 220 if load.sizes["expert"] <= 16 else 60
    points = (
        alt.Chart(alt.InlineData(values=circles), name="experts")
        .mark_circle()
        .encode(
            x=x,
            y=y,
            size=alt.Size("first:Q", legend=None).scale(domain=[0, 300 / load.sizes["expert"]], range=[4, area]),
            tooltip=[
                alt.Tooltip("layer:O"),
                alt.Tooltip("expert:O"),
                alt.Tooltip("first:Q", title="share of first choices, %"),
            ],
        )
        .add_params(hovered)
    )
    chart = alt.layer(rules, points).properties(
        title=alt.Title(
            "Paths: share of tokens, times chance",
            subtitle=[
                f"n = {n:,} tokens, first choices; chance is {_number(100 * null)} %",
                f"{len(links):,} of {above:,} links above chance; full ink from {strong:g}×",
            ],
        ),
        width="container",
        height=1.6 * _step(len(layers)) * len(layers),
        description=f"Transitions of first choices between neighbouring layers, {n} tokens.",
    )
    assert isinstance(chart, alt.LayerChart)  # altair's annotation allows a facet, which these properties do not make
    return chart


def link_rows(moves: xr.Dataset) -> tuple[list[dict[str, Any]], int]:
    """The strongest links above chance, at most `MAX_LINKS`, and how many are above chance in all."""
    times = (moves["probability"] / moves.attrs["null"]).fillna(0).values
    # Ordered by strength, equals by place; drawn weakest first, so that the strong ones lie on top.
    order = np.argsort(-times, axis=None, kind="stable")
    order = order[times.ravel()[order] > 1]
    drawn = order[:MAX_LINKS][::-1]
    places = zip(*np.unravel_index(drawn, times.shape), strict=True)
    layer, next_layer, count = (moves[name].values for name in ("layer", "next_layer", "count"))
    rows = [
        {
            "layer": int(layer[at]),
            "expert": int(here),
            "next_layer": int(next_layer[at]),
            "next_expert": int(there),
            "tokens": int(count[at, here, there]),
            "share": _percent(times[at, here, there] * moves.attrs["null"]),
            "times_chance": _round(times[at, here, there]),
        }
        for at, here, there in places
    ]
    return rows, order.size


def token_chart(tokens: xr.Dataset) -> alt.LayerChart:
    """The first tokens of each expert at one layer, coloured by lift; parameter `layer` chooses the layer.

    Parameters
    ----------
    tokens : xr.Dataset
        From `analysis.tokens.expert_tokens`, with a `layer` dimension of at least one.
    """
    names = ("token_id", "piece", "tokens", "share", "lift")
    values = {name: tokens[name].transpose("layer", "expert", "rank").values for name in names}
    rows = [
        {
            "layer": int(tokens["layer"].values[at]),
            "expert": int(expert),
            "rank": int(rank) + 1,
            "piece": visible(str(values["piece"][at, expert, rank])),
            "tokens": int(values["tokens"][at, expert, rank]),
            "share": _percent(values["share"][at, expert, rank]),
            "lift": _round(float(values["lift"][at, expert, rank])),
        }
        for at, expert, rank in np.argwhere(values["token_id"] >= 0)  # in the order layer, expert, rank
    ]
    layer = alt.param(name="layer", value=int(tokens["layer"][0]))
    base = (
        alt.Chart(alt.InlineData(values=rows))
        .transform_filter("datum.layer == layer")
        .encode(
            x=alt.X("rank:O", title="rank").axis(labelAngle=0).scale(paddingInner=0.04),
            y=alt.Y("expert:O", title="expert").scale(paddingInner=0.1),
            tooltip=[
                alt.Tooltip("piece:N", title="token"),
                alt.Tooltip("expert:O"),
                alt.Tooltip("share:Q", title="share of its occurrences, %"),
                alt.Tooltip("lift:Q", title="times chance"),
                alt.Tooltip("tokens:Q", title="occurrences", format=","),
            ],
        )
    )
    colour = (
        alt.Color("lift:Q", title="times as often as the average token")
        .scale(
            type="log",
            domain=[1, STRONG_LIFT],
            range="ramp",
            interpolate="rgb",
            clamp=True,
        )
        .legend(orient="bottom", values=[1, 2, 4, 8], gradientLength=180)
    )
    tiles = base.mark_rect(cornerRadius=3, aria=False).encode(color=colour)
    words = base.mark_text(limit=66, fontSize=11).encode(text="piece:N").properties(name=TOKENS)
    order, least = tokens.attrs["order"], tokens.attrs["min_count"]
    chart = (
        alt.layer(tiles, words)
        .add_params(layer)
        .properties(
            title=alt.Title(
                "Tokens: lift, times the average",
                subtitle=[f"n = {tokens.attrs['n']:,} tokens", f"ordered by {order}, of those seen {least}+ times"],
            ),
            width="container",
            height=24 * tokens.sizes["expert"],
            description="The first tokens of each expert at one layer.",
        )
    )
    assert isinstance(chart, alt.LayerChart)
    return chart


def layer_lines(
    values: Mapping[str, xr.DataArray],
    *,
    title: str,
    subtitle: Sequence[str],
    unit: str,
    null: float | None = None,
    by_chance: Mapping[str, xr.DataArray] | None = None,
    interval: Mapping[str, tuple[xr.DataArray, xr.DataArray]] | None = None,
) -> alt.LayerChart:
    """One number a layer, a line for each data set.

    Parameters
    ----------
    values : mapping of str to xr.DataArray
        Over `layer`, by data set.
    title, subtitle, unit : str
        What the number is; n and the null; the unit on the axis.
    null : float, optional
        What there would be by chance, at every layer: a dashed rule.
    by_chance : mapping of str to xr.DataArray, optional
        The same by layer and data set: dashed lines.
    interval : mapping of str to pair of xr.DataArray, optional
        Ends by layer and data set: bands.
    """
    rows: list[dict[str, Any]] = []
    for label, series in values.items():
        for at, layer in enumerate(series["layer"].values):
            row = {"data_set": visible(label), "layer": int(layer), "value": _round(float(series.values[at]))}
            if by_chance is not None:
                row["by_chance"] = _round(float(by_chance[label].values[at]))
            if interval is not None:
                row |= {
                    end: _round(float(of.values[at])) for end, of in zip(("low", "high"), interval[label], strict=True)
                }
            rows.append(row)
    layers = sorted({row["layer"] for row in rows})
    x = (
        alt.X("layer:O", title="layer")
        .scale(domain=layers, type="point", padding=0.5)
        .axis(labelAngle=0, values=layers[:: -(-len(layers) // 16)])
    )
    legend = alt.Legend(orient="bottom", title=None) if len(values) > 1 else None
    colour = alt.Color(
        "data_set:N", sort=[visible(label) for label in values], scale=alt.Scale(range="category"), legend=legend
    )
    tooltip = [alt.Tooltip("data_set:N", title="data set"), alt.Tooltip("layer:O")]
    tooltip += [
        alt.Tooltip(f"{name}:Q", title=told)
        for name, told in {"value": unit, "by_chance": "by chance", "low": "95 % from", "high": "to"}.items()
        if any(name in row for row in rows)
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(x=x, color=colour)
    y = alt.Y("value:Q", title=unit).scale(zero=False)
    drawn = [base.mark_circle(size=45).encode(y=y, tooltip=tooltip).properties(name=POINTS)]
    drawn.append(base.mark_line(strokeWidth=1.8, aria=False).encode(y=y))
    if interval is not None:
        drawn.append(base.mark_area(opacity=0.15, aria=False).encode(y=alt.Y("low:Q", title=unit), y2="high:Q"))
    if by_chance is not None:
        dashed = base.mark_line(strokeWidth=1.2, strokeDash=[4, 3], aria=False)
        drawn.append(dashed.encode(y=alt.Y("by_chance:Q", title=unit)))
    if null is not None:
        rule = alt.Chart(alt.InlineData(values=[{"null": null}])).mark_rule(strokeDash=[4, 3], color=_QUIET, aria=False)
        drawn.append(rule.encode(y=alt.Y("null:Q", title=unit)))
    chart = alt.layer(*drawn).properties(
        title=alt.Title(title, subtitle=list(subtitle)),
        width="container",
        height=210,
        description=f"{title}, by layer.",
    )
    assert isinstance(chart, alt.LayerChart)
    return chart


def contrast_heatmap(apart: xr.Dataset, data_set: str, *, spread: float) -> alt.Chart:
    """By how much more of a data set's tokens reach each expert than of the others'; pale where that may be chance.

    Parameters
    ----------
    apart : xr.Dataset
        From `analysis.contrast.contrast`.
    data_set : str
        One of its data sets.
    spread : float
        Difference of full colour, as a share of tokens.
    """
    own = apart.sel(data_set=data_set).drop_dims("other_data_set").transpose("layer", "expert")
    names = ("share", "difference", "difference_low", "difference_high")
    values = {name: own[name].values for name in names} | {"q": own["difference_q"].values}
    rows = [
        {
            "layer": int(layer),
            "expert": int(expert),
            **{name: _percent(values[name][at, e]) for name in names},
            "q": _round(float(values["q"][at, e])),
        }
        for at, layer in enumerate(own["layer"].values)
        for e, expert in enumerate(own["expert"].values)
    ]
    domain = [-100 * spread, 0, 100 * spread]
    n = apart.attrs["documents"][data_set]
    chart = _heat_map(
        rows,
        alt.Color("difference:Q", title="more than the others, points"),
        domain,
        [
            alt.Tooltip("share:Q", title="of its tokens, %"),
            alt.Tooltip("difference:Q", title="more than the others, points"),
            alt.Tooltip("difference_low:Q", title="95 % from"),
            alt.Tooltip("difference_high:Q", title="to"),
            alt.Tooltip("q:Q", title="q by shuffling"),
        ],
        own,
        title="Tokens that reach the expert, difference in points",
        subtitle=f"n = {n:,} documents; 0 is neutral, pale where q > 0.05",
        description=f"Heat map of how many more tokens of {visible(data_set)} reach each expert.",
    )
    return chart.encode(opacity=alt.condition("datum.q <= 0.05", alt.value(1), alt.value(0.3)))


def _heat_map(
    rows: Sequence[Mapping[str, Any]],
    colour: alt.Color,
    domain: Sequence[float],
    tooltip: Sequence[alt.Tooltip],
    shape: xr.Dataset,
    *,
    title: str,
    subtitle: str,
    description: str,
) -> alt.Chart:
    """A cell for each layer and expert of `shape`; the middle of the domain is neutral."""
    scaled = colour.scale(
        domain=domain,
        range="diverging",
        interpolate="rgb",  # the default goes through green and maroon, which would look like a third kind
        clamp=True,
    )
    chart: alt.Chart = (
        alt.Chart(alt.InlineData(values=rows), name=CELLS)
        .mark_rect(cornerRadius=2)
        .encode(
            x=_experts("expert", shape.sizes["expert"]),
            y=alt.Y("layer:O", title="layer").scale(paddingInner=0.08),
            color=scaled.legend(orient="bottom", format=".3~g", values=domain, gradientLength=180),
            tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("expert:O"), *tooltip],
        )
        .properties(
            title=alt.Title(title, subtitle=[subtitle]),
            width="container",
            height=_step(shape.sizes["layer"]) * shape.sizes["layer"],
            description=description,
        )
    )
    return chart


def cache_chart(caches: Mapping[str, xr.Dataset]) -> alt.LayerChart:
    """Hit rate by cache size, mean over layers.

    Parameters
    ----------
    caches : mapping of str to xr.Dataset
        From `analysis.caching.cache_hits`, by data set.
    """
    rows = [
        {
            "data_set": visible(label),
            "policy": str(policy),
            "cache_size": int(size),
            "hit_rate": _percent(found["hit_rate"].sel(policy=policy, cache_size=size).mean()),
            "by_chance": _percent(found["null"].sel(policy=policy, cache_size=size)),
        }
        for label, found in caches.items()
        for policy in found["policy"].values
        for size in found["cache_size"].values
    ]
    base = alt.Chart(alt.InlineData(values=rows)).encode(
        x=alt.X("cache_size:O", title="experts of a layer that the cache holds").axis(labelAngle=0),
        color=alt.Color(
            "data_set:N", sort=[visible(label) for label in caches], scale=alt.Scale(range="category")
        ).legend(orient="bottom", title=None),
    )
    y = alt.Y("hit_rate:Q", title="hit rate, %")
    shape = alt.Shape("policy:N").legend(orient="bottom", title="policy")
    tooltip = ["data_set:N", "policy:N", "cache_size:O", "hit_rate:Q", "by_chance:Q"]
    points = base.mark_point(size=60, filled=True).encode(y=y, shape=shape, tooltip=tooltip).properties(name=POINTS)
    lines = base.mark_line(strokeWidth=1.6, aria=False).encode(y=y, detail="policy:N")
    chance = base.mark_line(strokeWidth=1.2, strokeDash=[4, 3], aria=False).encode(
        y=alt.Y("by_chance:Q", title="hit rate, %"), detail="policy:N"
    )
    n = sum(found.attrs["n"] for found in caches.values())
    chart = alt.layer(points, lines, chance).properties(
        title=alt.Title(
            "Expert cache: hit rate, %", subtitle=[f"n = {n:,} tokens; dashed: uniform independent routing"]
        ),
        width="container",
        height=240,
        description="Hit rate of expert caches by size, mean over layers.",
    )
    assert isinstance(chart, alt.LayerChart)
    return chart


def _experts(field: str, num_experts: int) -> alt.X:
    """The axis of experts: every number when they fit, else every eighth."""
    axis = alt.Axis(labelAngle=0, orient="top")
    if num_experts > 16:
        axis = alt.Axis(labelAngle=0, orient="top", values=list(range(0, num_experts, 8)))
    return alt.X(f"{field}:O", title="expert", axis=axis).scale(domain=list(range(num_experts)), paddingInner=0.04)


def _step(num_layers: int) -> int:
    """Pixels a layer: few layers get room, many stay on a screen."""
    return int(np.clip(520 / max(num_layers, 1), 15, 34))


def _percent(share: Any) -> float | None:
    return _round(100 * float(share))


def _round(value: float) -> float | None:
    """Four significant digits, None for what is undefined: what a reader and a small page need."""
    return None if np.isnan(value) else float(f"{value:.4g}")


def _number(value: float) -> str:
    return f"{value:.3g}"
