"""Caches and segments compared with plain Python: lists of tokens, a few lines for each policy, every eviction computed
from scratch."""

from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import make_capture

from analysis.metrics.cache_kernels import _farthest, _farthest_near, _least_recent, _least_recent_of_few
from analysis.metrics.caching import POLICIES, CacheCounts, cache_hits
from analysis.metrics.segments import SegmentRouting, segment_cache_hits, segment_routing
from analysis.scanning import scan

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])

Tokens = list[list[int]]
Worth = Callable[[int, int], tuple[float, int]]
"""The rank of an expert in the cache: maps (token number, expert) to a comparable value; the smallest is evicted."""


@st.composite
def captures(draw: st.DrawFn) -> xr.Dataset:
    num_experts = draw(st.sampled_from([2, 3, 4, 8, 16, 64]))
    capture = make_capture(
        seed=draw(st.integers(0, 2**31)),
        documents=draw(st.integers(1, 5)),
        layers=draw(st.sampled_from([(0,), (1, 3)])),
        num_experts=num_experts,
        experts_per_token=draw(st.integers(1, min(8, num_experts))),
        sequence_length=draw(st.sampled_from([8, 16])),
        rows_per_shard=draw(st.integers(1, 4)),
        vocabulary=12,
        special_token_ids=draw(st.sampled_from([(), (1,), (0, 2)])),
        missing=draw(st.lists(st.integers(0, 5), max_size=2)),
        strength=draw(st.sampled_from([0.0, 1.5, 4.0])),
        chunked=False,
    )
    chunk = draw(st.none() | st.integers(1, 9))
    return capture if chunk is None else capture.chunk({"doc": chunk, "position": 3, "layer": 1})


def cache_sizes(capture: xr.Dataset) -> list[int]:
    k, experts = capture.sizes["k"], capture.attrs["num_experts"]
    return sorted({k, min(k + 1, experts), min(2 * k, experts), experts})


def rows(capture: xr.Dataset, layer: int) -> Iterator[tuple[Tokens, list[bool]]]:
    """The experts of each row's counted tokens, and whether the position before counts as well."""
    data = capture.compute()
    expert, token = data["expert"].values[:, :, layer], data["token"].values
    fill = np.iinfo(expert.dtype).max
    for row in range(data.sizes["doc"]):
        tokens, follows, before = [], [], False
        for position in range(int(data["length"][row])):
            counts = expert[row, position, 0] != fill
            counts = counts and token[row, position] not in capture.attrs["special_token_ids"]
            if counts:
                tokens.append(expert[row, position].tolist())
                follows.append(before)
            before = counts
        yield tokens, follows


def worth(policy: str | int, tokens: Tokens) -> Worth:
    """The hits of a policy, or of SCH with a number of known tokens."""

    def recent(now: int, expert: int) -> int:
        served = [chosen for token in tokens[: now + 1] for chosen in token]
        return max(index for index, chosen in enumerate(served) if chosen == expert)

    def used(start: int, stop: int, expert: int) -> int:
        return sum(expert in token for token in tokens[start:stop])

    def distance(now: int, expert: int) -> int:
        return next((at for at in range(now + 1, len(tokens)) if expert in tokens[at]), len(tokens))

    def of(now: int, expert: int) -> tuple[float, int]:
        if isinstance(policy, int):
            return used(now, now + policy, expert), recent(now, expert)
        if policy == "belady":
            return -distance(now, expert), recent(now, expert)
        return used(0, now + 1, expert) if policy == "lfu" else 0, recent(now, expert)

    return of


def simulated(tokens: Tokens, size: int, value: Worth) -> tuple[list[int], int]:
    """Hits of each token, and loads into free places."""
    cache: list[int] = []
    hits, filled = [], 0
    for now, needed in enumerate(tokens):
        hits.append(len(set(cache) & set(needed)))
        for expert in needed:
            if expert in cache:
                continue
            if len(cache) < size:
                filled += 1
            else:
                cache.remove(min(set(cache) - set(needed), key=lambda other, now=now: value(now, other)))
            cache.append(expert)
    return hits, filled


