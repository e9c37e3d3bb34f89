"""How often each expert is one of a token's choices."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.heatmaps import load_heatmap, load_spread
from analysis.metrics.contrast import contrast_counts
from analysis.metrics.load import ExpertCounts, Load, share_of_experts
from analysis.report.figures import Figure, about, figure, resampled
from analysis.report.section import Answers, Asked, Found, Section
from analysis.scanning import Reducer, sizes
from analysis.statistics.resampling import Resampled, interval

REPLICATES, REPLICATED = 999, 2**24  # of a contrast's bootstrap and shuffles; and numbers held for them (128 MiB)


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """The load, and over resampled documents the choices: `counts`, with the shuffles of a contrast where there is
    one."""
    layers, _, experts = sizes(asked.data)
    replicates = REPLICATED // (layers * experts * (1 + len(asked.documents)))
    replicates = min(REPLICATES, max(99, replicates))
    counts: Reducer = Resampled(ExpertCounts(), replicates)
    if asked.documents:
        counts = contrast_counts(asked.documents, asked.label, replicates)
    return {"load": Load(), "counts": counts}


def answer(found: Found, asked: Asked) -> Found:
    """`load`, and of `counts` the resampled ones by themselves: `resampled`."""
    counts = found["counts"]
    replicates = (counts.sizes["replicate"] - 1) // (1 + len(asked.documents))
    return {"load": found["load"], "resampled": counts.isel(replicate=slice(0, replicates + 1))}


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """Load by layer and expert, on one colour scale."""
    spread = load_spread(*(each["load"] for each in answers))
    for each in answers:
        ends = interval(share_of_experts(each["resampled"]["count"]))
        drawn = load_heatmap(each["load"], ends, spread=spread)
        yield figure("load", f"load-{each.label}", each.label, drawn, about(each["load"], resampled(each["resampled"])))


SECTION = Section(
    id="load",
    title="Load",
    reading="How often each expert is one of a token's choices. Blue experts get less than an even share, orange ones"
    " more; the colour scale is the same for all data sets.",
    ask=ask,
    answer=answer,
    draw=draw,
)
