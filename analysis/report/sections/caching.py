"""Hit rates of expert caches."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.metrics.caching import CacheCounts, Policy, cache_hits_of
from analysis.report.figures import Figure, line_figure
from analysis.report.section import Answers, Asked, Found, Section
from analysis.scanning import Reducer
from analysis.statistics.sampling import SampledRows, of_how_many

CACHED_TOKENS = 2**20  # approximately; simulating caches takes as long as all other counting (arbitrary)
POLICIES: Mapping[Policy, str] = {"lru": "LRU", "belady": "Belady, the optimum that knows the future"}


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Caches of all sizes, over a part of the rows."""
    one_in = min(-(-asked.state.tokens_done // CACHED_TOKENS), asked.data.sizes["doc"])
    return {"caches": SampledRows(CacheCounts(policies=tuple(POLICIES)), max(1, one_in))}


def answer(found: Found, asked: Asked) -> Found:
    """`caches`: hit rates."""
    return {"caches": cache_hits_of(found["caches"])}


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """Hit rates by cache size, mean over layers: a panel for each policy, on one scale."""
    parts = {each.label: of_how_many(each["caches"]) for each in answers}
    sampled = [f"{label}: {part}" for label, part in parts.items() if part]
    of = "; ".join(f"{part}, selected by a hash" for part in sampled)
    spread = f"none: whole rows are simulated once{of and f' ({of})'}"
    for policy, title in POLICIES.items():
        rates = {each.label: each["caches"].sel(policy=policy) for each in answers}
        by_chance = {label: found["null"] for label, found in rates.items() if found["null"].notnull().any()}
        yield line_figure(
            f"caching-{policy}",
            {label: found["hit_rate"].mean("layer") for label, found in rates.items()},
            f"Cache hit rate, {title}",
            "hit rate, mean over layers",
            list(rates.values()),
            "tokens",
            spread,
            over="cache_size",
            axis="experts of a layer that the cache holds",
            domain=(0.0, 1.0),
            by_chance=by_chance or None,
            notes=[f"{part}, as a sample" for part in sampled],
        )


SECTION = Section(
    id="caching",
    title="Caching",
    reading="How often a chosen expert is already in the cache, mean over layers. LRU evicts the least recently"
    " used expert; Belady, which knows the future, is the upper bound for any policy. The dashed line is LRU with"
    " uniform and independent routing.",
    ask=ask,
    answer=answer,
    draw=draw,
)
