"""A chart as the page and papers need it: its specification, what of its rows can be chosen, whence its numbers come.

Promises: every definition says which interval is drawn, or why there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xarray as xr

from analysis.charts import Drawing
from analysis.uncertainty import interval

NO_INTERVAL = "none: it is counted once, over all tokens"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Some rows of a figure: those with one value of its field `by`."""

    value: int
    name: str
    """What files of it are called, after the figure's own name."""
    row: Mapping[str, str | int]
    """What its rows have in tables in place of that field."""
    group: str = ""
    """What is chosen first: a data set."""
    label: str = ""
    """How it is named beside the others of its group."""
    caption: str = ""
    subtitle: Sequence[str] | None = None
    """Lines under the chart's title; None where they are the same for all."""
    for_papers: bool = True
    """Whether it gets files of its own; those of tokens' paths are saved in the page."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One chart of the page."""

    kind: str
    """What the page's script and style must know: "tokens" are of the layer that is chosen, "paths" have controls."""
    name: str
    """What files of it are called."""
    caption: str
    spec: dict[str, Any]
    """Vega-Lite, with all rows."""
    about: str
    """Definition, estimator, null, source and interval."""
    by: str | None = None
    """The field of the rows that is chosen by; None where all rows are shown."""
    choices: Sequence[Choice] = ()

    def shown(self, choice: Choice | None) -> dict[str, Any]:
        """The specification with the rows of a choice only, as the page's script makes it too."""
        if choice is None or self.by is None:
            return self.spec
        by, value = self.by, choice.value
        named = {
            name: [{key: cell for key, cell in row.items() if key != by} for row in rows if row.get(by, value) == value]
            for name, rows in self.spec["datasets"].items()
        }
        title = self.spec["title"] | ({} if choice.subtitle is None else {"subtitle": list(choice.subtitle)})
        return {**self.spec, "title": title, "datasets": named}


def figure(kind: str, name: str, caption: str, drawing: Drawing, about: str, **chosen: Any) -> Figure:
    """A drawing as a figure; `by` and `choices` as of `Figure`."""
    return Figure(kind=kind, name=name, caption=caption, spec=drawing.spec, about=about, **chosen)


def about(result: xr.Dataset, spread: str) -> str:
    """Definition, estimator, null and source, as a result carries them, and which interval is drawn, in words."""
    told = {name: result.attrs.get(name) for name in ("definition", "estimator", "null", "source")}
    told["interval"] = spread
    return " ".join(f"{name.capitalize()}: {text}." for name, text in told.items() if text not in (None, "-"))


def band(values: xr.DataArray, *, centred: bool = False) -> tuple[xr.DataArray, xr.DataArray]:
    """The ends of an interval, from replicates.

    Parameters
    ----------
    values : xr.DataArray
        With dimension `replicate`, of which 0 are the data.
    centred : bool
        Take off the bias that resampling adds: for what is no mean, such as entropies, which samples of samples make
        smaller once more.
    """
    found = interval(values)
    bias: Any = 0.0
    if centred:
        bias = values.isel(replicate=slice(1, None)).mean("replicate", skipna=False) - found["estimate"]
    return found["low"] - bias, found["high"] - bias


def resampled(values: xr.DataArray | xr.Dataset) -> str:
    """Which interval `band` gives, in words."""
    return f"95 %, percentiles of {values.sizes['replicate'] - 1} resamples of whole documents (Poisson bootstrap)"
