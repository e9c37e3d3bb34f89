"""How often each expert is among a token's choices."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.heatmaps import load_heatmap, load_spread
from analysis.metrics.load import ExpertCounts, Load, share_of_experts
from analysis.report.figures import Figure, about, figure, spread
from analysis.report.section import Answers, Asked, Section
from analysis.scanning import Reducer
from analysis.statistics.jackknife import Jackknife, interval


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """The load, and the choices by units of documents: `counts`."""
    return {"load": Load(), "counts": Jackknife(ExpertCounts(), block_tokens=asked.block_tokens)}


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """Load by layer and expert, on one colour scale."""
    widest = load_spread(*(each["load"] for each in answers))
    for each in answers:
        ends = interval(share_of_experts(each["counts"]["counts"]), scale="share")
        drawn = load_heatmap(each["load"], ends, spread=widest)
        yield figure("load", f"load-{each.label}", each.label, drawn, about(each["load"], spread(each["counts"])))


SECTION = Section(
    id="load",
    title="Load",
    reading="How often each expert is among a token's choices. Blue experts get less than an even share, orange experts"
    " more; the colour scale is the same for all data sets.",
    ask=ask,
    draw=draw,
)
