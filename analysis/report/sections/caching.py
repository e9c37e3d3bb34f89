"""Hit rates of expert caches."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.lines import cache_chart
from analysis.metrics.caching import CacheCounts, cache_hits_of
from analysis.report.figures import ALL, Figure, about, figure
from analysis.report.section import Answers, Asked, Found, Section
from analysis.scanning import Reducer
from analysis.statistics.sampling import SampledRows, of_how_many

CACHED_TOKENS = 2**20  # about; simulating caches takes as long as all other counting (arbitrary)


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Caches of all sizes, over a part of the rows."""
    one_in = min(-(-asked.state.tokens_done // CACHED_TOKENS), asked.data.sizes["doc"])
    return {"caches": SampledRows(CacheCounts(policies=("lru", "belady")), max(1, one_in))}


def answer(found: Found, asked: Asked) -> Found:
    """`caches`: hit rates."""
    return {"caches": cache_hits_of(found["caches"])}


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """Hit rates by cache size."""
    drawn = cache_chart({each.label: each["caches"] for each in answers})
    parts = {each.label: of_how_many(each["caches"]) for each in answers}
    of = "; ".join(f"{label}: {part}, chosen by a hash" for label, part in parts.items() if part)
    spread = f"none: whole rows are simulated once{of and f' ({of})'}"
    yield figure("lines", "caching", ALL, drawn, about(answers[0]["caches"], spread))


SECTION = Section(
    id="caching",
    title="Caching",
    reading="How often an expert that is needed is already in a cache, mean over layers: LRU evicts the least recently"
    " used one, and Belady, which knows the future, bounds what any policy can reach.",
    ask=ask,
    answer=answer,
    draw=draw,
)
