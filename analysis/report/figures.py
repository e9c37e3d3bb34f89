"""A chart for the page and for papers: its specification, the selections of its rows, and the source of its numbers.

Promises: every definition says which interval is drawn, or why none is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr

from analysis.charts.lines import lines
from analysis.charts.theme import Drawing
from analysis.statistics.jackknife import Scale, how, interval

ALL = "all data sets"
NO_INTERVAL = "none: one count over all tokens"


@dataclass(frozen=True, kw_only=True)
class Option:
    """A selection of a figure's rows: those with one value of its field `by`."""

    value: int
    name: str
    """The suffix of its file names, after the figure's own name."""
    row: Mapping[str, str | int]
    """The columns that replace that field in tables."""
    group: str = ""
    """What is selected first: a data set."""
    label: str = ""
    """Its name among the options of its group."""
    caption: str = ""
    subtitle: Sequence[str] | None = None
    """Lines under the chart's title; None if they are the same for all."""
    for_papers: bool = True
    """Whether it gets its own files; the paths of single tokens are only saved from the page."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One chart of the page."""

    kind: str
    """How the page's script and style treat it: "tokens" follow the selected layer, "paths" have controls."""
    name: str
    """The base of its file names."""
    caption: str
    spec: dict[str, Any]
    """Vega-Lite, with all rows."""
    about: str
    """Definition, estimator, null, source and interval."""
    by: str | None = None
    """The field by which rows are selected; None if all rows are shown."""
    options: Sequence[Option] = ()

    def shown(self, option: Option | None) -> dict[str, Any]:
        """The specification with the rows of one option only; the page's script does the same."""
        if option is None or self.by is None:
            return self.spec
        by, value = self.by, option.value
        named = {
            name: [{key: cell for key, cell in row.items() if key != by} for row in rows if row.get(by, value) == value]
            for name, rows in self.spec["datasets"].items()
        }
        title = self.spec["title"] | ({} if option.subtitle is None else {"subtitle": list(option.subtitle)})
        return {**self.spec, "title": title, "datasets": named}


def figure(kind: str, name: str, caption: str, drawing: Drawing, about: str, **chosen: Any) -> Figure:
    """A drawing as a figure; `by` and `options` as of `Figure`."""
    return Figure(kind=kind, name=name, caption=caption, spec=drawing.spec, about=about, **chosen)


def in_common_colours(figure: Figure, labels: Sequence[str]) -> Figure:
    """The figure with the colour and the mark of each data set on the whole page, whichever it draws."""

    def of_data_sets(how: dict[str, Any]) -> dict[str, Any]:
        if how.get("field") != "data_set":
            return how
        legend = how.get("legend") and {**how["legend"], "values": how["sort"]}
        return {**how, "scale": {**how["scale"], "domain": list(labels)}, "legend": legend}

    def of_layer(layer: dict[str, Any]) -> dict[str, Any]:
        own = {name: of_data_sets(layer["encoding"][name]) for name in ("color", "shape") if name in layer["encoding"]}
        return {**layer, "encoding": {**layer["encoding"], **own}}

    if "layer" not in figure.spec:
        return figure
    return replace(figure, spec={**figure.spec, "layer": [of_layer(layer) for layer in figure.spec["layer"]]})


def about(result: xr.Dataset, spread: str) -> str:
    """Definition, estimator, null and source, from a result, and which interval is drawn, in words."""
    told = {name: result.attrs.get(name) for name in ("definition", "estimator", "null", "source")}
    told["interval"] = spread
    return " ".join(f"{name.capitalize()}: {text}." for name, text in told.items() if text not in (None, "-"))


def band(
    values: xr.DataArray, *, scale: Scale = "linear", corrected: bool = False, amount: xr.DataArray | None = None
) -> tuple[xr.DataArray, xr.DataArray]:
    """The ends of the interval of a jackknife's values; see `analysis.interval`."""
    found = interval(values, scale=scale, corrected=corrected, amount=amount)
    return found["low"], found["high"]


def spread(values: xr.DataArray | xr.Dataset) -> str:
    """Which interval `band` returns, in words."""
    return how(values.sizes["replicate"] - 1)


def line_figure(
    name: str,
    values: Mapping[str, xr.DataArray],
    title: str,
    unit: str,
    results: Sequence[xr.Dataset],
    counted_in: str,
    spread: str,
    *,
    nulls: Sequence[float] = (),
    by_chance: Mapping[str, xr.DataArray] | None = None,
    interval: Mapping[str, tuple[xr.DataArray, xr.DataArray]] | None = None,
    notes: Sequence[str] = (),
    **where: Any,
) -> Figure:
    """One number for each place (such as a layer) and data set, with its source, what was counted, and its interval in
    words.

    `nulls` are those of the data sets: one dashed rule if they agree, otherwise (for different models) dashed lines;
    `notes` are more lines under the title.
    """
    null = nulls[0] if len(set(nulls)) == 1 else None
    if null is None and by_chance is None and nulls:
        by_chance = {label: xr.full_like(values[label], each) for label, each in zip(values, nulls, strict=True)}
    told = [f"n = {sum(result.attrs['n'] for result in results):,} {counted_in}"]
    dashed = [] if null is None else [f"{null:.3g}, expected by chance or with an even load"]
    if by_chance is not None:
        dashed.append("in colour, expected by chance with the data set's own load" if dashed else "expected by chance")
    told += [f"dashed: {'; '.join(dashed)}"] if dashed else []
    drawn = lines(
        values,
        title=title,
        subtitle=[*told, *notes],
        unit=unit,
        null=null,
        by_chance=by_chance,
        interval=interval,
        **where,
    )
    return figure("lines", name, ALL, drawn, about(results[0], spread))
