"""Repetition in time: tokens that share experts with earlier tokens."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.heatmaps import repetition_heatmap
from analysis.metrics.repetition import Repetition, first_repeated_by_load
from analysis.report.figures import Figure, about, band, figure, line_figure, spread
from analysis.report.section import Answers, Asked, Section
from analysis.scanning import Reducer
from analysis.statistics.jackknife import Jackknife, interval

LAGS = tuple(2**power for power in range(8))  # distances at which tokens are compared, if rows are long enough


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Repetition at several lags, by units of documents."""
    return {"repetition": Jackknife(Repetition(lags(asked.data)), block_tokens=asked.block_tokens)}


def lags(data: xr.Dataset) -> tuple[int, ...]:
    """Distances at which tokens are compared: the next token, and longer distances if rows are long enough."""
    return tuple(lag for lag in LAGS if lag == 1 or lag < data.sizes["position"])


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """By lag, all data sets together; by lag and layer, one chart per data set."""
    yield from repetition_by_lag(answers)
    yield from repetition_by_layer(answers)


def repetition_by_lag(answers: Sequence[Answers]) -> Iterator[Figure]:
    """Repetition at each distance, mean over layers."""
    for name, variable, title in (
        ("shared-by-lag", "any_shared", "Repetition: share of pairs with an expert in common, mean over layers"),
        ("first-by-lag", "first_repeated", "Repetition: share of pairs with the same first expert, mean over layers"),
    ):
        means = {each.label: each["repetition"][variable].mean("layer") for each in answers}
        by_load = {label: _by_load(each, means[label]) for label, each in zip(means, answers, strict=True)}
        yield line_figure(
            name,
            {label: values.isel(replicate=0) for label, values in means.items()},
            title,
            "share of pairs",
            [repeated(each, variable) for each in answers],
            "pairs of tokens",
            spread(answers[0]["repetition"]),
            over="lag",
            axis="lag in tokens",
            nulls=[each["repetition"][variable].attrs["null"] for each in answers],
            by_chance=by_load if variable == "first_repeated" else None,
            interval={label: band(values, scale="share") for label, values in means.items()},
            counted={each.label: pairs_by_lag(each) for each in answers},
        )


def repetition_by_layer(answers: Sequence[Answers]) -> Iterator[Figure]:
    """Repetition at each layer and distance, a heat map for each data set."""
    found, widest = {}, 0.05
    for each in answers:
        null = each["repetition"]["any_shared"].attrs["null"]
        found[each.label] = interval(each["repetition"]["any_shared"], scale="share").assign_attrs(null=null)
        widest = max(widest, float(abs(found[each.label]["estimate"] - null).max()))
    for each in answers:
        drawn = repetition_heatmap(found[each.label], each["repetition"].attrs["pairs_by_lag"], spread=widest)
        definition = about(repeated(each, "any_shared"), spread(each["repetition"]))
        yield figure("repetition", f"repetition-{each.label}", each.label, drawn, definition)


def repeated(each: Answers, variable: str) -> xr.Dataset:
    """Repetition, with the null of one of its variables."""
    null = f"{each['repetition'][variable].attrs['null']:.4g}, for independent and even choices"
    if variable == "first_repeated":
        null += "; for independent choices with the observed load, the sum of the squared shares of the first choices"
    return each["repetition"].assign_attrs(null=null)


def _by_load(each: Answers, like: xr.DataArray) -> xr.DataArray:
    """The value for independent first choices with this load, mean over layers: the same at every lag."""
    by_load = first_repeated_by_load(each["load"]).mean("layer")
    return xr.full_like(like.isel(replicate=0), float(by_load))


def pairs_by_lag(each: Answers) -> xr.DataArray:
    """How many pairs of tokens there are at each lag."""
    return xr.DataArray(each["repetition"].attrs["pairs_by_lag"], {"lag": each["repetition"]["lag"].values}, "lag")


SECTION = Section(
    id="repetition",
    title="Repetition in time",
    reading="How often a token has an expert in common with an earlier token at a given distance (the lag), and how"
    " often the same first expert. A line that falls to the dashed one as the lag grows shows an effect of nearby"
    " tokens; a line that stays above it shows an effect of the document, or of an uneven load.",
    ask=ask,
    draw=draw,
)
