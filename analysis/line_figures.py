"""The line charts of a report: one number by layer, lag or position, all data sets together."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import xarray as xr

from analysis.answers import Answers
from analysis.figures import NO_INTERVAL, Figure, about, band, figure, resampled
from analysis.line_charts import cache_chart, lines
from analysis.load import balance_of, share_of_experts
from analysis.position import dependent_experts
from analysis.repetition import first_repeated_by_load

ALL = "all data sets"


def glance(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[Figure]:
    """The first screen: words, data sets, neighbours, load."""
    figures = [
        _lines(
            "words",
            {each.label: each.words["specialization"] for each in answers},
            "Words: share of a token that its main expert gets",
            "mean over tokens",
            [each.words for each in answers],
            "occurrences of tokens seen 20 times or more",
            "none: the table of all tokens is too large to resample; what shuffled identities give is drawn instead",
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
                "documents",
                f"95 %, {apart.attrs['replicates']} resamples of whole documents, less the bias that resampling adds",
                nulls=[0.0],
                interval={both: (apart["divergence_low"], apart["divergence_high"])},
            )
        )
    neighbours = {each.label: each.repetition["first_repeated"].sel(lag=1) for each in answers}
    balances = {each.label: _effective_experts(each) for each in answers}
    return [
        *figures,
        _lines(
            "neighbours",
            {label: values.isel(replicate=0) for label, values in neighbours.items()},
            "Neighbours: share with the same first expert",
            "share of pairs",
            [repeated(each, "first_repeated") for each in answers],
            "pairs of neighbours",
            resampled(answers[0].repetition),
            nulls=[each.repetition["first_repeated"].attrs["null"] for each in answers],
            interval={label: band(values) for label, values in neighbours.items()},
        ),
        _lines(
            "effective-experts",
            {label: values.isel(replicate=0) for label, values in balances.items()},
            "Load: experts in effective use, of each layer",
            "experts",
            [balance_of(each.load) for each in answers],
            "tokens",
            f"{resampled(answers[0].resampled)}, less the bias that resampling adds",
            nulls=[float(each.load.sizes["expert"]) for each in answers],
            interval={label: band(values, centred=True) for label, values in balances.items()},
        ),
    ]


def _effective_experts(each: Answers) -> xr.DataArray:
    """Over replicates."""
    share = share_of_experts(each.resampled["count"])
    return balance_of(xr.Dataset({"share": share}, attrs=each.load.attrs))["effective_experts"]


def repetition_by_lag(answers: Sequence[Answers]) -> Iterator[Figure]:
    """Repetition at each distance, mean over layers."""
    for name, variable, title in (
        ("shared-by-lag", "any_shared", "Repetition: pairs that share an expert, mean over layers"),
        ("first-by-lag", "first_repeated", "Repetition: pairs with the same first expert, mean over layers"),
    ):
        means = {each.label: each.repetition[variable].mean("layer") for each in answers}
        by_load = {label: _by_load(each, means[label]) for label, each in zip(means, answers, strict=True)}
        yield _lines(
            name,
            {label: values.isel(replicate=0) for label, values in means.items()},
            title,
            "share of pairs",
            [repeated(each, variable) for each in answers],
            "pairs of neighbours",
            resampled(answers[0].repetition),
            over="lag",
            axis="lag, tokens",
            nulls=[each.repetition[variable].attrs["null"] for each in answers],
            by_chance=by_load if variable == "first_repeated" else None,
            interval={label: band(values) for label, values in means.items()},
            counted={each.label: pairs_by_lag(each) for each in answers},
        )


def repeated(each: Answers, variable: str) -> xr.Dataset:
    """Repetition, with the null of one of its variables."""
    null = f"{each.repetition[variable].attrs['null']:.4g}, for independent and even choices"
    if variable == "first_repeated":
        null += "; with the load as it is, the sum of the squared shares of the first choices"
    return each.repetition.assign_attrs(null=null)


def _by_load(each: Answers, like: xr.DataArray) -> xr.DataArray:
    """What independent first choices with this load give, mean over layers: the same at every lag."""
    by_load = first_repeated_by_load(each.load).mean("layer")
    return xr.full_like(like.isel(replicate=0), float(by_load))


def pairs_by_lag(each: Answers) -> xr.DataArray:
    """How many pairs of tokens there are at each lag."""
    return xr.DataArray(each.repetition.attrs["pairs_by_lag"], {"lag": each.repetition["lag"].values}, "lag")


def confidence(answers: Sequence[Answers]) -> Iterator[Figure]:
    """Weight of the first choice, and its margin over the second."""
    for name, variable, title in (
        ("first-weight", "mean_first", "Weight of the first choice, mean"),
        ("margin", "mean_margin", "Margin of the first choice over the second, mean"),
    ):
        means = {each.label: each.weights[variable] for each in answers}
        yield _lines(
            name,
            {label: values.isel(replicate=0) for label, values in means.items()},
            title,
            "weight",
            [each.weights for each in answers],
            "tokens",
            resampled(answers[0].weights),
            interval={label: band(values) for label, values in means.items()},
        )


def position(answers: Sequence[Answers]) -> Iterator[Figure]:
    """What positions tell of experts, and the experts of which they tell most."""
    yield _lines(
        "position",
        {each.label: each.position["mutual_information"] for each in answers},
        "Position and expert, mutual information in bits",
        "bits",
        [each.position for each in answers],
        "tokens",
        NO_INTERVAL,
        nulls=[0.0],
    )
    for each in answers:
        found = dependent_experts(each.position)
        ranked = [found.isel(rank=index) for index in range(found.sizes["rank"])]
        names = [f"layer {int(one['layer'])}, expert {int(one['expert'])}" for one in ranked]
        drawn = lines(
            {name: one["times"] for name, one in zip(names, ranked, strict=True)},
            title="Load by position, times the expert's own mean",
            subtitle=[f"n = {found.attrs['n']:,} tokens; dashed: 1, where the position does not matter"],
            unit="times its mean share",
            over="start",
            axis="position in the row, from",
            each="expert",
            null=1.0,
            counted={name: one["tokens"] for name, one in zip(names, ranked, strict=True)},
        )
        yield figure("lines", f"position-{each.label}", each.label, drawn, about(found, NO_INTERVAL))


def caching(answers: Sequence[Answers]) -> Figure:
    """Hit rates by cache size."""
    drawn = cache_chart({each.label: each.caches for each in answers})
    return figure("lines", "caching", ALL, drawn, about(answers[0].caches, "none: whole rows are simulated once"))


def _lines(
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
    **where: Any,
) -> Figure:
    """One number by place for all data sets, what it comes from, what was counted for it, and its interval in words.

    `nulls` are those of the data sets: one dashed rule where they agree, else, of different models, dashed lines.
    """
    null = nulls[0] if len(set(nulls)) == 1 else None
    if null is None and by_chance is None and nulls:
        by_chance = {label: xr.full_like(values[label], each) for label, each in zip(values, nulls, strict=True)}
    told = [f"n = {sum(result.attrs['n'] for result in results):,} {counted_in}"]
    dashed = [] if null is None else [f"{null:.3g}, by chance or even"]
    if by_chance is not None:
        dashed.append("in colour, by chance with that load" if dashed else "by chance")
    told += [f"dashed: {'; '.join(dashed)}"] if dashed else []
    drawn = lines(
        values,
        title=title,
        subtitle=told,
        unit=unit,
        null=null,
        by_chance=by_chance,
        interval=interval,
        **where,
    )
    return figure("lines", name, ALL, drawn, about(results[0], spread))
