"""The charts of a report under their headings, each with how to read it and where its numbers come from."""

from collections.abc import Sequence
from dataclasses import dataclass

import xarray as xr

from analysis import heat_figures, line_figures, path_figures
from analysis.answers import Answers
from analysis.figures import Figure


@dataclass(frozen=True, kw_only=True)
class Section:
    """Charts under one heading."""

    id: str
    title: str
    reading: str
    """How to read them."""
    figures: list[Figure]


def sections(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[Section]:
    """All charts, in the page's order; `apart` from `analysis.answers.contrast_between`."""
    listed = {int(number) for each in answers for number in each.tokens["layer"].values}
    many = len({int(number) for each in answers for number in each.load["layer"].values})
    some = f" (at {len(listed)} of {many} layers: all would make the page too large)" if len(listed) < many else ""
    found = [
        Section(
            id="glance",
            title="At a glance",
            reading="One number a layer, a line for each data set; dashed is what chance gives, bands are 95 %"
            " intervals over documents.",
            figures=line_figures.glance(answers, apart),
        ),
        Section(
            id="load",
            title="Load",
            reading="How often each expert is one of a token's choices. Blue experts get less than an even share,"
            " orange ones more; the colour scale is the same for all data sets.",
            figures=list(heat_figures.load(answers)),
        ),
        Section(
            id="tokens",
            title="Tokens of each expert",
            reading=f"The tokens that an expert gets most out of proportion{some}. ▁ is a space, <0x0A> a line feed.",
            figures=[heat_figures.tokens(each) for each in answers],
        ),
        Section(
            id="domains",
            title="Experts of each data set",
            reading="By how many points more of a data set's tokens reach an expert than of the others' on average."
            " Pale cells may be chance: documents were shuffled between the data sets.",
            figures=list(heat_figures.domains(apart)),
        ),
        Section(
            id="paths",
            title="Paths",
            reading="From each expert to the experts that the same tokens choose first at the next layer. Only links"
            " surely above chance are drawn, with more ink the further above, and wider the more tokens take them; a"
            " circle is as large as its share of the first choices. Hover over an expert to see its own links alone."
            " Choose a data set, and one of its tokens to see where that goes: half of those listed are the most"
            " frequent, the others go furthest from where all tokens go (“87% to 5:3” is to expert 3 at layer 5).",
            figures=list(path_figures.paths(answers)),
        ),
        Section(
            id="repetition",
            title="Repetition in time",
            reading="How often a token has an expert in common with the one so many places before it, and the same"
            " first expert. A line that falls to the dashed one as the lag grows is about neighbours; what stays above"
            " it belongs to the document, or to an uneven load.",
            figures=[*line_figures.repetition_by_lag(answers), *heat_figures.repetition_by_layer(answers)],
        ),
        Section(
            id="confidence",
            title="Router confidence",
            reading="How sure the routers are: near 1 the first choice has all the weight, at 1/k all choices have the"
            " same; the margin is the first weight less the second, and small margins are what rounding turns around.",
            figures=list(line_figures.confidence(answers)),
        ),
        Section(
            id="position",
            title="Position",
            reading="What a token's place in its row tells of its experts: 0 where experts do not mind the place."
            " Below, the experts that mind it most: 1 is as often as anywhere, and position 0 is a row's first token.",
            figures=list(line_figures.position(answers)),
        ),
        Section(
            id="caching",
            title="Caching",
            reading="How often an expert that is needed is already in a cache, mean over layers: LRU evicts the least"
            " recently used one, and Belady, which knows the future, bounds what any policy can reach.",
            figures=[line_figures.caching(answers)],
        ),
    ]
    return [section for section in found if section.figures]