def most_hits(tokens: Tokens, size: int) -> int:
    """Over all ways to evict."""

    def best(now: int, cache: frozenset[int]) -> int:
        if now == len(tokens):
            return 0
        needed = frozenset(tokens[now])
        others = cache - needed
        keep = min(len(others), size - len(needed))
        after = (best(now + 1, needed | frozenset(kept)) for kept in combinations(sorted(others), keep))
        return len(cache & needed) + max(after)

    return best(0, frozenset())


# --- Caches ---------------------------------------------------------------------------------------------------


@few
@given(captures())
def test_hit_rates_equal_a_loop_over_tokens_for_every_policy_size_and_layer(capture: xr.Dataset) -> None:
    sizes, k = cache_sizes(capture), capture.sizes["k"]
    results = {"policy": cache_hits(capture, sizes), "segment_length": segment_cache_hits(capture, sizes, (1, 3, 99))}
    for dim, result in results.items():
        assert result["hit_rate"].dims == (dim, "cache_size", "layer")
        assert result["cache_size"].values.tolist() == sizes
        assert result["layer"].values.tolist() == capture["layer"].values.tolist()
        for policy in result[dim].values.tolist():
            for size in sizes:
                for layer in range(capture.sizes["layer"]):
                    hits = everything = n = tokens = 0
                    for row, follows in rows(capture, layer):
                        found, filled = simulated(row, size, worth(policy, row))
                        hits += sum(count for count, counts in zip(found, follows, strict=True) if counts)
                        everything += sum(found) + filled
                        n, tokens = n + sum(follows), tokens + len(row)
                    cell = result.sel({dim: policy, "cache_size": size}).isel(layer=layer)
                    assert int(cell["hits"]) == hits
                    assert (result.attrs["n"], result.attrs["tokens"]) == (n, tokens)
                    np.testing.assert_allclose(cell["hit_rate"], hits / (k * n) if n else np.nan)
                    preloaded = everything / (k * tokens) if tokens else np.nan
                    np.testing.assert_allclose(cell["hit_rate_preloaded"], preloaded)


@few
@given(captures())
def test_at_size_k_every_policy_hits_the_mean_overlap_of_neighbours_over_k(capture: xr.Dataset) -> None:
    k = capture.sizes["k"]
    everywhere = [cache_hits(capture, [k]), segment_cache_hits(capture, [k], (1, 5))]
    for layer in range(capture.sizes["layer"]):
        overlap = [
            len(set(row[at]) & set(row[at - 1])) / k
            for row, follows in rows(capture, layer)
            for at in range(len(row))
            if follows[at]
        ]
        for result in everywhere:
            np.testing.assert_allclose(result["hit_rate"].isel(layer=layer), np.mean(overlap) if overlap else np.nan)


@few
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(2, 6), st.integers(0, 2))
def test_nothing_finds_more_than_belady(seed: int, k: int, experts: int, more: int) -> None:
    k = min(k, experts)
    size = min(k + more, experts)
    capture = make_capture(
        seed=seed,
        documents=3,
        layers=(0,),
        num_experts=experts,
        experts_per_token=k,
        sequence_length=9,
        special_token_ids=(),
    )
    best = sum(most_hits(row, size) for row, _ in rows(capture, 0))
    hits = cache_hits(capture, [size])["hits"].isel(cache_size=0, layer=0)
    assert int(hits.sel(policy="belady")) == best
    assert int(hits.max()) == best
    assert int(segment_cache_hits(capture, [size], (2, 4, 9))["hits"].max()) <= best


def test_a_cache_by_hand() -> None:
    capture = make_capture(
        documents=4, layers=(0,), num_experts=4, experts_per_token=1, special_token_ids=(), chunked=False
    )
    one = capture.isel(doc=np.flatnonzero(capture["length"] >= 8)[:1]).copy(deep=True)
    one["length"][0] = 8
    one["expert"][0, :8, 0, 0] = [0, 1, 2, 0, 0, 3, 1, 0]
    rate = cache_hits(one, [2, 3])["hit_rate"].isel(layer=0)
    # Of the 7 tokens after the first. At C = 2 LRU finds 0 once; LFU also at the end; Belady never evicts it.
    np.testing.assert_allclose(rate.sel(cache_size=2), np.array([1, 2, 3]) / 7)
    np.testing.assert_allclose(rate.sel(cache_size=3), np.array([3, 3, 4]) / 7)


