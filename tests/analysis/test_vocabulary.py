"""Vocabulary specialization compared with a loop, its null with real shuffles, and the sample of whole documents."""

import math
from collections import Counter

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import bursty, captures, make_capture
from test_scan import routed_tokens

from analysis.metrics.sample import SampledRoutes
from analysis.metrics.tokens import TokenCounts, expert_tokens_of, token_experts
from analysis.metrics.vocabulary import (
    ShuffledTokenCounts,
    pointwise_of,
    shuffled_tokens,
    vocabulary_specialization,
    vocabulary_specialization_of,
)
from analysis.scanning import scan

some = settings(max_examples=15, deadline=None)


def largest_shares(tokens: list[int], experts: list[np.ndarray], min_count: int) -> dict[int, tuple[int, float]]:
    """Occurrences, and the largest share that one expert gets, of each token id at one layer."""
    occurrences, sent = Counter(tokens), Counter()
    for token, chosen in zip(tokens, experts, strict=True):
        sent.update((token, int(e)) for e in chosen)
    return {
        x: (n, max(count for (token, _), count in sent.items() if token == x) / n)
        for x, n in occurrences.items()
        if n >= min_count
    }


@some
@given(captures(), st.integers(1, 4), st.sampled_from(["any", "first"]))
def test_specialization_and_association_equal_a_loop(capture: xr.Dataset, min_count: int, choice: str) -> None:
    found = vocabulary_specialization(capture, choice=choice, min_count=min_count)
    routed = [(token, expert if choice == "any" else expert[:, :1]) for token, expert, _ in routed_tokens(capture)]
    tokens = [token for token, _ in routed]
    for layer in range(capture.sizes["layer"]):
        shares = largest_shares(tokens, [expert[layer] for _, expert in routed], min_count)
        if not shares:
            assert all(bool(found[name][layer].isnull()) for name in found)
            continue
        n = sum(count for count, _ in shares.values())
        assert (found.attrs["n"], found.attrs["token_ids"]) == (n, len(shares))
        assert float(found["specialization"][layer]) == pytest.approx(sum(s for _, s in shares.values()) / len(shares))
        weighted = sum(c * s for c, s in shares.values()) / n
        assert float(found["specialization_weighted"][layer]) == pytest.approx(weighted)
        cells = Counter((x, int(e)) for x, expert in routed if x in shares for e in expert[layer])
        total = sum(cells.values())
        of_token, of_expert = Counter(), Counter()
        for (x, e), count in cells.items():
            of_token[x] += count
            of_expert[e] += count
        information = sum(c / total * math.log2(c * total / of_token[x] / of_expert[e]) for (x, e), c in cells.items())
        assert float(found["mutual_information"][layer]) == pytest.approx(information, abs=1e-12)


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (6, 1)])
def test_the_null_is_what_identities_shuffled_within_documents_give(experts: int, k: int) -> None:
    capture = bursty(
        "token", documents=60, layers=(2, 5), num_experts=experts, experts_per_token=k, rows_per_shard=1000, burst=0.3
    )
    found = vocabulary_specialization(capture, min_count=5, draws=20)
    inside = np.arange(capture.sizes["position"]) < capture["length"].values[:, None]
    token, expert = capture["token"].values[inside], capture["expert"].values[inside]
    document = np.repeat(capture["document_id"].values, inside.sum(1))
    random, places = np.random.default_rng(0), [np.flatnonzero(document == d) for d in np.unique(document)]
    for layer in range(2):
        plain, weighted = [], []
        for _ in range(20):
            shuffled = token.copy()
            for place in places:
                shuffled[place] = token[random.permutation(place)]
            shares = list(largest_shares(shuffled.tolist(), list(expert[:, layer]), 5).values())
            plain.append(sum(share for _, share in shares) / len(shares))
            weighted.append(sum(n * share for n, share in shares) / sum(n for n, _ in shares))
        for name, values in (("null", plain), ("null_weighted", weighted)):
            deviation = float(found[f"{name}_sd"][layer])
            assert float(found[name][layer]) == pytest.approx(np.mean(values), abs=4 * deviation * math.sqrt(2 / 20))
            assert 0.4 * np.std(values) < deviation < 2.5 * np.std(values), name


