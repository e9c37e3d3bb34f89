"""Line charts: one number by layer, distance, position or cache size, one line per data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import xarray as xr

from analysis.charts.theme import POINTS, QUIET, Drawing, layered, rounded, visible

_DASHES = [4, 3]  # pixels drawn and skipped


def lines(
    values: Mapping[str, xr.DataArray],
    *,
    title: str,
    subtitle: Sequence[str],
    unit: str,
    over: str = "layer",
    axis: str | None = None,
    each: str = "data_set",
    domain: tuple[float, float] | None = None,
    null: float | None = None,
    by_chance: Mapping[str, xr.DataArray] | None = None,
    interval: Mapping[str, tuple[xr.DataArray, xr.DataArray]] | None = None,
    counted: Mapping[str, xr.DataArray] | None = None,
) -> Drawing:
    """One number by place, one line per data set.

    Parameters
    ----------
    values : mapping of str to xr.DataArray
        The numbers along `over`, by data set.
    title, subtitle, unit : str
        The quantity; n and the null; the unit on the axis.
    over, axis : str
        The dimension from left to right, and its title; default its name.
    each : str
        What each line stands for. A data set has its own colour; other lines are grey and distinguished by their marks.
    domain : pair of float, optional
        The ends of the axis, for charts that are compared; default the range of the numbers.
    null : float, optional
        The value expected by chance, the same at every place: a dashed rule.
    by_chance : mapping of str to xr.DataArray, optional
        The same by place and line: dashed lines.
    interval : mapping of str to pair of xr.DataArray, optional
        Ends by place and line: bands.
    counted : mapping of str to xr.DataArray, optional
        How many tokens or pairs a number is based on, if that differs from place to place.
    """
    rows: list[dict[str, Any]] = []
    for label, series in values.items():
        for at, place in enumerate(series[over].values):
            row = {each: visible(label), over: int(place), "value": rounded(series.values[at])}
            if by_chance is not None:
                row["by_chance"] = rounded(by_chance[label].values[at])
            if interval is not None:
                ends = zip(("low", "high"), interval[label], strict=True)
                row |= {end: rounded(of.values[at]) for end, of in ends}
            if counted is not None:
                row["n"] = int(counted[label].values[at])
            rows.append(row)
    places = sorted({row[over] for row in rows})
    x = (
        alt.X(f"{over}:O", title=over if axis is None else axis)
        .scale(domain=places, type="point", padding=0.5)
        .axis(labelAngle=0, values=places[:: -(-len(places) // 16)])
    )
    legend = alt.Legend(orient="bottom", title=None, columns=2, symbolOpacity=1) if len(values) > 1 else None
    order = [visible(label) for label in values]
    kinds = alt.Scale(domain=order, range="category" if each == "data_set" else "ordinal")
    colour = alt.Color(f"{each}:N", sort=order, scale=kinds, legend=legend)
    shape = alt.Shape(f"{each}:N", sort=order, scale=alt.Scale(domain=order, range="symbol"), legend=legend)
    titles = {"value": unit, "by_chance": "expected by chance", "low": "95% from", "high": "to", "n": "n"}
    tooltip = [alt.Tooltip(f"{each}:N", title=each.replace("_", " ")), alt.Tooltip(f"{over}:O")]
    tooltip += [
        alt.Tooltip(f"{name}:Q", title=titles[name], format="," if name == "n" else alt.Undefined)
        for name in titles
        if any(name in row for row in rows)
    ]
    base = alt.Chart(alt.NamedData(name=POINTS)).encode(x=x, color=colour)
    extent = alt.Scale(zero=False) if domain is None else alt.Scale(domain=domain)
    y = alt.Y("value:Q", title=unit, scale=extent)
    points = base.mark_point(size=45, filled=True).encode(y=y, shape=shape, tooltip=tooltip)
    drawn = [points.properties(name=POINTS)]
    drawn.append(base.mark_line(strokeWidth=1.8, aria=False).encode(y=y))
    tables: dict[str, Any] = {POINTS: rows}
    if interval is not None:
        drawn.append(base.mark_area(opacity=0.15, aria=False).encode(y=alt.Y("low:Q", title=unit), y2="high:Q"))
    if by_chance is not None:
        drawn.append(
            base.mark_line(strokeWidth=1.2, strokeDash=_DASHES, aria=False).encode(y=alt.Y("by_chance:Q", title=unit))
        )
    if null is not None:
        rule = alt.Chart(alt.NamedData(name="null")).mark_rule(strokeDash=_DASHES, color=QUIET, aria=False)
        drawn.append(rule.encode(y=alt.Y("null:Q", title=unit)))
        tables["null"] = [{"null": null}]
    chart = layered(
        *drawn,
        title=alt.Title(title, subtitle=list(subtitle)),
        width="container",
        height=210,
        description=f"{title}, by {over}.",
    )
    return Drawing(chart, tables)