@few
@given(captures())
def test_knowing_one_token_is_lru_and_all_experts_fit_at_size_e(capture: xr.Dataset) -> None:
    sizes = cache_sizes(capture)
    lru = cache_hits(capture, sizes, ["lru"]).isel(policy=0, drop=True)
    known = segment_cache_hits(capture, sizes, [1]).isel(segment_length=0, drop=True)
    for name in ("hits", "hit_rate", "hit_rate_preloaded"):
        xr.testing.assert_identical(known[name].drop_attrs(), lru[name].drop_attrs())
    full = cache_hits(capture, [capture.attrs["num_experts"]])
    assert bool((full["hits"] == full["hits"].isel(policy=0)).all())
    assert bool(((full["hit_rate_preloaded"] == 1) | (full.attrs["tokens"] == 0)).all())


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (5, 1), (16, 6)])
def test_uniform_routing_hits_as_often_as_the_null_says(experts: int, k: int) -> None:
    capture = make_capture(
        documents=30, layers=range(60), num_experts=experts, experts_per_token=k, sequence_length=12, strength=0
    )
    result = cache_hits(capture)
    assert result["cache_size"].values.tolist() == [size for size in (k, 2 * k, 4 * k) if size <= experts]
    rate, null = result["hit_rate"], result["null"]
    assert bool(null.sel(policy="belady").isnull().all())
    assert null.sel(policy="lru", cache_size=k).item() == pytest.approx(k / experts)
    assert bool((null.sel(policy="lru").diff("cache_size") > 0).all())
    blind = ["lru", "lfu"]
    error = rate.std("layer", ddof=1) / np.sqrt(rate.sizes["layer"])  # layers are independent here
    assert bool((abs(rate.mean("layer") - null) <= 5 * error).sel(policy=blind).all())


def test_what_no_cache_can_be_is_refused() -> None:
    capture = make_capture(experts_per_token=3)
    with pytest.raises(
        ValueError, match=r"a cache of 2 experts: it must hold the 3 experts that a token needs at once"
    ):
        cache_hits(capture, [4, 2])
    with pytest.raises(ValueError, match=r"a cache of 9 experts: .* the layer has 8"):
        cache_hits(capture, [9])
    with pytest.raises(ValueError, match=r"unknown policies \['fifo'\]: choose from lru, lfu, belady"):
        cache_hits(capture, [4], ["fifo"])  # type: ignore[list-item]
    for lengths in ((), (4, 0)):
        with pytest.raises(ValueError, match="one or more lengths of at least 1 token"):
            segment_cache_hits(capture, [4], lengths)
        with pytest.raises(ValueError, match="one or more lengths of at least 1 token"):
            segment_routing(capture, lengths)


# --- Segments -------------------------------------------------------------------------------------------------


def best_f1(segments: list[tuple[Tokens, int]], experts: list[int]) -> tuple[float, float]:
    """Over thresholds: F1 of activating every expert in every segment where it is active often enough; its size."""
    active = [sum(expert in token for token in segment) for segment, _ in segments for expert in experts]
    length = segments[0][1]
    best, ratio = -1.0, 0.0
    for threshold in range(length + 1):
        right = sum(times for times in active if times >= threshold)
        wrong = sum(length - times for times in active if times >= threshold)
        left = sum(times for times in active if times < threshold)
        f1 = 2 * right / (2 * right + wrong + left) if right + wrong + left else 0.0
        if f1 > best:
            best, ratio = f1, (right + wrong) / (right + left) if right + left else np.nan
    return best, ratio


