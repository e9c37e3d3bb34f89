"""How sure the routers are."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.metrics.confidence import MeanWeights
from analysis.report.figures import Figure, band, line_figure, spread
from analysis.report.section import Answers, Asked, Section
from analysis.scanning import Reducer
from analysis.statistics.jackknife import Jackknife


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Mean weights and margins, by units of documents; nothing of routes that came without weights."""
    return {"weights": Jackknife(MeanWeights(), block_tokens=asked.block_tokens)} if asked.weighed else {}


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """Weight of the first choice, and its margin over the second, of the data sets that have weights."""
    answers = [each for each in answers if each.get("weights") is not None]
    if not answers:
        return
    for name, variable, title in (
        ("first-weight", "mean_first", "Weight of the first choice, mean"),
        ("margin", "mean_margin", "Margin of the first choice over the second, mean"),
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
    reading="How sure the routers are: near 1 the first choice has all the weight, at 1/k all choices have the same;"
    " the margin is the first weight less the second, and small margins are what rounding turns around.",
    ask=ask,
    draw=draw,
)
