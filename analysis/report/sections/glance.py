"""The first screen: words, data sets, neighbours and load, one number per layer."""

from collections.abc import Mapping, Sequence

import xarray as xr

from analysis.metrics.load import balance_null, balance_of, share_of_experts
from analysis.metrics.vocabulary import vocabulary_specialization_of
from analysis.report.figures import Figure, band, line_figure, spread
from analysis.report.section import TOKEN_MIN_COUNT, Answers, Asked, Found, Section
from analysis.report.sections import load, repetition, tokens
from analysis.report.sections.repetition import repeated
from analysis.scanning import Reducer


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Load, repetition, and the counts of all tokens in order and shuffled."""
    return {**load.ask(asked), **repetition.ask(asked), **tokens.ask(asked)}


def answer(found: Found, asked: Asked) -> Found:
    """`words`: vocabulary specialization; `balance_null`: how even a truly even load looks in a sample."""
    counts, shuffled = found["token_counts"], found["shuffled_tokens"]
    return {
        "balance_null": balance_null(found["counts"]),
        "words": vocabulary_specialization_of(counts, [shuffled], min_count=TOKEN_MIN_COUNT),
    }


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[Figure]:
    """The first screen: words, data sets, neighbours, load."""
    figures = [
        line_figure(
            "words",
            {each.label: each["words"]["specialization"] for each in answers},
            "Words: share of a token's occurrences at its main expert",
            "mean over tokens",
            [each["words"] for each in answers],
            "occurrences of tokens that occur at least 20 times",
            "none: the table of all tokens is too large to resample; dashed lines are tokens shuffled within documents",
            by_chance={each.label: each["words"]["null"] for each in answers},
        )
    ]
    if apart is not None:
        both = "between data sets"
        figures.append(
            line_figure(
                "data-sets",
                {both: apart["divergence_corrected"]},
                "Data sets: divergence of their loads, in bits",
                "bits",
                [apart.assign_attrs(n=sum(apart.attrs["documents"].values()))],
                "documents",
                "95%, jackknife over units of whole documents of each data set, corrected for its bias estimate",
                nulls=[0.0],
                interval={both: (apart["divergence_low"], apart["divergence_high"])},
                each="compared",
            )
        )
    neighbours = {each.label: each["repetition"]["first_repeated"].sel(lag=1) for each in answers}
    balances = {each.label: _effective_experts(each) for each in answers}
    return [
        *figures,
        line_figure(
            "neighbours",
            {label: values.isel(replicate=0) for label, values in neighbours.items()},
            "Neighbours: share of pairs with the same first expert",
            "share of pairs",
            [repeated(each, "first_repeated") for each in answers],
            "pairs of neighbouring tokens",
            spread(answers[0]["repetition"]),
            nulls=[each["repetition"]["first_repeated"].attrs["null"] for each in answers],
            interval={label: band(values, scale="share") for label, values in neighbours.items()},
        ),
        line_figure(
            "effective-experts",
            {label: values.isel(replicate=0) for label, values in balances.items()},
            "Load: effective number of experts per layer",
            "experts",
            [balance_of(each["load"]) for each in answers],
            "tokens",
            f"{spread(answers[0]['counts'])}, corrected for its bias estimate",
            by_chance={each.label: each["balance_null"]["effective_experts"].sel(of="mean") for each in answers},
            interval={label: band(values, corrected=True) for label, values in balances.items()},
        ),
    ]


def _effective_experts(each: Answers) -> xr.DataArray:
    """Over replicates."""
    share = share_of_experts(each["counts"]["counts"])
    return balance_of(xr.Dataset({"share": share}, attrs=each["load"].attrs))["effective_experts"]


SECTION = Section(
    id="glance",
    title="At a glance",
    reading="One number per layer, one line per data set. Dashed lines show the value expected by chance; bands are"
    " 95% intervals over documents.",
    ask=ask,
    answer=answer,
    draw=draw,
)
