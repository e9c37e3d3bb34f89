"""What all charts share: the theme, the numbers that a chart shows, axes and rounding.

`analysis.charts.lines`, `heat_charts`, `path_charts` and `token_charts` hold one function per chart, from labelled
Datasets to a `Drawing`. They promise: every title states the quantity and its unit, every subtitle n and the null;
colours are safe for colour-blind readers and name roles ("diverging", "ramp"), so only `theme` distinguishes light and
dark; the marks that carry the numbers are named (`CELLS`, `LINKS`, `TOKENS`, `POINTS`), one for each row of a drawing's
first table. No files, no network. They do not know about stores: they draw what the metrics return.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from analysis.escaping import visible

__all__ = ["CELLS", "LINKS", "POINTS", "TOKENS", "Drawing", "Rows", "theme", "visible"]

Rows = Sequence[Mapping[str, Any]]
"""A table as in JSON: a name and a value for each cell."""

# Names of the marks that carry a chart's numbers.
CELLS, LINKS, TOKENS, POINTS = "cells", "links", "tokens", "points"

_NOTEBOOK_WIDTH = 520  # arbitrary: pixels
SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
QUIET = "#8a93a3"  # the value expected by chance: visible on both backgrounds, and not the colour of a data set
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
# Each colour has one meaning. Blue is less and orange more than expected, and the page's background is neutral; both
# are distinguishable with any colour vision. Data sets use neither of the two, and have marks in addition to colours.
# Grey is not a data set.
_LIGHT: Mapping[str, Any] = {
    "ink": "#1d2129",
    "soft": "#5b6472",
    "line": "#d7dbe2",
    "accent": "#b4530a",
    "diverging": ["#1f5fa8", "#6aa0d8", "#c3d9ef", "#f3f2ef", "#f6cfa3", "#e08a35", "#a8480a"],
    "ramp": ["#f3f2ef", "#f6cfa3", "#e9a75c"],
    "category": ["#007a5e", "#a3195b", "#8a7600", "#6a3fb5", "#c26aa6", "#4fa387", "#b3a136", "#9c86d6"],
    "ordinal": ["#1d2129", "#454d5a", "#5f6877", "#7a8493", "#929baa", "#aab2bf"],
    "cell": {"pale": "#1d2129", "middle": "#1d2129", "strong": "#ffffff"},
}
_DARK: Mapping[str, Any] = {
    "ink": "#e8eaee",
    "soft": "#a3acba",
    "line": "#3a4150",
    "accent": "#f2a14e",
    "diverging": ["#8cc4ff", "#4d8fd6", "#2c5079", "#252a34", "#72471d", "#c77a2a", "#ffbe73"],
    "ramp": ["#252a34", "#553a20", "#875520"],
    "category": ["#2ec49a", "#f27fb2", "#d9c53a", "#b79cf5", "#d9a5c9", "#8fdcc4", "#efe39a", "#8f74d9"],
    "ordinal": ["#e8eaee", "#c3cad4", "#a9b1be", "#8f98a7", "#78818f", "#646c79"],
    "cell": {"pale": "#e8eaee", "middle": "#16191f", "strong": "#16191f"},
}


def theme(dark: bool = False) -> dict[str, Any]:
    """Vega-Lite's `config` for all charts, on a light or a dark background.

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
        "style": {f"cell-{kind}": {"color": ink} for kind, ink in colour["cell"].items()},
        "range": {name: colour[name] for name in ("diverging", "ramp", "category", "ordinal")}
        | {"heatmap": colour["ramp"], "symbol": list(SYMBOLS)},
    }


@alt.theme.register("expert_atlas", enable=True)
def _light() -> alt.theme.ThemeConfig:
    return alt.theme.ThemeConfig(config=theme())  # type: ignore[typeddict-item]


@dataclass(frozen=True)
class Drawing:
    """A chart, and the numbers that it shows, by name; the numbers of its marks come first."""

    chart: alt.Chart | alt.LayerChart
    """The chart names its tables and does not hold them: Altair would validate every row, which took most of the
    time."""
    rows: Mapping[str, Rows]

    @property
    def spec(self) -> dict[str, Any]:
        """Vega-Lite, without a theme."""
        spec: dict[str, Any] = self.chart.to_dict()
        spec.pop("config", None)
        return {**spec, "datasets": {name: list(rows) for name, rows in self.rows.items()}}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        """What Jupyter shows, according to `alt.renderers`; on white, also in a dark notebook."""
        paper = {"width": _NOTEBOOK_WIDTH, "background": "white", "padding": 12}
        return alt.Chart.from_dict(self.spec | paper)._repr_mimebundle_(include, exclude)


def layered(*layers: alt.Chart | alt.LayerChart, **properties: Any) -> alt.LayerChart:
    """Layers with these properties."""
    chart = alt.layer(*layers).properties(**properties)
    assert isinstance(chart, alt.LayerChart)  # altair's annotation allows a facet, which cannot happen here
    return chart


def expert_axis(field: str, num_experts: int) -> alt.X:
    """Experts from left to right: every number if they fit, otherwise every eighth."""
    axis = alt.Axis(labelAngle=0, orient="top")
    if num_experts > 16:
        axis = alt.Axis(labelAngle=0, orient="top", values=list(range(0, num_experts, 8)))
    return alt.X(f"{field}:O", title="expert", axis=axis).scale(domain=list(range(num_experts)), paddingInner=0.04)


def layer_step(num_layers: int) -> int:
    """Pixels per layer: few layers get more room, many still fit on a screen."""
    return int(np.clip(520 / max(num_layers, 1), 15, 34))


def percent(share: Any) -> float | None:
    """A share in percent, rounded by `rounded`."""
    return rounded(100 * float(share))


def rounded(value: Any) -> float | None:
    """Four significant digits, None for undefined values; keeps the page small."""
    return None if np.isnan(value) else float(f"{float(value):.4g}")


def number(value: float) -> str:
    """Three significant digits, for a sentence."""
    return f"{value:.3g}"
