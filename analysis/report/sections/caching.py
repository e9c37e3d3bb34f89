"""Hit rates of expert caches."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.lines import cache_chart
from analysis.metrics.caching import CacheCounts, cache_hits_of
from analysis.report.figures import ALL, Figure, about, figure
from analysis.report.section import Answers, Asked, Found, Section
from analysis.scanning import Reducer
from analysis.statistics.parts import Thinned

CACHED_TOKENS = 2**20  # about; simulating caches takes as long as all other counting (arbitrary)


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Caches of all sizes, over a part of the documents."""
    share = min(1.0, CACHED_TOKENS / max(1, asked.state.tokens_done))
    return {"caches": Thinned(CacheCounts(policies=("lru", "belady")), share)}


def answer(found: Found, asked: Asked) -> Found:
    """`caches`: hit rates."""
    return {"caches": cache_hits_of(found["caches"])}


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """Hit rates by cache size."""
    drawn = cache_chart({each.label: each["caches"] for each in answers})
    yield figure("lines", "caching", ALL, drawn, about(answers[0]["caches"], "none: whole rows are simulated once"))


SECTION = Section(
    id="caching",
    title="Caching",
    reading="How often an expert that is needed is already in a cache, mean over layers: LRU evicts the least recently"
    " used one, and Belady, which knows the future, bounds what any policy can reach.",
    ask=ask,
    answer=answer,
    draw=draw,
)
