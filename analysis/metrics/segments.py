"""Do experts stay active for a while? Two measures of local routing consistency, SRP and SCH.

Both are from Liang et al., "Not All Models Suit Expert Offloading" (arXiv 2505.16056; code: ljcleo/moe-lrc). SRP: how
well one fixed group of experts serves a segment. A segment is m neighbouring positions of one row whose tokens are all
counted; segments start at every possible position. SCH: the hit rate of a cache that knows a segment of the future,
under the convention of `analysis.metrics.caching`. Promises exact counts for several lengths in one scan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.caching import CONVENTION, SCORED, CacheCounts, hit_rates
from analysis.scanning import Array, Block, Reducer, State, kernel, scan, sizes

SEGMENT_LENGTHS = (4, 16, 64, 256)  # those of the paper


class SegmentRouting(Reducer):
    """The number of segments in which an expert is active f times, for each f, expert, layer and length.

    Parameters
    ----------
    segment_lengths : sequence of int
        m, in tokens.
    """

    def __init__(self, segment_lengths: Sequence[int] = SEGMENT_LENGTHS) -> None:
        self.lengths = _lengths(segment_lengths)

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `segments` (segment_length, layer, expert, times active), and `tokens`."""
        layers, _, experts = sizes(dataset)
        shape = (len(self.lengths), layers, experts, self.lengths[-1] + 1)
        return {"segments": np.zeros(shape, dtype=np.int64), "tokens": np.zeros(1, dtype=np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        _add_segments(block["expert"], block["counted"], np.array(self.lengths), state["segments"])
        state["tokens"] += np.count_nonzero(block["counted"])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The best F1 of a segment router, and what it activates; NaN if there is no segment."""
        layers, choices, experts = sizes(dataset)
        of_layer, of_expert = ("segment_length", "layer"), ("segment_length", "layer", "expert")
        names = {"performance": of_layer, "size_ratio": of_layer, "expert_performance": of_expert}
        shape = {"segment_length": len(self.lengths), "layer": layers, "expert": experts}
        found = {name: np.full([shape[dim] for dim in dims], np.nan) for name, dims in names.items()}
        nulls = np.empty((2, len(self.lengths)))
        for index, length in enumerate(self.lengths):
            segments = state["segments"][index, :, :, : length + 1]
            found["performance"][index], found["size_ratio"][index] = _best(segments.sum(1))
            found["expert_performance"][index] = _best(segments)[0]
            nulls[:, index] = _best(_binomial(length, choices / experts))
        result = xr.Dataset(
            {
                **{name: (dims, found[name]) for name, dims in names.items()},
                "segments": ("segment_length", state["segments"][:, :1, 0].sum((1, 2))),
                "null": ("segment_length", nulls[0]),
                "null_size_ratio": ("segment_length", nulls[1]),
            },
            coords={
                "segment_length": list(self.lengths),
                "layer": dataset["layer"].values,
                "expert": np.arange(experts),
            },
        )
        return described(
            result,
            n=int(state["tokens"][0]),
            estimator="maximum over thresholds, on all segments",
            null="variables `null` and `null_size_ratio`: performance and size_ratio for infinitely long independent"
            " uniform routing",
            definition="SRP(m) = max over a of 2 Σ_{f ≥ a} f / Σ (m [f ≥ a] + f), where f is how often an expert is"
            " active in a segment of m tokens, over all segments and the layer's experts (performance) or one expert's"
            " (expert_performance); size_ratio = m |{f ≥ a}| / Σ f at that a",
            source="SRP of Liang et al., arXiv 2505.16056, appendix C.1; ljcleo/moe-lrc, src/30_srp_calc.py",
        )


def segment_routing(
    dataset: xr.Dataset, segment_lengths: Sequence[int] = SEGMENT_LENGTHS, *, threads: int | None = None
) -> xr.Dataset:
    """Segment routing best performance, SRP: the best F1 that routing by segments can reach relative to the real
    routing.

    A segment router activates an expert for all m tokens of a segment or for none. Its F1 is highest if it activates
    experts that are active at least α times: SRP = max over α of 2 Σ_{f ≥ α} f / Σ (m [f ≥ α] + f), where f is how
    often the expert is active in the segment, the sums run over all segments (one for every possible start), and for a
    layer also over its experts, with one α (Liang et al., arXiv 2505.16056, equations 4 and 6).

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    segment_lengths : sequence of int
        m, in tokens; a shorter row has no such segment.
    threads : int, optional
        Shards decoded at the same time; default one per processor. Each keeps 8 (m + 1) bytes for every layer, expert
        and length, with the longest m.

    Returns
    -------
    xr.Dataset
        float64: `performance` and `size_ratio` (segment_length, layer), the latter the experts that the best router
        activates, relative to the k chosen ones, the paper's ρ̂; `expert_performance` (segment_length, layer, expert),
        0 for an expert that is never chosen. `segments` int64 (segment_length). NaN if there is no segment. `null` and
        `null_size_ratio` (segment_length): the same for independent uniform routing.

    Raises
    ------
    ValueError
        When there is no length, or one is below 1.
    """
    return scan(dataset, [SegmentRouting(segment_lengths)], threads=threads)[0]


def segment_cache_hits(
    dataset: xr.Dataset,
    cache_sizes: Sequence[int] | None = None,
    segment_lengths: Sequence[int] = SEGMENT_LENGTHS,
    *,
    threads: int | None = None,
) -> xr.Dataset:
    """Segment cache best hit rate, SCH: a cache that knows how often each expert is used in the next m tokens.

    For each token, the missing experts are loaded, and for each of them the unused expert with the fewest uses in the
    next m tokens is evicted (Liang et al., arXiv 2505.16056, section 2.3). As in the authors' code, the m tokens start
    with the current one, and ties evict the least recently used; unlike in the code, but as in their text, an expert
    that the same token needs is never evicted. m = 1 is LRU. (The paper's first version used the name SCH for another
    number: the share of a segment's choices that its C most frequent experts cover.)

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    cache_sizes : sequence of int, optional
        See `analysis.CacheCounts`.
    segment_lengths : sequence of int
        m, in tokens.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        See `segment_cache_hits_of`.

    Raises
    ------
    ValueError
        When a size is below k or above E, or a length below 1.
    """
    counting = CacheCounts(cache_sizes, (), _lengths(segment_lengths))
    return segment_cache_hits_of(scan(dataset, [counting], threads=threads)[0])


def segment_cache_hits_of(counts: xr.Dataset) -> xr.Dataset:
    """Segment cache best hit rate, from the counts of `CacheCounts`.

    Parameters
    ----------
    counts : xr.Dataset
        From `analysis.CacheCounts` with segment lengths; caches of other policies are ignored.

    Returns
    -------
    xr.Dataset
        Over (segment_length, cache_size, layer), as `analysis.cache_hits_of`: `hits` int64, `hit_rate` and
        `hit_rate_preloaded` float64, NaN if nothing was counted; without a null. The paper reports
        `hit_rate_preloaded`; `hit_rate` is comparable with the results of `cache_hits`.
    """
    return described(
        hit_rates(counts, counts["policy"].values == "segment", "segment_length"),
        n=counts.attrs["n"],
        counted=SCORED,
        tokens=counts.attrs["tokens"],
        estimator="simulation of every row, with empty caches at its start",
        null=np.nan,
        definition=f"evicted: the expert with the fewest uses in the next segment_length tokens; {CONVENTION}",
        source="SCH of Liang et al., arXiv 2505.16056, section 2.3; ljcleo/moe-lrc, src/41_sch_calc.py",
    )


def _lengths(segment_lengths: Sequence[int]) -> tuple[int, ...]:
    lengths = tuple(sorted(set(map(int, segment_lengths))))
    if not lengths or lengths[0] < 1:
        raise ValueError(f"segment_lengths {tuple(segment_lengths)}: must be one or more lengths of at least 1 token")
    return lengths


def _best(segments: Array) -> tuple[Array, Array]:
    """The best F1 and its size ratio (...), from the number of segments by times active (..., m + 1).

    Among equally good thresholds the lowest is used, as in the paper's equation 4.
    """
    times = np.arange(segments.shape[-1])
    right = np.flip(np.flip(segments * times, -1).cumsum(-1), -1)
    activated = np.flip(np.flip(segments, -1).cumsum(-1), -1) * times[-1]
    active = right[..., :1]
    with np.errstate(invalid="ignore"):
        f1 = 2 * right / (activated + active)
        ratio = activated / np.where(active > 0, active, np.nan)
    best = np.where(np.isnan(f1), -1, f1).argmax(-1, keepdims=True)
    return np.take_along_axis(f1, best, -1)[..., 0], np.take_along_axis(ratio, best, -1)[..., 0]


def _binomial(length: int, chance: float) -> Array:
    """The share of segments (length + 1) in which an expert with this probability at each token is active f times."""
    share = np.array([1.0])
    for _ in range(length):
        share = np.append(share * (1 - chance), 0) + np.append(0, share * chance)
    return share


@kernel
def _add_segments(expert: Array, counted: Array, lengths: Array, segments: Array) -> None:
    """Slide a window over each run of neighbouring tokens; an expert's segments are added when its count changes."""
    rows, positions, layers, choices = expert.shape
    num_experts = segments.shape[2]
    times, since = np.empty(num_experts, np.int64), np.empty(num_experts, np.int64)
    for row in range(rows):
        stop = 0
        while stop < positions:
            start = stop
            while stop < positions and counted[row, stop]:
                stop += 1
            for index in range(lengths.size):
                length = lengths[index]
                for layer in range(layers if stop - start >= length else 0):
                    table = segments[index, layer]
                    times[:] = 0
                    since[:] = start + length - 1  # the end of the first complete window
                    for position in range(start, stop):
                        for k in range(choices if position - length >= start else 0):
                            leaving = expert[row, position - length, layer, k]
                            table[leaving, times[leaving]] += position - since[leaving]
                            times[leaving] -= 1
                            since[leaving] = position
                        for k in range(choices):
                            entering = expert[row, position, layer, k]
                            if position > since[entering]:
                                table[entering, times[entering]] += position - since[entering]
                                since[entering] = position
                            times[entering] += 1
                    for number in range(num_experts):
                        table[number, times[number]] += stop - since[number]
            stop += 1
