"""Would a cache of C experts per layer hold what the next token needs? Expert offloading, simulated on a capture.

One convention applies to every policy. A token looks up its k experts at once, in the cache as it was before the token.
Then missing experts are loaded in the order of their rank, and each evicts one expert that the token does not need: the
k experts of a token are in memory together, so C is at least k. Caches are empty at the start of a row. The rate covers
tokens whose left neighbour is counted too: a row's first token is left out, and so is a token after a special token
(which does not use the caches). Hence at C = k every policy's rate is the mean overlap of neighbours over k, on any
data. Promises exact counts, and that no policy has more hits than Belady over all tokens. Does not know time: how long
a load takes, or whether it could have been prefetched. The cache that knows a segment of the future is in
`analysis.metrics.segments`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Literal, get_args

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.cache_kernels import SEGMENT, add_hits
from analysis.scanning import Array, Block, Reducer, State, scan, sizes

Policy = Literal["lru", "lfu", "belady"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
SCORED = "tokens whose left neighbour is also counted"
CONVENTION = (
    "hit_rate: experts found in a cache of cache_size experts over all k that each token needs; all k are looked up"
    " before any is loaded, caches are empty at a row's start, and its first token is left out; hit_rate_preloaded:"
    " over all tokens, and an expert loaded into a free place counts as found"
)


class CacheCounts(Reducer):
    """Hits of several caches of several sizes, layer by layer: the input of `cache_hits_of` and
    `segment_cache_hits_of`.

    Parameters
    ----------
    cache_sizes : sequence of int, optional
        Experts per layer that a cache holds, k to E; default k, 2k and 4k, limited to E.
    policies : sequence of {"lru", "lfu", "belady"}
        Which expert is evicted: the least recently used; the least often used since the row's start, including uses
        while it was not in the cache; the one whose next use is farthest. Ties evict the least recently used; among one
        token's experts, the last by rank counts as the most recent.
    segment_lengths : sequence of int
        Additional caches, which evict the expert least used in the next so many tokens, starting with the current one.
    """

    def __init__(
        self,
        cache_sizes: Sequence[int] | None = None,
        policies: Sequence[Policy] = POLICIES,
        segment_lengths: Sequence[int] = (),
    ) -> None:
        if unknown := set(policies) - set(POLICIES):
            raise ValueError(f"unknown policies {sorted(unknown)}: choose from {', '.join(POLICIES)}")
        if short := [length for length in segment_lengths if length < 1]:
            raise ValueError(f"segment_lengths {short}: each must be at least 1 token")
        self.cache_sizes = None if cache_sizes is None else tuple(map(int, cache_sizes))
        self.policies, self.segment_lengths = tuple(policies), tuple(map(int, segment_lengths))

    @property
    def _rules(self) -> Array:
        """The rule of each cache, and the tokens that it knows ahead; int64 (cache, 2)."""
        rules = [(POLICIES.index(policy), 0) for policy in self.policies]
        rules += [(SEGMENT, length) for length in self.segment_lengths]
        return np.array(rules, dtype=np.int64).reshape(-1, 2)

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `hits` and `others` (cache, cache_size, layer), `scored` by the number of earlier tokens in the row,
        `tokens`."""
        layers, capacities = dataset.sizes["layer"], _capacities(dataset, self.cache_sizes)
        shape = (len(self._rules), len(capacities), layers)
        return {
            "hits": np.zeros(shape, dtype=np.int64),
            "others": np.zeros(shape, dtype=np.int64),
            "scored": np.zeros(dataset.sizes["position"], dtype=np.int64),
            "tokens": np.zeros(1, dtype=np.int64),
            "capacities": capacities,
            "experts": np.array([sizes(dataset)[2]], dtype=np.int64),
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        arrays = (state[name] for name in ("capacities", "experts", "hits", "others", "scored"))
        add_hits(block["expert"], block["counted"], self._rules, *arrays)
        state["tokens"] += np.count_nonzero(block["counted"])

    def merge(self, state: State, other: State) -> State:
        """Sums, over the positions that both have."""
        return super().merge(state, other) | {name: state[name] for name in ("capacities", "experts")}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The counts, labelled: `hits` and `others` int64 (cache, cache_size, layer), `scored` int64 (position)."""
        labels = (*self.policies, *["segment"] * len(self.segment_lengths))
        dims = ("cache", "cache_size", "layer")
        return described(
            xr.Dataset(
                {
                    "hits": (dims, state["hits"], {"long_name": "experts found in the cache", "units": "choices"}),
                    "others": (
                        dims,
                        state["others"],
                        {"long_name": "found by other tokens, or loaded into a free place", "units": "choices"},
                    ),
                    "scored": ("position", state["scored"], {"units": "tokens"}),
                },
                coords={
                    "policy": ("cache", np.array(labels, dtype=str)),
                    "segment_length": ("cache", self._rules[:, 1]),
                    "cache_size": state["capacities"],
                    "layer": dataset["layer"].values,
                },
            ),
            n=int(state["scored"].sum()),
            counted=SCORED,
            tokens=int(state["tokens"][0]),
            num_experts=sizes(dataset)[2],
            experts_per_token=sizes(dataset)[1],
            estimator="counts",
            null="none: counts of a simulation",
            definition="hits: experts found in the cache by these tokens; others: those found by other tokens, and"
            " those loaded into a free place; scored: these tokens, by the number of counted tokens before them in"
            " their row",
            source="Belady 1966",
        )


def cache_hits(
    dataset: xr.Dataset,
    cache_sizes: Sequence[int] | None = None,
    policies: Sequence[Policy] = POLICIES,
    *,
    threads: int | None = None,
) -> xr.Dataset:
    """Hit rates of LRU, LFU and Belady caches of some sizes, all in one scan.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    cache_sizes, policies
        See `CacheCounts`.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        See `cache_hits_of`.

    Raises
    ------
    ValueError
        When a size is below k (a token's experts would not fit) or above E, or a policy is unknown.
    """
    return cache_hits_of(scan(dataset, [CacheCounts(cache_sizes, policies)], threads=threads)[0])


def cache_hits_of(counts: xr.Dataset) -> xr.Dataset:
    """Hit rates of LRU, LFU and Belady caches, from the counts of `CacheCounts`.

    Parameters
    ----------
    counts : xr.Dataset
        From `CacheCounts`; caches that know a segment are ignored.

    Returns
    -------
    xr.Dataset
        Over (policy, cache_size, layer): `hits` int64, in choices; `hit_rate` float64; and `hit_rate_preloaded`,
        counted as in the paper's code: over all tokens, with an expert loaded into a free place counted as found.
        `null` (policy, cache_size) is the exact expectation of `hit_rate` for independent uniform routing in rows of
        the same lengths, NaN for Belady. NaN if nothing was counted. Attribute `n`: the tokens in `hit_rate`; if rows
        were sampled, `rows_sampled` of `rows_counted` (see `SampledRows`).
    """
    own = hit_rates(counts, counts["policy"].values != "segment", "policy")
    choices, experts = counts.attrs["experts_per_token"], counts.attrs["num_experts"]
    null = _random_hit_rate(counts["scored"].values, counts["cache_size"].values, choices, experts)
    blind = np.isin(own["policy"].values, ["lru", "lfu"])[:, None]  # policies that do not look ahead
    return described(
        own.assign(null=(("policy", "cache_size"), np.where(blind, null, np.nan))),
        n=counts.attrs["n"],
        counted=SCORED,
        tokens=counts.attrs["tokens"],
        **{name: counts.attrs[name] for name in ("rows_sampled", "rows_counted") if name in counts.attrs},
        estimator="simulation of whole rows, caches empty at a row's start",
        null="variable `null`: expected hit_rate if every token chose independently and uniformly, the same at every"
        " layer; NaN for a policy that looks ahead",
        definition=CONVENTION,
        source="Belady 1966; hit_rate_preloaded counts as ljcleo/moe-lrc, src/50_chr_calc.py (Liang et al., arXiv"
        " 2505.16056)",
    )


def hit_rates(counts: xr.Dataset, wanted: Array, dim: str) -> xr.Dataset:
    """Hits and rates of some caches, over (dim, cache_size, layer); NaN if nothing was counted."""
    n, tokens, choices = (counts.attrs[name] for name in ("n", "tokens", "experts_per_token"))
    hits, others = (counts[name].isel(cache=wanted).swap_dims(cache=dim) for name in ("hits", "others"))
    rates = {
        "hit_rate": hits / (choices * n if n else np.nan),
        "hit_rate_preloaded": (hits + others) / (choices * tokens if tokens else np.nan),
    }
    return xr.Dataset({"hits": hits, **rates}).reset_coords(drop=True)


def _capacities(dataset: xr.Dataset, cache_sizes: Sequence[int] | None) -> Array:
    _, choices, experts = sizes(dataset)
    if cache_sizes is None:
        cache_sizes = [size for size in (choices, 2 * choices, 4 * choices) if size <= experts]
    if wrong := [size for size in cache_sizes if not choices <= size <= experts]:
        raise ValueError(
            f"a cache of {wrong[0]} experts: it must hold the {choices} experts that a token needs at once, and the"
            f" layer has {experts}"
        )
    return np.array(sorted(set(cache_sizes)), dtype=np.int64)


def _random_hit_rate(scored: Array, capacities: Array, choices: int, experts: int) -> Array:
    """Expected hit rate (cache_size) of a policy that does not look ahead, if each token's set were uniform and
    independent.

    After t tokens, D experts have occurred, a cache holds min(C, D) of them, and each choice is one of these with
    probability min(C, D) / E. D is a Markov chain: the number of new experts among k is hypergeometric.
    """
    step = np.zeros((experts + 1, experts + 1))
    for seen in range(experts + 1):
        for new in range(min(choices, experts - seen) + 1):
            step[seen, seen + new] = comb(experts - seen, new) * comb(seen, choices - new) / comb(experts, choices)
    seen_by, expected = np.eye(experts + 1)[0], np.zeros(len(capacities))
    held = np.minimum(np.arange(experts + 1)[:, None], capacities) / experts
    for count in scored[: np.max(np.flatnonzero(scored), initial=-1) + 1]:
        expected += count * (seen_by @ held)
        seen_by = seen_by @ step
    return np.asarray(expected / scored.sum() if scored.any() else np.full(len(capacities), np.nan))