def test_words_that_only_share_a_document_are_at_the_null_and_words_with_experts_far_above() -> None:
    """With the former shuffle among all documents, the null of the first would be far below it."""
    common = {"documents": 50, "layers": range(4), "rows_per_shard": 1000}
    alone, own = (vocabulary_specialization(bursty(by, **common), draws=8) for by in ("document", "token"))
    for name, null in (("specialization", "null"), ("specialization_weighted", "null_weighted")):
        assert bool((abs(alone[name] - alone[null]) < 5 * alone[f"{null}_sd"]).all())
        assert bool((own[name] > own[null] + 10 * own[f"{null}_sd"]).all())
    assert bool((abs(alone["corrected"]) < 0.05).all())
    assert bool((own["corrected"] > 0.5).all())
    everywhere = bursty("document", **common)
    everywhere["document_id"].values[:] = 0  # what the null would be without documents
    assert bool((alone["specialization"] > vocabulary_specialization(everywhere)["null"] + 0.1).all())


def test_routes_that_know_no_tokens_are_at_the_null() -> None:
    found = vocabulary_specialization(make_capture(seed=2, documents=300, strength=0), min_count=10, draws=8)
    for name, null in (("specialization", "null"), ("specialization_weighted", "null_weighted")):
        assert bool((abs(found[name] - found[null]) < 6 * found[f"{null}_sd"]).all())
    assert bool((abs(found["corrected"]) < 0.01).all())


def test_a_shuffle_keeps_each_document_s_tokens_and_every_place_that_does_not_count() -> None:
    random = np.random.default_rng(0)
    token, counted = random.integers(0, 50, (7, 9)), random.random((7, 9)) < 0.7
    document, offset = np.array([3, 3, 1, 1, 1, 3, 8]), np.zeros(7, np.int32)
    shuffled = shuffled_tokens(token, counted, document, offset, 0)
    np.testing.assert_array_equal(shuffled[~counted], token[~counted])
    for rows in ([0, 1], [2, 3, 4], [5], [6]):  # the sixth row is a part of its own
        assert sorted(shuffled[rows][counted[rows]]) == sorted(token[rows][counted[rows]])
    assert (shuffled != token).sum() > 20
    assert (shuffled != shuffled_tokens(token, counted, document, offset, 1)).any()


def test_every_order_of_a_document_s_tokens_is_as_likely() -> None:
    token, document = np.tile(np.arange(4), (6000, 1)), np.arange(6000)
    orders = shuffled_tokens(token, np.ones(token.shape, bool), document, document * 0, 0)
    times = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(times) == 24
    assert ((times - 250) ** 2 / 250).sum() < 53.5  # chi-squared of 23 degrees of freedom: one time in 3,000


