"""How well the model predicts: along a row, by expert, and where its routers are uncertain; if it was recorded."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.heatmaps import logprob_heatmap
from analysis.metrics.logprob import LogProbability, logprob_by_expert_of
from analysis.metrics.surprise import Surprise, SurpriseEntropy, surprise_and_entropy_of
from analysis.report.figures import Figure, about, figure, line_figure
from analysis.report.section import Answers, Asked, Finding, Found, Section
from analysis.report.sections.contrast import of_expert
from analysis.scanning import Reducer
from analysis.statistics.jackknife import Jackknife, how, with_intervals

SURE = 0.05
TOGETHER = "95%, simultaneous for all cells, documents resampled with replacement"


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Log-probabilities by expert and by position and, if there are logits, the sums for correlations."""
    if "logprob" not in asked.data:
        return {}
    asks: dict[str, Reducer] = {"surprise": Surprise(), "logprob": LogProbability()}
    if asked.scores is not None:
        asks["surprise_entropy"] = SurpriseEntropy(asked.scores)
    return {name: Jackknife(reducer, block_tokens=asked.block_tokens) for name, reducer in asks.items()}


def answer(found: Found, asked: Asked) -> Found:
    """The same names, each with its intervals."""
    made: dict[str, Callable[[xr.Dataset], xr.Dataset]] = {
        "surprise": with_intervals,
        "logprob": logprob_by_expert_of,
        "surprise_entropy": surprise_and_entropy_of,
    }
    return {name: made[name](counts) for name, counts in found.items()}


def findings(answers: Sequence[Answers]) -> Iterator[Finding]:
    """The expert with the clearest difference in log-probability, for each data set that has one beyond chance."""
    yield from filter(None, (matters(each) for each in answers if each.get("logprob") is not None))


def matters(each: Answers) -> Finding | None:
    """The expert with the clearest difference in log-probability within the same token; None if there is none."""
    found = each["logprob"]
    sure = found["within_p"] <= SURE
    if not bool(sure.any()):
        return None
    least = found["within_low"].where(found["within"] > 0, -found["within_high"]).where(sure)
    cell = found.isel(least.fillna(-1.0).argmax(("layer", "expert")))
    more = "more" if float(cell["within"]) > 0 else "less"
    low, high = sorted(abs(float(cell[f"within_{end}"])) for end in ("low", "high"))
    said = (
        f"{each.label}: if a token chooses expert {int(cell['expert'])} at layer {int(cell['layer'])}, the next one"
        f" is {more} probable than after the same token in the same row that does not, by"
        f" {abs(float(cell['within'])):.2f} nats ({low:.2f} to {high:.2f}, simultaneous 95% interval over documents"
        f" for all experts and layers; {int(cell['compared']):,} tokens compared)."
    )
    return of_expert(said, each, cell)


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """Surprise by position, log-probability by expert, and the correlation with the routers' entropy by layer."""
    having = {each.label: each for each in answers if each.get("surprise") is not None}
    if not having:
        return
    by_position = {label: each["surprise"] for label, each in having.items()}
    yield line_figure(
        "surprise",
        {label: found["mean_surprise"] for label, found in by_position.items()},
        "Surprise of the next token by position in the row",
        "nats",
        list(by_position.values()),
        "tokens",
        how(next(iter(by_position.values())).attrs["units"]),
        over="start",
        axis="position in the row (start of range)",
        interval={label: _ends(found, "mean_surprise") for label, found in by_position.items()},
        counted={label: found["tokens"] for label, found in by_position.items()},
    )
    widest = max(0.05, *(float(abs(each["logprob"]["within"]).fillna(0.0).quantile(0.95)) for each in having.values()))
    for label, each in having.items():
        found = each["logprob"]
        yield figure(
            "logprob", f"logprob-{label}", label, logprob_heatmap(found, spread=widest), about(found, TOGETHER)
        )
    both = {
        label: each["surprise_entropy"] for label, each in having.items() if each.get("surprise_entropy") is not None
    }
    for variable, title in (
        ("correlation", "Correlation of surprise and router entropy"),
        ("within", "Correlation of surprise and router entropy within the same token"),
    ):
        if both:
            yield line_figure(
                f"surprise-entropy-{variable}",
                {label: found[variable] for label, found in both.items()},
                title,
                "correlation",
                list(both.values()),
                "tokens",
                how(next(iter(both.values())).attrs["units"]),
                nulls=[0.0],
                interval={label: _ends(found, variable) for label, found in both.items()},
            )


def _ends(found: xr.Dataset, name: str) -> tuple[xr.DataArray, xr.DataArray]:
    return found[f"{name}_low"], found[f"{name}_high"]


SECTION = Section(
    id="surprise",
    title="Surprise",
    reading="Surprise is the negative log-probability of the next token. Frequent words are easy to predict and have"
    " their own experts. So the map compares a token with the same token in the same row: orange if the next"
    " token is more probable when the token chooses the expert, pale if that may be chance. This is a comparison and"
    " does not show a cause.",
    findings=findings,
    ask=ask,
    answer=answer,
    draw=draw,
)