@few
@given(captures())
def test_segment_routing_equals_a_loop_over_segments_and_thresholds(capture: xr.Dataset) -> None:
    lengths, experts = (1, 3, 8), list(range(capture.attrs["num_experts"]))
    result = segment_routing(capture, lengths)
    assert result["performance"].dims == ("segment_length", "layer")
    assert result["expert_performance"].dims == ("segment_length", "layer", "expert")
    for length in lengths:
        for layer in range(capture.sizes["layer"]):
            segments = [
                (row[start : start + length], length)
                for row, follows in rows(capture, layer)
                for start in range(len(row) - length + 1)
                if all(follows[start + 1 : start + length])
            ]
            cell = result.sel(segment_length=length).isel(layer=layer)
            assert int(cell["segments"]) == len(segments)
            if not segments:
                assert bool(cell["performance"].isnull())
                assert bool(cell["size_ratio"].isnull())
                assert bool(cell["expert_performance"].isnull().all())
                continue
            f1, ratio = best_f1(segments, experts)
            np.testing.assert_allclose(cell["performance"], f1)
            np.testing.assert_allclose(cell["size_ratio"], ratio)
            single = [best_f1(segments, [expert])[0] for expert in experts]
            np.testing.assert_allclose(cell["expert_performance"], single)
    assert result.attrs["n"] == sum(len(row) for row, _ in rows(capture, 0))


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (6, 3)])
def test_uniform_routing_is_as_consistent_as_the_null_says(experts: int, k: int) -> None:
    capture = make_capture(
        documents=120, layers=range(40), num_experts=experts, experts_per_token=k, sequence_length=64, strength=0
    )
    result = segment_routing(capture, (1, 4, 16))
    for name, null in (("performance", "null"), ("size_ratio", "null_size_ratio")):
        error = result[name].std("layer", ddof=1) / np.sqrt(result.sizes["layer"])  # layers are independent here
        assert bool((abs(result[name].mean("layer") - result[null]) <= 5 * error + 1e-12).all())
    assert (
        result["performance"].sel(segment_length=1).values.tolist() == [1.0] * 40
    )  # one token: there is nothing to miss


# --- One scan -------------------------------------------------------------------------------------------------


def test_results_are_equal_to_the_bit_for_any_chunks_and_threads() -> None:
    capture = make_capture(documents=40, missing=[2], chunked=False)
    reducers = [CacheCounts([2, 5]), CacheCounts([3], (), (4,)), SegmentRouting((2, 4))]
    whole = scan(capture.chunk({"doc": -1}), reducers, threads=1)
    assert list(POLICIES) == whole[0]["policy"].values.tolist()
    for chunk, threads in ((1, 5), (3, 2), (7, 3)):
        for one, other in zip(scan(capture.chunk({"doc": chunk}), reducers, threads=threads), whole, strict=True):
            xr.testing.assert_identical(one, other)


def test_a_capture_without_a_token_has_no_rates() -> None:
    capture = make_capture(missing=range(99))
    for result in (cache_hits(capture), segment_cache_hits(capture)):
        assert result.attrs["n"] == 0
        assert bool(result["hit_rate"].isnull().all())
        assert bool(result["hit_rate_preloaded"].isnull().all())
    assert bool(cache_hits(capture)["null"].isnull().all())
    assert bool(segment_routing(capture)["performance"].isnull().all())


@pytest.mark.parametrize(("rare", "again"), [(0.02, False), (0.3, False), (0.0, True)])
def test_rows_of_many_tokens_have_the_hits_of_a_plain_simulation(rare: float, again: bool) -> None:
    """Again: one expert is used only twice, far apart, so the kernel that reads 64 tokens is not enough."""
    random, experts, capacities = np.random.default_rng(1), 8, np.array([2, 3, 5, 8])
    chance = np.where(np.arange(experts) < 4, 1.0, 0.0 if again else rare)
    tokens = [random.choice(experts, 2, replace=False, p=chance / chance.sum()).tolist() for _ in range(200)]
    if again:
        tokens[20][1] = tokens[150][1] = 7
    follows = random.random(len(tokens)) < 0.9
    sufficed = []
    for policy, kernels in (("lru", [_least_recent, _least_recent_of_few]), ("belady", [_farthest, _farthest_near])):
        wanted = np.array([_counted(tokens, follows, int(size), policy) for size in capacities]).T
        for kernel in kernels:
            found = np.zeros((2, len(capacities)), np.int64)
            sufficed.append(kernel(np.array(tokens), follows, capacities, experts, *found) is not False)
            np.testing.assert_array_equal(found, wanted if sufficed[-1] else 0)
    assert sufficed == [True, True, True, not again]


def _counted(tokens: Tokens, follows: np.ndarray, size: int, policy: str) -> tuple[int, int]:
    """Hits of tokens that follow an adjacent token, and of others with the loads into free places."""
    hits, filled = simulated(tokens, size, worth(policy, tokens))
    return int(np.array(hits)[follows].sum()), int(np.array(hits)[~follows].sum()) + filled
