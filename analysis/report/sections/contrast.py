"""How the data sets of one model differ."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.heatmaps import contrast_heatmap
from analysis.metrics.contrast import contrast_of, count_documents
from analysis.report.figures import Figure, about, figure
from analysis.report.section import Answers, Asked, Found, Section
from analysis.report.sections import load
from analysis.scanning import Reducer, sizes


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """What the load's section asks: its counts hold the shuffles too."""
    return load.ask(asked)


def answer(found: Found, asked: Asked) -> Found:
    """`counts` of resampled and of shuffled documents, where the data set is contrasted with others."""
    return {"counts": found["counts"]} if asked.documents else {}


def contrasted(captures: Mapping[str, xr.Dataset]) -> dict[str, int]:
    """The data sets that are of the first one's model, with their documents; none where that is alone."""
    first = next(iter(captures.values()))

    def model(data: xr.Dataset) -> tuple[object, ...]:
        return data.attrs.get("model"), *sizes(data), *data["layer"].values.tolist()

    alike = {label: count_documents(data) for label, data in captures.items() if model(data) == model(first)}
    return alike if len(alike) > 1 else {}


def contrast_between(answers: Sequence[Answers]) -> xr.Dataset | None:
    """How the data sets of one model differ, as far as they were counted for it; None where fewer than two were."""
    compared = {each.label: each for each in answers if "counts" in each.found and each["load"].attrs["n"]}
    if len(compared) < 2:
        return None
    counts = {label: each["counts"] for label, each in compared.items()}
    documents = {label: each.documents for label, each in compared.items()}
    return contrast_of(counts, documents)


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """How the data sets differ; nothing where there is nothing to compare."""
    if apart is None:
        return
    spread = max(float(abs(apart["difference"]).max()), 0.05)
    interval = f"95 %, {apart.attrs['replicates']} resamples of whole documents, in the numbers of each cell"
    definition = about(apart, interval)
    for label in apart["data_set"].values.tolist():
        drawn = contrast_heatmap(apart, label, spread=spread)
        yield figure("domains", f"domains-{label}", label, drawn, definition)


SECTION = Section(
    id="domains",
    title="Experts of each data set",
    reading="By how many points more of a data set's tokens reach an expert than of the others' on average. Pale cells"
    " may be chance: documents were shuffled between the data sets.",
    ask=ask,
    answer=answer,
    draw=draw,
)
