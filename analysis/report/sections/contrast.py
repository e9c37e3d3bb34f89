"""How the data sets of one model differ."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.heatmaps import contrast_heatmap
from analysis.metrics.contrast import contrast_of, differences_in_words
from analysis.metrics.mean_contrast import mean_contrast_of
from analysis.report.figures import Figure, about, figure
from analysis.report.section import Answers, Asked, Finding, Section
from analysis.report.sections import load
from analysis.scanning import Reducer


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """The counts of the load's section, by units of documents."""
    return load.ask(asked)


def contrast_between(answers: Sequence[Answers]) -> xr.Dataset | None:
    """How the captured data sets of the first one's model differ; None if there is only one."""
    captured = [each for each in answers if each["load"].attrs["n"]]
    alike = {each.label: each["counts"] for each in captured if not why_apart(captured[0], each)}
    return contrast_of(alike) if len(alike) > 1 else None


def means_between(answers: Sequence[Answers], name: str, variable: str) -> xr.Dataset | None:
    """How the data sets of the first one's model differ in a mean that was counted by units of documents as `name`;
    None if there are fewer than two."""
    counted = [each for each in answers if each[name].attrs["n"]]
    alike = {each.label: each[name] for each in counted if not why_apart(counted[0], each)}
    return mean_contrast_of(alike, variable) if len(alike) > 1 else None


def the_others(apart: xr.Dataset, data_set: str) -> str:
    """The data sets that one is compared with, in words."""
    others = [name for name in apart["data_set"].values.tolist() if name != data_set]
    return others[0] if len(others) == 1 else "the other data sets"


def of_expert(said: str, each: Answers, cell: xr.Dataset | xr.DataArray) -> Finding:
    """A sentence about one expert of a data set; `cell` has its layer and its number."""
    layer, expert = int(cell["layer"]), int(cell["expert"])
    return Finding(said=said, of=each, page=f"expert/{layer}/{expert}", layer=layer)


def why_apart(one: Answers, other: Answers) -> str:
    """Why two data sets are not contrasted, in words: they come from different models. Empty if they are contrasted."""
    shapes = [(each["load"]["layer"].values.tolist(), *each["load"]["counts"].shape[1:]) for each in (one, other)]
    if shapes[0] != shapes[1]:
        return "different layers, choices or experts"
    return differences_in_words(one.attrs, other.attrs)


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """How the data sets differ; nothing if there is nothing to compare."""
    if apart is None:
        return
    spread = max(float(abs(apart["difference"]).max()), 0.05)
    interval = "95%, simultaneous for all cells, listed with the numbers of each cell"
    definition = about(apart, interval)
    for label in apart["data_set"].values.tolist():
        drawn = contrast_heatmap(apart, label, spread=spread)
        yield figure("domains", f"domains-{label}", label, drawn, definition)


SECTION = Section(
    id="domains",
    title="Experts of each data set",
    reading="How many percentage points more of a data set's tokens choose an expert than of the others' on average."
    " Pale cells may be due to chance: their interval, simultaneous for all cells, contains 0.",
    ask=ask,
    draw=draw,
)
