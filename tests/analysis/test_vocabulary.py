"""Vocabulary specialization against a loop, its null against real shuffles, and the sample that it is drawn from."""

import math
from collections import Counter

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import captures, make_capture
from test_scan import routed_tokens

from analysis.metrics.tokens import TokenCounts, token_experts
from analysis.metrics.vocabulary import (
    SampledRoutes,
    pointwise_of,
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
@given(captures(), st.integers(1, 4))
def test_specialization_and_association_equal_a_loop(capture: xr.Dataset, min_count: int) -> None:
    found = vocabulary_specialization(capture, min_count=min_count, draws=2)
    routed = list(routed_tokens(capture))
    tokens = [token for token, *_ in routed]
    for layer in range(capture.sizes["layer"]):
        shares = largest_shares(tokens, [expert[layer] for _, expert, _ in routed], min_count)
        if not shares:
            assert all(bool(found[name][layer].isnull()) for name in found)
            continue
        n = sum(count for count, _ in shares.values())
        assert (found.attrs["n"], found.attrs["token_ids"]) == (n, len(shares))
        assert float(found["specialization"][layer]) == pytest.approx(sum(s for _, s in shares.values()) / len(shares))
        assert float(found["specialization_weighted"][layer]) == pytest.approx(
            sum(c * s for c, s in shares.values()) / n
        )
        cells = Counter((x, int(e)) for x, expert, _ in routed if x in shares for e in expert[layer])
        total = sum(cells.values())
        of_token, of_expert = Counter(), Counter()
        for (x, e), count in cells.items():
            of_token[x] += count
            of_expert[e] += count
        information = sum(c / total * math.log2(c * total / of_token[x] / of_expert[e]) for (x, e), c in cells.items())
        assert float(found["mutual_information"][layer]) == pytest.approx(information, abs=1e-12)


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (6, 1), (16, 4)])
def test_the_null_is_what_shuffled_identities_give(experts: int, k: int) -> None:
    capture = make_capture(
        seed=1, documents=150, sequence_length=32, layers=(2, 5), num_experts=experts, experts_per_token=k
    )
    found = vocabulary_specialization(capture, min_count=5, draws=400)
    routed = list(routed_tokens(capture))
    tokens, random = [token for token, *_ in routed], np.random.default_rng(0)
    for layer in range(2):
        chosen, plain, weighted = [expert[layer] for _, expert, _ in routed], [], []
        for _ in range(60):
            shares = list(largest_shares(random.permutation(tokens).tolist(), chosen, 5).values())
            plain.append(sum(share for _, share in shares) / len(shares))
            weighted.append(sum(n * share for n, share in shares) / sum(n for n, _ in shares))
        for name, values in (("null", plain), ("null_weighted", weighted)):
            deviation = float(found[f"{name}_sd"][layer])
            assert float(found[name][layer]) == pytest.approx(np.mean(values), abs=max(0.7 * deviation, 0.003)), name
            assert 0.6 * np.std(values) < deviation, name
            assert name == "null_weighted" or deviation < 1.7 * np.std(values)
    excess = found["specialization"] - found["null"]
    assert bool((excess > 5 * found["null_sd"]).all()), "synthetic tokens have tastes"


def test_routes_that_know_no_tokens_are_at_the_null() -> None:
    capture = make_capture(seed=2, documents=300, strength=0)
    found = vocabulary_specialization(capture, min_count=10)
    for suffix in ("", "_weighted"):
        measured = found[suffix.removeprefix("_") or "specialization"]
        assert bool((abs(measured - found[f"null{suffix}"]) < 4 * found[f"null{suffix}_sd"]).all())
    assert bool((abs(found["corrected"]) < 0.01).all())


@some
@given(st.integers(0, 2**31), st.none() | st.integers(1, 9), st.integers(1, 60))
def test_the_sample_of_routes_is_the_same_in_any_chunking_and_order(seed: int, chunk: int | None, size: int) -> None:
    capture = make_capture(seed=seed, documents=7, chunked=False)
    wanted = scan(capture, [SampledRoutes(size)], threads=1)[0]
    chunked = capture if chunk is None else capture.chunk({"doc": chunk})
    shuffled = chunked.isel(doc=np.random.default_rng(seed).permutation(capture.sizes["doc"]))
    for other in (chunked, shuffled):
        xr.testing.assert_identical(scan(other, [SampledRoutes(size)], threads=3)[0], wanted)
    counted = [expert.tobytes() for _, expert, _ in routed_tokens(capture)]
    assert wanted.attrs["n"] == min(size, len(counted))
    sampled = Counter(route.tobytes() for route in wanted["expert"].values)
    assert sampled <= Counter(np.asarray(route).tobytes() for _, route, _ in routed_tokens(capture))


def test_pointwise_information_is_the_logarithm_of_the_lift() -> None:
    table = token_experts(make_capture(seed=3), 1)
    found = pointwise_of(table)
    for x, e in ((0, 2), (3, 5), (7, 1)):
        cell = table.sel(token_id=x, expert=e)
        count, n = int(cell["count"]), table.attrs["n"]
        of_expert, of_token = int(table["count"].sel(expert=e).sum()), int(cell["tokens"])
        assert float(found["token_given_expert"].sel(token_id=x, expert=e)) == count / of_expert
        wanted = math.log2(count * n / of_expert / of_token) if count else -math.inf
        assert float(found["pmi"].sel(token_id=x, expert=e)) == pytest.approx(wanted)


def test_senseless_questions_are_refused() -> None:
    capture = make_capture()
    table, routes = scan(capture, [TokenCounts(), SampledRoutes()])
    with pytest.raises(ValueError, match="min_count=0, draws=200: both must be at least 1"):
        vocabulary_specialization_of(table, routes, min_count=0)
    with pytest.raises(ValueError, match=r"the tables are of other layers: \[0, 1\] and \[0, 1, 2\]"):
        vocabulary_specialization_of(table.isel(layer=slice(2)), routes)
    with pytest.raises(ValueError, match="size=0: at least 1"):
        SampledRoutes(0)


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (8, 2), (8, 6), (16, 8)])
def test_the_corrected_information_of_independent_routes_is_zero_whatever_k(experts: int, k: int) -> None:
    """Choices of one token are different experts: the plain correction takes too much."""
    found = [
        vocabulary_specialization(
            make_capture(seed=s, documents=150, strength=0, num_experts=experts, experts_per_token=k, layers=range(8)),
            min_count=1,
            draws=1,
        )
        for s in range(3)
    ]
    corrected = np.concatenate([one["corrected"].values for one in found])
    error = corrected.std(ddof=1) / np.sqrt(len(corrected))
    assert abs(corrected.mean()) < 4 * error + 5e-4
