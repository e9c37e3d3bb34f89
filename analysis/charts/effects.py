"""The effect of a change on predictions: intervals by class and by data set, tokens with the largest losses, coloured
passages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from analysis.charts.theme import CELLS, POINTS, QUIET, Drawing, layered, rounded, visible

ALL = "all tokens"
ROW = 20  # pixels per class or token (arbitrary)
COLUMNS = 44  # characters per line of a passage, which fit on a phone
LINE = 19  # pixels per line (arbitrary)


@dataclass(frozen=True, kw_only=True)
class Read:
    """A token of a passage: its text, and by how many nats it is predicted better; NaN if that is not known."""

    text: str
    effect: float


def effect_chart(
    rows: Sequence[Mapping[str, Any]], *, over: str, title: str, subtitle: Sequence[str], description: str
) -> Drawing:
    """Effects with their intervals, from the top down; pale if p is above 5% or missing.

    Parameters
    ----------
    rows : sequence of mapping
        `over` and `effect`, `low`, `high`, `p` and `tokens`, from `effect_rows`.
    over : str
        What each row stands for: "class", "data_set".
    title, subtitle, description : str
                Texts of the chart.
    """
    base = alt.Chart(alt.NamedData(name=POINTS)).encode(
        y=alt.Y(f"{over}:N", title=None, sort=[row[over] for row in rows]).axis(labelLimit=150),
        opacity=alt.condition("datum.p !== null && datum.p <= 0.05", alt.value(1), alt.value(0.35)),
    )
    x = alt.X("effect:Q", title="nats per token, below 0: predicted worse").scale(zero=True)
    points = base.mark_circle(size=60).encode(
        x=x,
        tooltip=[
            alt.Tooltip(f"{over}:N", title=over.replace("_", " ")),
            alt.Tooltip("effect:Q", title="nats per token"),
            alt.Tooltip("low:Q", title="95% from"),
            alt.Tooltip("high:Q", title="to"),
            alt.Tooltip("p:Q"),
            alt.Tooltip("tokens:Q", title="predicted tokens", format=","),
        ],
    )
    reach = base.mark_bar(height=3, color=QUIET, aria=False).encode(x=alt.X("low:Q", title=x["title"]), x2="high:Q")
    null = alt.Chart(alt.NamedData(name="null")).mark_rule(strokeDash=[4, 3], color=QUIET, aria=False)
    chart = layered(
        points.properties(name=POINTS),
        reach,
        null.encode(x=alt.X("null:Q", title=x["title"])),
        title=alt.Title(title, subtitle=list(subtitle)),
        width="container",
        height=ROW * len(rows) + 10,
        description=description,
    )
    return Drawing(chart, {POINTS: rows, "null": [{"null": 0}]})


def class_rows(found: xr.Dataset) -> list[dict[str, Any]]:
    """Rows from `analysis.effect`: all tokens, then the classes that occur, the largest loss per token first."""
    names = {"effect": "of_class", "low": "class_low", "high": "class_high", "p": "class_p"}
    columns = {key: found[name].values for key, name in names.items()}
    tokens, effects = found["class_tokens"].values, columns["effect"]
    order = [at for at in np.argsort(np.nan_to_num(effects, nan=np.inf), kind="stable") if tokens[at]]
    whole = {key: rounded(found[key]) for key in names}
    return [
        {"class": ALL, **whole, "tokens": int(found.attrs["n"])},
        *(
            {
                "class": visible(str(found["token_class"].values[at])),
                **{key: rounded(values[at]) for key, values in columns.items()},
                "tokens": int(tokens[at]),
            }
            for at in order
        ),
    ]


def losing_chart(found: xr.Dataset, pieces: Sequence[str], *, top: int) -> Drawing:
    """The tokens with the largest losses over all their occurrences, in nats.

    Parameters
    ----------
    found : xr.Dataset
        From `analysis.effect`.
    pieces : sequence of str
        The pieces of the vocabulary.
    top : int
        The most tokens to list.
    """
    mean, tokens = found["of_token"].fillna(0.0).values, found["tokens"].values
    lost = mean * tokens
    worst = [token for token in lost.argsort(kind="stable")[:top].tolist() if lost[token] < 0]
    rows: list[dict[str, Any]] = [
        {
            "token": f"{visible(pieces[token])} ({token})",
            "lost": rounded(lost[token]),
            "effect": rounded(mean[token]),
            "tokens": int(tokens[token]),
        }
        for token in worst
    ]
    chart = (
        alt.Chart(alt.NamedData(name=POINTS), name=POINTS)
        .mark_bar(height=ROW - 7, color=QUIET)
        .encode(
            y=alt.Y("token:N", title=None, sort=[row["token"] for row in rows]).axis(labelLimit=150),
            x=alt.X("lost:Q", title="total nats"),
            tooltip=[
                alt.Tooltip("token:N"),
                alt.Tooltip("lost:Q", title="total nats"),
                alt.Tooltip("effect:Q", title="nats per token"),
                alt.Tooltip("tokens:Q", title="times predicted", format=","),
            ],
        )
        .properties(
            title=alt.Title("Tokens with the largest losses", subtitle=[f"n = {found.attrs['n']:,} predicted tokens"]),
            width="container",
            height=ROW * max(1, len(rows)),
            description="The tokens with the largest total loss of log-probability over all their occurrences.",
        )
    )
    return Drawing(chart, {POINTS: rows})


def passage_chart(passage: Sequence[Read], *, spread: float, title: str) -> Drawing:
    """Tokens of a text, each coloured by its difference: blue if it is predicted worse, orange if better.

    Parameters
    ----------
    passage : sequence of Read
        The tokens in order.
    spread : float
        The value of full colour, in nats.
    title : str
        Texts of the chart.
    """
    rows = _lines(passage, spread)
    base = alt.Chart(alt.NamedData(name=CELLS)).encode(y=alt.Y("line:O", title=None).axis(None).scale(paddingInner=0.1))
    x = alt.X("from:Q", title=None).scale(domain=[0, COLUMNS], nice=False).axis(None)
    colour = alt.Color("effect:Q", title="nats, with the change minus without").scale(
        domain=[-spread, 0, spread], range="diverging", interpolate="rgb", clamp=True
    )
    cells = base.mark_rect(aria=False).encode(
        x=x,
        x2="to:Q",
        color=colour.legend(orient="bottom", values=[-spread, 0, spread], format=".3~g", gradientLength=180),
        tooltip=[alt.Tooltip("text:N", title="token"), alt.Tooltip("effect:Q", title="nats")],
    )
    words = [
        base.transform_filter(f"datum.ink === '{ink}'")
        .mark_text(style=f"cell-{ink}", align="left", font="monospace", fontSize=11, aria=False)
        .encode(x=alt.X("begin:Q", title=None), text="text:N")
        for ink in ("pale", "middle", "strong")
    ]
    chart = layered(
        cells.properties(name=CELLS),
        *words,
        title=alt.Title(title, subtitle=["blue: predicted worse; orange: better"]),
        width="container",
        height=LINE * (int(rows[-1]["line"]) + 1),
        description="A passage whose tokens are coloured by how much better or worse they are predicted.",
    )
    return Drawing(chart, {CELLS: rows})


def _lines(passage: Sequence[Read], spread: float) -> list[dict[str, Any]]:
    """The place of each token: its line, the first and last coloured column, and the column where its text begins."""
    rows, line, at = [], 0, 0
    for number, read in enumerate(passage):
        first, *more = visible(read.text, keep="\n").split("\n")
        if at and at + len(first) > COLUMNS:
            line, at = line + 1, 0
        text = (first + "⏎" * bool(more))[:COLUMNS]
        strength = abs(read.effect) / spread if np.isfinite(read.effect) else 0.0
        rows.append(
            {
                "at": number,
                "line": line,
                "from": at,
                "to": at + len(text),
                "begin": at + len(text) - len(text.lstrip()),
                "text": text,
                "effect": rounded(read.effect),
                "ink": "pale" if strength < 0.5 else "middle" if strength < 0.83 else "strong",
            }
        )
        line, at = (line + len(more), len(more[-1])) if more else (line, at + len(text))
    return rows
