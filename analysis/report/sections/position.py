"""How the choices depend on the position in the row."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.lines import lines
from analysis.metrics.load import ExpertCounts
from analysis.metrics.position import dependent_experts, position_load_of
from analysis.report.figures import NO_INTERVAL, Figure, about, figure, line_figure
from analysis.report.section import Answers, Asked, Found, Section
from analysis.scanning import Reducer


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Load in ranges of positions that double in length."""
    return {"position": ExpertCounts("doubling")}


def answer(found: Found, asked: Asked) -> Found:
    """`position`: shares, and the information of positions about experts."""
    return {"position": position_load_of(found["position"])}


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """The information of positions about experts, and the most affected experts."""
    yield line_figure(
        "position",
        {each.label: each["position"]["mutual_information"] for each in answers},
        "Mutual information of position and expert, in bits",
        "bits",
        [each["position"] for each in answers],
        "tokens",
        NO_INTERVAL,
        nulls=[0.0],
    )
    for each in answers:
        found = dependent_experts(each["position"])
        ranked = [found.isel(place=index) for index in range(found.sizes["place"])]
        names = [f"layer {int(one['layer'])}, expert {int(one['expert'])}" for one in ranked]
        drawn = lines(
            {name: one["times"] for name, one in zip(names, ranked, strict=True)},
            title="Load by position, relative to the expert's mean",
            subtitle=[f"n = {found.attrs['n']:,} tokens; dashed: 1, no dependence on position"],
            unit="times its mean share",
            over="start",
            axis="position in the row (start of range)",
            each="expert",
            null=1.0,
            counted={name: one["tokens"] for name, one in zip(names, ranked, strict=True)},
        )
        yield figure("lines", f"position-{each.label}", each.label, drawn, about(found, NO_INTERVAL))


SECTION = Section(
    id="position",
    title="Position",
    reading="How much a token's position in its row says about its experts; 0 means that experts do not depend on it."
    " Below: the most affected experts. A value of 1 is the expert's average share; position 0 is the first token of a"
    " row.",
    ask=ask,
    answer=answer,
    draw=draw,
)
