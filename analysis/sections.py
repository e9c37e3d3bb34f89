"""The charts of a report under their headings, each with how to read it and where its numbers come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import xarray as xr

from analysis import charts
from analysis.answers import Answers
from analysis.load import balance_of

Drawn = Mapping[str, tuple[alt.Chart | alt.LayerChart, xr.Dataset]]
"""By data set: a chart, and the result that it shows."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One chart of the page."""

    kind: str
    """What the page's script must know: "tokens" are of the layer that is chosen."""
    name: str
    """What files of it are called."""
    caption: str
    spec: dict[str, Any]
    about: str
    """Definition, estimator, null and source."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Charts under one heading."""

    id: str
    title: str
    reading: str
    """How to read them."""
    figures: list[Figure]


def sections(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[Section]:
    """All charts, in the page's order; `apart` from `analysis.answers.contrast_between`."""
    spread = charts.load_spread(*(each.load for each in answers))
    listed = {int(number) for each in answers for number in each.tokens["layer"].values}
    many = len({int(number) for each in answers for number in each.load["layer"].values})
    some = f" (at {len(listed)} of {many} layers: all would make the page too large)" if len(listed) < many else ""
    found = [
        Section(
            id="glance",
            title="At a glance",
            reading="One number a layer, a line for each data set; dashed is what chance gives.",
            figures=_glance(answers, apart),
        ),
        Section(
            id="load",
            title="Load",
            reading="How often each expert is one of a token's choices. Blue experts get less than an even share,"
            " orange ones more; the colour scale is the same for all data sets.",
            figures=_of_each(
                "load", {each.label: (charts.load_heatmap(each.load, spread=spread), each.load) for each in answers}
            ),
        ),
        Section(
            id="tokens",
            title="Tokens of each expert",
            reading=f"The tokens that an expert gets most out of proportion{some}. ▁ is a space, <0x0A> a line feed.",
            figures=_of_each(
                "tokens", {each.label: (charts.token_chart(each.tokens), each.tokens) for each in answers}
            ),
        ),
        Section(
            id="domains",
            title="Experts of each data set",
            reading="By how many points more of a data set's tokens reach an expert than of the others' on average."
            " Pale cells may be chance: documents were shuffled between the data sets.",
            figures=_domains(apart),
        ),
        Section(
            id="paths",
            title="Paths",
            reading="From each expert to the experts that the same tokens choose first at the next layer. Only links"
            " above chance are drawn, the stronger the further above; a circle is as large as its share of the first"
            " choices. Hover over an expert to see its own links alone.",
            figures=_of_each(
                "paths", {each.label: (charts.path_chart(each.moves, each.load), each.moves) for each in answers}
            ),
        ),
        Section(
            id="confidence",
            title="Router confidence",
            reading="How sure the routers are: near 1 the first choice has all the weight, at 1/k all choices have the"
            " same; the margin is the first weight less the second, and small margins are what rounding turns around.",
            figures=_confidence(answers),
        ),
        Section(
            id="position",
            title="Position",
            reading="What a token's place in its row tells of its experts: 0 where experts do not mind the place.",
            figures=[
                _lines(
                    "position",
                    {each.label: each.position["mutual_information"] for each in answers},
                    "Position and expert, mutual information in bits",
                    "bits",
                    [each.position for each in answers],
                    "tokens",
                    null=0.0,
                )
            ],
        ),
        Section(
            id="caching",
            title="Caching",
            reading="How often an expert that is needed is already in a cache, mean over layers: LRU evicts the least"
            " recently used one, and Belady, which knows the future, bounds what any policy can reach.",
            figures=[
                Figure(
                    kind="lines",
                    name="caching",
                    caption="all data sets",
                    spec=_spec(charts.cache_chart({each.label: each.caches for each in answers})),
                    about=_about(answers[0].caches),
                )
            ],
        ),
    ]
    return [section for section in found if section.figures]


def _of_each(kind: str, drawn: Drawn) -> list[Figure]:
    """One chart for each data set."""
    return [
        Figure(kind=kind, name=f"{kind}-{label}", caption=label, spec=_spec(chart), about=_about(result))
        for label, (chart, result) in drawn.items()
    ]


def _domains(apart: xr.Dataset | None) -> list[Figure]:
    """None where there is nothing to compare."""
    if apart is None:
        return []
    spread = max(float(abs(apart["difference"]).max()), 0.05)
    labels = apart["data_set"].values.tolist()
    drawn = {label: (charts.contrast_heatmap(apart, label, spread=spread), apart) for label in labels}
    return _of_each("domains", drawn)


def _confidence(answers: Sequence[Answers]) -> list[Figure]:
    results = [each.confidence for each in answers]
    return [
        _lines(name, {each.label: each.confidence[variable] for each in answers}, title, "weight", results, "tokens")
        for name, variable, title in (
            ("first-weight", "mean_first", "Weight of the first choice, mean"),
            ("margin", "mean_margin", "Margin of the first choice over the second, mean"),
        )
    ]


def _glance(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[Figure]:
    """The first screen: words, data sets, neighbours, load."""
    figures = [
        _lines(
            "words",
            {each.label: each.words["specialization"] for each in answers},
            "Words: share of a token that its main expert gets",
            "mean over tokens",
            [each.words for each in answers],
            "occurrences of tokens seen 20 times or more",
            by_chance={each.label: each.words["null"] for each in answers},
        )
    ]
    if apart is not None:
        both = "between data sets"
        figures.append(
            _lines(
                "data-sets",
                {both: apart["divergence_corrected"]},
                "Data sets: how far apart their loads are, in bits",
                "bits",
                [apart.assign_attrs(n=sum(apart.attrs["documents"].values()))],
                "documents; 95 % interval over documents",
                null=0.0,
                interval={both: (apart["divergence_low"], apart["divergence_high"])},
            )
        )
    repeated = answers[0].repetition["first_repeated"]
    balances = {each.label: balance_of(each.load) for each in answers}
    return [
        *figures,
        _lines(
            "neighbours",
            {each.label: each.repetition["first_repeated"].isel(lag=0) for each in answers},
            "Neighbours: share with the same first expert",
            "share of pairs",
            [each.repetition for each in answers],
            "pairs of neighbours",
            null=repeated.attrs["null"],
        ),
        _lines(
            "effective-experts",
            {label: balance["effective_experts"] for label, balance in balances.items()},
            "Load: experts in effective use, of each layer",
            "experts",
            list(balances.values()),
            "tokens",
            null=float(answers[0].load.sizes["expert"]),
        ),
    ]


def _lines(
    name: str,
    values: Mapping[str, xr.DataArray],
    title: str,
    unit: str,
    results: Sequence[xr.Dataset],
    counted: str,
    *,
    null: float | None = None,
    by_chance: Mapping[str, xr.DataArray] | None = None,
    interval: Mapping[str, tuple[xr.DataArray, xr.DataArray]] | None = None,
) -> Figure:
    """One number a layer for all data sets, what it comes from, and what was counted for it."""
    told = [f"n = {sum(result.attrs['n'] for result in results):,} {counted}"]
    if by_chance is not None:
        told.append("dashed: by chance")
    elif null is not None:
        told.append(f"dashed: {null:.3g}, by chance or even")
    drawn = charts.layer_lines(
        values,
        title=title,
        subtitle=told,
        unit=unit,
        null=null,
        by_chance=by_chance,
        interval=interval,
    )
    return Figure(kind="lines", name=name, caption="all data sets", spec=_spec(drawn), about=_about(results[0]))


def _about(result: xr.Dataset) -> str:
    """Definition, estimator, null and source, as a result carries them."""
    told = {name: result.attrs.get(name) for name in ("definition", "estimator", "null", "source")}
    return " ".join(f"{name.capitalize()}: {text}." for name, text in told.items() if text not in (None, "-"))


def _spec(chart: alt.Chart | alt.LayerChart) -> dict[str, Any]:
    spec: dict[str, Any] = chart.to_dict()
    spec.pop("config", None)  # the page puts in the theme for light or dark
    return spec
