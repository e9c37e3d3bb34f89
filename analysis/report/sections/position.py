"""What a token's place in its row tells of its experts."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.lines import lines
from analysis.metrics.load import ExpertCounts
from analysis.metrics.position import dependent_experts, position_load_of
from analysis.report.figures import NO_INTERVAL, Figure, about, figure, line_figure
from analysis.report.section import Answers, Asked, Found, Section
from analysis.scanning import Reducer


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Load in ranges of positions that double."""
    return {"position": ExpertCounts("doubling")}


def answer(found: Found, asked: Asked) -> Found:
    """`position`: shares, and what positions tell of experts."""
    return {"position": position_load_of(found["position"])}


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """What positions tell of experts, and the experts of which they tell most."""
    yield line_figure(
        "position",
        {each.label: each["position"]["mutual_information"] for each in answers},
        "Position and expert, mutual information in bits",
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


SECTION = Section(
    id="position",
    title="Position",
    reading="What a token's place in its row tells of its experts: 0 where experts do not mind the place. Below, the"
    " experts that mind it most: 1 is as often as anywhere, and position 0 is a row's first token.",
    ask=ask,
    answer=answer,
    draw=draw,
)