def test_a_shuffle_is_the_same_for_any_threads_and_order_of_shards() -> None:
    capture = make_capture(documents=30)
    ask = [ShuffledTokenCounts([0, 2]), ShuffledTokenCounts([0, 2], draw=1)]
    wanted, other = scan(capture, ask, threads=1)
    shards = [slice(start, start + 4) for start in range(0, capture.sizes["doc"] // 4 * 4, 4)]
    last = capture.isel(doc=slice(shards[-1].stop, None))
    turned = xr.concat([*(capture.isel(doc=rows) for rows in reversed(shards)), last], "doc", data_vars="minimal")
    for again in (scan(capture, ask, threads=3)[0], scan(turned, ask, threads=2)[0]):
        xr.testing.assert_identical(again, wanted)
    xr.testing.assert_equal(wanted["tokens"], other["tokens"])
    assert bool((wanted["counts"] != other["counts"]).any())


@some
@given(st.integers(0, 2**31), st.none() | st.integers(1, 9), st.integers(1, 120))
def test_the_sample_is_of_whole_documents_and_the_same_in_any_chunking_and_order(
    seed: int, chunk: int | None, size: int
) -> None:
    capture = make_capture(seed=seed, documents=7, chunked=False)
    wanted = scan(capture, [SampledRoutes(size)], threads=1)[0]
    chunked = capture if chunk is None else capture.chunk({"doc": chunk})
    shuffled = chunked.isel(doc=np.random.default_rng(seed).permutation(capture.sizes["doc"]))
    for other in (chunked, shuffled):
        xr.testing.assert_identical(scan(other, [SampledRoutes(size)], threads=3)[0], wanted)
    counted = (capture["token"].values >= 0) & (capture["token"].values != 1)  # 1 is special
    row, position = np.nonzero(counted)
    document, sampled = capture["document_id"].values[row], wanted["document_id"].values
    assert min(size, len(row)) <= len(sampled) == wanted.attrs["n"] < size + 16
    assert wanted.attrs["of"] == len(row)
    places = Counter(zip(document.tolist(), capture["token"].values[counted].tolist(), position.tolist(), strict=True))
    names = ("document_id", "token_id", "position")
    assert Counter(zip(*(wanted[name].values.tolist() for name in names), strict=True)) <= places
    for d in list(dict.fromkeys(sampled.tolist()))[:-1]:  # the last one may be cut
        assert (sampled == d).sum() == (document == d).sum()
    routes = {(int(d), int(t), int(p)): set() for d, t, p in places}
    for d, t, p, e in zip(
        document, capture["token"].values[counted], position, capture["expert"].values[counted], strict=True
    ):
        routes[int(d), int(t), int(p)].add(e.tobytes())
    for at in range(len(sampled)):
        place = tuple(int(wanted[name][at]) for name in names)
        assert wanted["expert"].values[at].tobytes() in routes[place]
    some_layers = scan(capture, [SampledRoutes(size, [2, 0])], threads=1)[0]
    np.testing.assert_array_equal(some_layers["expert"], wanted["expert"].sel(layer=[2, 0]))


def test_the_lift_within_documents_is_over_the_shuffled_count() -> None:
    capture = make_capture(seed=3, documents=30)
    counts, shuffled = scan(capture, [TokenCounts([1]), ShuffledTokenCounts([1])])
    listed = expert_tokens_of(counts, 1, by="lift", shuffled=shuffled)
    assert int((listed["token_id"] >= 0).sum()) > 50
    for place in np.argwhere(listed["token_id"].values >= 0):
        cell = listed.isel(expert=place[0], place=place[1])
        by_chance = int(shuffled["counts"].sel(token_id=cell["token_id"], layer=1, expert=cell["expert"]))
        assert float(cell["lift_within"]) == int(cell["counts"]) / max(by_chance, 1)
    assert "lift_within" not in expert_tokens_of(counts, 1)


def test_pointwise_information_is_the_logarithm_of_the_lift() -> None:
    table = token_experts(make_capture(seed=3), 1)
    found = pointwise_of(table)
    for x, e in ((0, 2), (3, 5), (7, 1)):
        cell = table.sel(token_id=x, expert=e)
        count, n = int(cell["counts"]), table.attrs["n"]
        of_expert, of_token = int(table["counts"].sel(expert=e).sum()), int(cell["tokens"])
        assert float(found["token_given_expert"].sel(token_id=x, expert=e)) == count / of_expert
        wanted = math.log2(count * n / of_expert / of_token) if count else -math.inf
        assert float(found["pmi"].sel(token_id=x, expert=e)) == pytest.approx(wanted)


def test_senseless_questions_are_refused() -> None:
    capture = make_capture()
    table, shuffled, first = scan(capture, [TokenCounts(), ShuffledTokenCounts(), ShuffledTokenCounts(choice="first")])
    with pytest.raises(ValueError, match="min_count=0, 1 shuffled tables: both must be at least 1"):
        vocabulary_specialization_of(table, [shuffled], min_count=0)
    with pytest.raises(ValueError, match="min_count=20, 0 shuffled tables: both must be at least 1"):
        vocabulary_specialization_of(table, [])
    with pytest.raises(ValueError, match=r"the tables have different layers: \[0, 1\] and \[0, 1, 2\]"):
        vocabulary_specialization_of(table.isel(layer=slice(2)), [shuffled])
    with pytest.raises(ValueError, match=r"different tokens or choices: .* by any choice, and .* by first"):
        vocabulary_specialization_of(table, [first])
    with pytest.raises(ValueError, match="draws=0: must be at least 1"):
        vocabulary_specialization(capture, draws=0)
    with pytest.raises(ValueError, match="choice='second': must be 'any'"):
        TokenCounts(choice="second")
    with pytest.raises(ValueError, match="size=0: must be at least 1"):
        SampledRoutes(0)


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 6), (16, 8)])
def test_the_corrected_information_of_independent_routes_is_zero_whatever_k(experts: int, k: int) -> None:
    """Choices of one token are different experts: the plain correction subtracts too much."""
    shape = {"documents": 150, "strength": 0, "num_experts": experts, "experts_per_token": k, "layers": range(8)}
    found = [vocabulary_specialization(make_capture(seed=s, **shape), min_count=1) for s in range(3)]
    corrected = np.concatenate([one["corrected"].values for one in found])
    error = corrected.std(ddof=1) / np.sqrt(len(corrected))
    assert abs(corrected.mean()) < 4 * error + 5e-4
