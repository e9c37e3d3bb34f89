"""Heat maps over layers: load, how data sets differ, repetition in time. The middle of the colour scale is the null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from analysis.charts.theme import (
    CELLS,
    Drawing,
    Rows,
    expert_axis,
    layer_step,
    layered,
    number,
    percent,
    rounded,
    visible,
)

SURE = "datum.p <= 0.05"
PALE = 0.3  # opacity of a cell that may be chance (arbitrary)
_FEW_COLUMNS, _FEW_CELLS = 16, 256  # up to this many, cells have room for numbers
_SMALL_SPREAD = 0.25  # load deviations up to a quarter of the even share stay pale; arbitrary


def load_heatmap(load: xr.Dataset, ends: xr.Dataset, *, spread: float | None = None) -> Drawing:
    """Share of choices by layer and expert, coloured by its distance from the even share.

    Parameters
    ----------
    load : xr.Dataset
        From `analysis.metrics.load.expert_load`.
    ends : xr.Dataset
        `low` and `high` of the shares (layer, expert), from `analysis.interval`.
    spread : float, optional
        Distance from the even share (in the unit of `share`) that has the full colour; pass one value for charts shown
        side by side. Default: this load's own, see `load_spread`.
    """
    null, n = load.attrs["null"], load.attrs["n"]
    spread = load_spread(load) if spread is None else spread
    tokens = load["counts"].sum("k").transpose("layer", "expert").values
    share, weight = (load[name].transpose("layer", "expert").values for name in ("share", "mass_share"))
    low, high = (ends[name].transpose("layer", "expert").values for name in ("low", "high"))
    rows = [
        {
            "layer": int(layer),
            "expert": int(expert),
            "tokens": int(tokens[at, e]),
            "share": percent(share[at, e]),
            "low": percent(low[at, e]),
            "high": percent(high[at, e]),
            "weight": percent(weight[at, e]),
        }
        for at, layer in enumerate(load["layer"].values)
        for e, expert in enumerate(load["expert"].values)
    ]
    return _heat_map(
        rows,
        expert_axis("expert", load.sizes["expert"]),
        alt.Color("share:Q", title="share of choices, %"),
        [100 * max(0.0, null - spread), 100 * null, 100 * (null + spread)],
        [
            alt.Tooltip("expert:O"),
            alt.Tooltip("share:Q", title="share of choices, %"),
            alt.Tooltip("low:Q", title="95% from"),
            alt.Tooltip("high:Q", title="to"),
            alt.Tooltip("weight:Q", title="share of gate weight, %"),
            alt.Tooltip("tokens:Q", format=","),
        ],
        load.sizes["layer"],
        title="Load: share of choices, %",
        subtitle=f"n = {n:,} tokens; an even share, {number(100 * null)}%, is neutral",
        description=f"Heat map of the share of choices of each expert at each layer, {n} tokens.",
    )


def load_spread(*loads: xr.Dataset) -> float:
    """A common colour range for loads: their largest distance from the even share, at least a quarter of it."""
    spreads: list[float] = [_SMALL_SPREAD * load.attrs["null"] for load in loads]
    for load in loads:
        distance = abs(load["share"] - load.attrs["null"]).values
        spreads.append(float(np.nanmax(distance, initial=0.0)))
    return max(spreads)


def contrast_heatmap(apart: xr.Dataset, data_set: str, *, spread: float) -> Drawing:
    """How many more of a data set's tokens choose each expert than of the others'; pale if that may be chance.

    Parameters
    ----------
    apart : xr.Dataset
        From `analysis.metrics.contrast.contrast`.
    data_set : str
        One of its data sets.
    spread : float
        Difference of full colour, as a share of tokens.
    """
    own = apart.sel(data_set=data_set).drop_dims("other_data_set").transpose("layer", "expert")
    names = ("share", "difference", "difference_low", "difference_high")
    values = {name: own[name].values for name in names} | {"p": own["difference_p"].values}
    rows = [
        {
            "layer": int(layer),
            "expert": int(expert),
            **{name: percent(values[name][at, e]) for name in names},
            "p": rounded(values["p"][at, e]),
        }
        for at, layer in enumerate(own["layer"].values)
        for e, expert in enumerate(own["expert"].values)
    ]
    return _heat_map(
        rows,
        expert_axis("expert", own.sizes["expert"]),
        alt.Color("difference:Q", title="difference from the others, percentage points"),
        [-100 * spread, 0, 100 * spread],
        [
            alt.Tooltip("expert:O"),
            alt.Tooltip("share:Q", title="share of its tokens, %"),
            alt.Tooltip("difference:Q", title="difference from the others, percentage points"),
            alt.Tooltip("difference_low:Q", title="95% from"),
            alt.Tooltip("difference_high:Q", title="to"),
            alt.Tooltip("p:Q", title="p, corrected for all cells"),
        ],
        own.sizes["layer"],
        title="Difference in the share of tokens that choose the expert, percentage points",
        subtitle=f"n = {apart.attrs['documents'][data_set]:,} documents; 0 is neutral, pale if p > 0.05",
        description=f"Heat map of how many more tokens of {visible(data_set)} choose each expert.",
        sure=SURE,
    )


def saliency_heatmap(found: xr.Dataset) -> Drawing:
    """Mean weight × output norm by layer and expert, coloured by its distance from the mean of the layer's choices.

    Parameters
    ----------
    found : xr.Dataset
        From `analysis.metrics.saliency.saliency`.
    """
    total, tokens = found["total_saliency"].sum("expert"), found["tokens"].sum("expert")
    times = found["mean_saliency"] / (total / tokens.where(tokens > 0)).where(total > 0)
    columns = {"times": times, **{title: found[name] for title, (name, _) in _OF_SALIENCY.items()}}
    return _heat_map(
        _cells(columns, found),
        expert_axis("expert", found.sizes["expert"]),
        alt.Color("times:Q", title="relative to the layer's mean"),
        [0, 1, 2],
        [
            alt.Tooltip("expert:O"),
            alt.Tooltip("times:Q", title="relative to the layer's mean"),
            *(alt.Tooltip(f"{name}:Q", title=title, format=",") for name, (_, title) in _OF_SALIENCY.items()),
        ],
        found.sizes["layer"],
        title="Saliency: mean of weight × output norm",
        subtitle=f"n = {found.attrs['n']:,} tokens; the layer's mean is neutral",
        description="Heat map of how much each expert contributes at each layer, relative to the layer's mean.",
    )


_OF_SALIENCY = {
    "saliency": ("mean_saliency", "mean saliency"),
    "low": ("mean_saliency_low", "95% from"),
    "high": ("mean_saliency_high", "to"),
    "largest": ("largest_saliency", "largest"),
    "norm": ("largest_norm", "largest norm"),
    "tokens": ("tokens", "tokens"),
}


def logprob_heatmap(found: xr.Dataset, *, spread: float) -> Drawing:
    """How much more probable the next token is after a token that chooses the expert than after the same token that
    does not.

    Parameters
    ----------
    found : xr.Dataset
        From `analysis.metrics.logprob.logprob_by_expert`.
    spread : float
        Difference of full colour, in nats.
    """
    return _heat_map(
        _cells({name: found[variable] for name, (variable, _) in _OF_LOGPROB.items()}, found),
        expert_axis("expert", found.sizes["expert"]),
        alt.Color("within:Q", title="difference in nats"),
        [-spread, 0, spread],
        [
            alt.Tooltip("expert:O"),
            *(alt.Tooltip(f"{name}:Q", title=title, format=",") for name, (_, title) in _OF_LOGPROB.items()),
        ],
        found.sizes["layer"],
        title="Log-probability of the next token, within the same token",
        subtitle=f"n = {found.attrs['n']:,} tokens; 0 is neutral, pale if p > 0.05",
        description="Heat map of how much more probable the next token is after a token that chooses the expert.",
        sure=SURE,
    )


def importance_heatmap(found: xr.Dataset) -> Drawing:
    """How predictions change without each expert.

    Parameters
    ----------
    found : xr.Dataset
        From `analysis.importances`, of one data set. The largest 5% of the effects have the full colour.
    """
    spread = max(float(np.nanquantile(abs(found["effect"]), _FULL_COLOUR)), 1e-9)
    drawing = _heat_map(
        _cells({name: found[variable] for name, (variable, _) in _OF_IMPORTANCE.items()}, found),
        expert_axis("expert", found.sizes["expert"]),
        alt.Color("effect:Q", title="nats per token without it"),
        [-spread, 0, spread],
        [
            alt.Tooltip("expert:O"),
            *(alt.Tooltip(f"{name}:Q", title=title, format=",") for name, (_, title) in _OF_IMPORTANCE.items()),
        ],
        found.sizes["layer"],
        title="Effect of masking an expert on the next token's log-probability",
        subtitle=f"n = {int(found['n']):,} tokens; blue: predictions are worse without it; pale if q > 0.05",
        description="Heat map of how predictions change if an expert cannot be chosen at a layer.",
    )
    pale = alt.condition("datum.q <= 0.05", alt.value(1), alt.value(0.3))
    return Drawing(drawing.chart.encode(opacity=pale), drawing.rows)


_FULL_COLOUR = 0.95  # arbitrary: the quantile of the effects' sizes
_OF_IMPORTANCE = {
    "effect": ("effect", "effect, nats per predicted token"),
    "low": ("effect_low", "95% from"),
    "high": ("effect_high", "to"),
    "q": ("q", "q, over all experts"),
    "share": ("share", "share of choices"),
    "saliency": ("mean_saliency", "mean saliency"),
}


_OF_LOGPROB = {
    "within": ("within", "within the same token, nats"),
    "low": ("within_low", "simultaneous 95% from"),
    "high": ("within_high", "to"),
    "p": ("within_p", "p, corrected for all cells"),
    "difference": ("difference", "over all tokens, nats"),
    "compared": ("compared", "tokens compared"),
    "tokens": ("tokens", "tokens that choose it"),
}


def _cells(columns: Mapping[str, xr.DataArray], found: xr.Dataset) -> Rows:
    """One row for each layer and expert."""
    values = {name: column.transpose("layer", "expert").values for name, column in columns.items()}
    return [
        {"layer": int(layer), "expert": int(expert), **{name: _shown(of[at, e]) for name, of in values.items()}}
        for at, layer in enumerate(found["layer"].values)
        for e, expert in enumerate(found["expert"].values)
    ]


def _shown(value: Any) -> float | int | None:
    """A count unchanged, any other number rounded."""
    return int(value) if isinstance(value, np.integer) else rounded(value)


def repetition_heatmap(repeated: xr.Dataset, pairs: Sequence[int], *, spread: float) -> Drawing:
    """Share of pairs of tokens with an expert in common, by layer and distance.

    Parameters
    ----------
    repeated : xr.Dataset
        `estimate`, `low` and `high` of `any_shared` (lag, layer), from `analysis.interval`; its
        attribute `null` is the share by chance.
    pairs : sequence of int
        The number of pairs at each lag.
    spread : float
        Distance from the null that has the full colour, as a share of pairs.
    """
    null, values = repeated.attrs["null"], repeated.transpose("layer", "lag")
    rows = [
        {
            "layer": int(layer),
            "lag": int(lag),
            "share": percent(values["estimate"].values[at, index]),
            "low": percent(values["low"].values[at, index]),
            "high": percent(values["high"].values[at, index]),
            "pairs": int(pairs[index]),
        }
        for at, layer in enumerate(values["layer"].values)
        for index, lag in enumerate(values["lag"].values)
    ]
    return _heat_map(
        rows,
        alt.X("lag:O", title="lag in tokens", axis=alt.Axis(labelAngle=0, orient="top")).scale(paddingInner=0.04),
        alt.Color("share:Q", title="pairs with an expert in common, %"),
        [100 * max(0.0, null - spread), 100 * null, 100 * min(1.0, null + spread)],
        [
            alt.Tooltip("lag:O"),
            alt.Tooltip("share:Q", title="pairs with an expert in common, %"),
            alt.Tooltip("low:Q", title="95% from"),
            alt.Tooltip("high:Q", title="to"),
            alt.Tooltip("pairs:Q", format=","),
        ],
        values.sizes["layer"],
        title="Repetition: pairs with an expert in common, %",
        subtitle=f"n = {pairs[0]:,} pairs of neighbouring tokens; the value expected by chance, {number(100 * null)}%,"
        " is neutral",
        description="Heat map of how often two tokens at a given distance have an expert in common, by layer.",
    )


def _heat_map(
    rows: Rows,
    x: alt.X,
    colour: alt.Color,
    domain: Sequence[float],
    tooltip: Sequence[alt.Tooltip],
    num_layers: int,
    *,
    title: str,
    subtitle: str,
    description: str,
    sure: str | None = None,
) -> Drawing:
    """A cell for each layer and place on `x`; the middle of the domain is neutral, and cells that are not `sure` are
    pale. If there are few cells, they show their numbers.
    """
    y = alt.Y("layer:O", title="layer").scale(paddingInner=0.08)
    scaled = colour.scale(
        domain=domain,
        range="diverging",
        interpolate="rgb",  # the default passes through green and maroon, which would look like a third category
        clamp=True,
    )
    cells: alt.Chart = (
        alt.Chart(alt.NamedData(name=CELLS), name=CELLS)
        .mark_rect(cornerRadius=2)
        .encode(
            color=scaled.legend(orient="bottom", format=".3~g", values=domain, gradientLength=180),
            tooltip=[alt.Tooltip("layer:O"), *tooltip],
        )
    )
    if sure is not None:
        cells = cells.encode(opacity=alt.condition(sure, alt.value(1), alt.value(PALE)))
    few = len(rows) <= _FEW_CELLS and len(rows) <= _FEW_COLUMNS * num_layers
    field = str(colour.shorthand).removesuffix(":Q")
    chart = layered(
        cells,
        *(_numbers(field, domain, sure) if few else []),
        title=alt.Title(title, subtitle=[subtitle]),
        width="container",
        height=layer_step(num_layers) * num_layers,
        description=description,
    )
    return Drawing(chart.encode(x=x, y=y), {CELLS: rows})


def _numbers(field: str, domain: Sequence[float], sure: str | None) -> list[alt.Chart]:
    """The numbers of cells: on pale, middle and strong colours, in the theme's text colour for each."""
    low, middle, high = domain
    digits = 0 if high >= 10 else 1 if high >= 1 else 2
    value = f"datum.{field}"
    strength = f"{value} > {middle} ? ({value} - {middle}) / {high - middle} : ({middle} - {value}) / {middle - low}"
    if sure is not None:
        strength = f"{sure} ? ({strength}) : 0"
    base = alt.Chart(alt.NamedData(name=CELLS)).transform_filter(f"isValid({value})").transform_calculate(of=strength)
    kinds = {"pale": "datum.of < 0.5", "middle": "datum.of >= 0.5 && datum.of < 0.83", "strong": "datum.of >= 0.83"}
    return [
        base.transform_filter(of)
        .mark_text(style=f"cell-{kind}", fontSize=11, aria=False)
        .encode(text=alt.Text(f"{field}:Q", format=f".{digits}f"))
        for kind, of in kinds.items()
    ]
