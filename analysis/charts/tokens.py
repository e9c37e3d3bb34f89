"""The tokens of each expert, as words on tiles."""

from __future__ import annotations

import altair as alt
import numpy as np
import xarray as xr

from analysis.charts.theme import TOKENS, Drawing, layered, percent, rounded, visible

STRONG_LIFT = 8.0  # lift within documents at which a token has the full colour; arbitrary
_WITHIN = "lift within documents"


def token_chart(tokens: xr.Dataset) -> Drawing:
    """The first tokens of each expert, coloured by lift; its rows cover all layers, and it shows one layer at a time.

    Parameters
    ----------
    tokens : xr.Dataset
        From `analysis.expert_tokens`, with a `layer` dimension of at least one. If `expert_tokens_of` was also given
        shuffled tokens, the colour is the lift within documents.
    """
    colour_by = "lift_within" if "lift_within" in tokens else "lift"
    names = ("token_id", "piece", "tokens", "share", "lift", *[name for name in ("lift_within",) if name in tokens])
    values = {name: tokens[name].transpose("layer", "expert", "place").values for name in names}
    rows = [
        {
            "layer": int(tokens["layer"].values[at]),
            "expert": int(expert),
            "rank": int(rank) + 1,
            "piece": visible(str(values["piece"][at, expert, rank])),
            "tokens": int(values["tokens"][at, expert, rank]),
            "share": percent(values["share"][at, expert, rank]),
            **{name: rounded(values[name][at, expert, rank]) for name in names[4:]},
        }
        for at, expert, rank in np.argwhere(values["token_id"] >= 0)  # ordered by layer, expert, rank
    ]
    base = alt.Chart(alt.NamedData(name=TOKENS)).encode(
        x=alt.X("rank:O", title="rank").axis(labelAngle=0).scale(paddingInner=0.04),
        y=alt.Y("expert:O", title="expert").scale(paddingInner=0.1),
        tooltip=[
            alt.Tooltip("piece:N", title="token"),
            alt.Tooltip("layer:O"),
            alt.Tooltip("expert:O"),
            alt.Tooltip("share:Q", title="share of its occurrences, %"),
            alt.Tooltip("lift:Q", title="lift"),
            *[alt.Tooltip(f"{name}:Q", title=_WITHIN) for name in names[5:]],
            alt.Tooltip("tokens:Q", title="occurrences", format=","),
        ],
    )
    legend = _WITHIN if colour_by == "lift_within" else "lift (1 = average token)"
    scaled = alt.Color(f"{colour_by}:Q", title=legend).scale(
        type="log", domain=[1, STRONG_LIFT], range="ramp", interpolate="rgb", clamp=True
    )
    colour = scaled.legend(orient="bottom", values=[1, 2, 4, 8], gradientLength=180)
    tiles = base.mark_rect(cornerRadius=3, aria=False).encode(color=colour)
    words = base.mark_text(limit=alt.ExprRef("bandwidth('x') - 4"), fontSize=11).encode(text="piece:N")
    order, least = tokens.attrs["order"], tokens.attrs["min_count"]
    chart = layered(
        tiles,
        words.properties(name=TOKENS),
        title=alt.Title(
            "Tokens: lift",
            subtitle=[
                f"n = {tokens.attrs['n']:,} tokens",
                f"ordered by {order} over all tokens, at least {least} occurrences",
            ],
        ),
        width="container",
        height=24 * tokens.sizes["expert"],
        description="The first tokens of each expert at one layer.",
    )
    return Drawing(chart, {TOKENS: rows})
