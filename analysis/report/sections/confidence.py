"""The confidence of the routers."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.metrics.confidence import MeanWeights
from analysis.report.figures import Figure, band, line_figure, spread
from analysis.report.section import Answers, Asked, Section
from analysis.scanning import Reducer
from analysis.statistics.jackknife import Jackknife


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Mean weights and margins, by units of documents; nothing if routes were imported without weights."""
    return {"weights": Jackknife(MeanWeights(), block_tokens=asked.block_tokens)} if asked.weighed else {}


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """Weight of the first choice, and its margin over the second, for the data sets that have weights."""
    answers = [each for each in answers if each.get("weights") is not None]
    if not answers:
        return
    for name, variable, title in (
        ("first-weight", "mean_first", "Mean weight of the first choice"),
        ("margin", "mean_margin", "Mean margin of the first choice over the second"),
    ):
        means = {each.label: each["weights"][variable] for each in answers}
        yield line_figure(
            name,
            {label: values.isel(replicate=0) for label, values in means.items()},
            title,
            "weight",
            [each["weights"] for each in answers],
            "tokens",
            spread(answers[0]["weights"]),
            interval={label: band(values, scale="share") for label, values in means.items()},
        )


SECTION = Section(
    id="confidence",
    title="Router confidence",
    reading="The weight of the first choice is near 1 if it has all the weight, and 1/k if all choices have the same"
    " weight. The margin is the first weight minus the second; if it is small, rounding may change the order of the"
    " choices.",
    ask=ask,
    draw=draw,
)
