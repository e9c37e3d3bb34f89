"""The experts of token classes: for each layer and class, the expert with the highest lift."""

from __future__ import annotations

import altair as alt
import numpy as np
import xarray as xr

from analysis.charts.theme import CELLS, Drawing, layer_step, layered, percent, rounded, visible

STRONG_LIFT = 8.0  # at which a cell is coloured in full strength (arbitrary)
WORDS_LAYERS = 34  # with more layers, cells are too small for a number (arbitrary)
NUMBERS = ("counts", "lift", "lift_low", "lift_high")


def class_heatmap(found: xr.Dataset) -> Drawing:
    """The expert with the highest lift for each class, by layer; pale if its lift may be 1.

    Parameters
    ----------
    found : xr.Dataset
        From `analysis.strongest_experts_of`.
    """
    values = {name: found[name].transpose("layer", "token_class").values for name in (*NUMBERS, "share", "strongest")}
    ends = {f"share_{end}": found[f"share_{end}"].transpose("layer", "token_class").values for end in ("low", "high")}
    classes = [visible(str(name)) for name in found["token_class"].values]
    rows = [
        {
            "layer": int(found["layer"].values[at]),
            "class": classes[c],
            "expert": int(values["strongest"][at, c]),
            "tokens": int(found["tokens"].values[c]),
            "share": percent(values["share"][at, c]),
            "share_from": percent(ends["share_low"][at, c]),
            "share_to": percent(ends["share_high"][at, c]),
            **{name: rounded(values[name][at, c]) for name in NUMBERS},
        }
        for at, c in np.argwhere(values["strongest"] >= 0)
    ]
    base = alt.Chart(alt.NamedData(name=CELLS)).encode(
        x=alt.X("class:N", title=None, sort=classes)
        .scale(domain=classes, paddingInner=0.04)
        .axis(orient="top", labelAngle=-45, labelLimit=110),
        y=alt.Y("layer:O", title="layer").scale(domain=found["layer"].values.tolist(), paddingInner=0.08),
        tooltip=[
            alt.Tooltip("class:N"),
            alt.Tooltip("layer:O"),
            alt.Tooltip("expert:O"),
            alt.Tooltip("share:Q", title="share of the class, %"),
            alt.Tooltip("share_from:Q", title="95% from"),
            alt.Tooltip("share_to:Q", title="to"),
            alt.Tooltip("lift:Q", title="lift"),
            alt.Tooltip("lift_low:Q", title="95% from"),
            alt.Tooltip("lift_high:Q", title="to"),
            alt.Tooltip("counts:Q", title="tokens at the expert", format=","),
            alt.Tooltip("tokens:Q", title="tokens of the class", format=","),
        ],
    )
    colour = alt.Color("lift:Q", title="lift (1 = average token)").scale(
        type="log", domain=[1, STRONG_LIFT], range="ramp", interpolate="rgb", clamp=True
    )
    legend = colour.legend(orient="bottom", values=[1, 2, 4, 8], gradientLength=180)
    pale = alt.condition("datum.lift_low > 1", alt.value(1), alt.value(0.3))
    cells = base.mark_rect(cornerRadius=2).encode(color=legend, opacity=pale).properties(name=CELLS)
    words = base.mark_text(fontSize=10, aria=False).encode(text="expert:O")
    layers = found.sizes["layer"]
    chart = layered(
        *([cells, words] if layers <= WORDS_LAYERS else [cells]),
        title=alt.Title(
            "Classes: the expert with the highest lift",
            subtitle=[f"n = {found.attrs['n']:,} tokens; pale: may be chance, or no interval"],
        ),
        width="container",
        height=layer_step(layers) * layers,
        description="For each layer and token class, the expert with the highest lift.",
    )
    return Drawing(chart, {CELLS: rows})
