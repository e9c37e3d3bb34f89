"""Resampling and many tests: against plain Python, and against what they promise."""

from functools import partial

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_capture

from analysis.metrics.choices import Choices
from analysis.metrics.load import Load
from analysis.metrics.repetition import Repetition
from analysis.metrics.tokens import TokenCounts
from analysis.scanning import Selection, scan
from analysis.statistics.resampling import (
    Resampled,
    Thinned,
    false_discovery,
    interval,
    p_value,
    poisson_weights,
    split_weights,
)


def test_bootstrap_weights_are_poisson_of_mean_one_and_independent() -> None:
    weights = poisson_weights(np.arange(4000), 500)
    assert (weights[0] == 1).all()
    drawn, n = weights[1:], 500 * 4000
    for value, probability in enumerate([0.36788, 0.36788, 0.18394, 0.06131, 0.01533]):
        share = (drawn == value).mean()
        assert abs(share - probability) < 5 * np.sqrt(probability / n)
    assert abs(np.corrcoef(drawn[:40])[np.triu_indices(40, 1)]).max() < 5 / np.sqrt(4000)
    assert abs(np.corrcoef(drawn[:, :40].T)[np.triu_indices(40, 1)]).max() < 5 / np.sqrt(500)
    assert not np.array_equal(drawn, poisson_weights(np.arange(4000), 500, seed=1)[1:])


def test_weights_depend_on_the_document_alone() -> None:
    document = np.array([7, 3, 7, 10**12, 3])
    for weights in (poisson_weights, partial(split_weights, low=0.0, high=0.3)):
        whole = weights(document, 50)
        np.testing.assert_array_equal(whole[:, 0], whole[:, 2])
        np.testing.assert_array_equal(whole[:, 1:4], weights(document[1:4], 50))
    split = split_weights(np.arange(20_000), 100, low=0.5, high=0.8)[1:]
    assert set(np.unique(split)) == {0, 1}
    assert abs(split.mean() - 0.3) < 5 * np.sqrt(0.21 / split.size)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(8, 2), (5, 3), (20, 2)]), st.none() | st.integers(1, 9))
def test_a_replicate_is_the_sum_of_its_documents_as_often_as_they_count(
    seed: int, shape: tuple[int, int], chunk: int | None
) -> None:
    capture = make_capture(seed=seed, documents=6, num_experts=shape[0], experts_per_token=shape[1], chunked=False)
    if chunk is not None:
        capture = capture.chunk({"doc": chunk})
    documents = sorted(set(capture["document_id"].values.tolist()))
    alone = {d: scan(capture, [Choices(), Load()], only=Selection(documents=(d,))) for d in documents}
    asked = [Resampled(Choices(joint=False), 7), Resampled(Load(), 7)]
    weights = poisson_weights(np.array(documents), 7)
    for index, (found, name) in enumerate(zip(scan(capture, asked), ("followed_all", "count"), strict=True)):
        for replicate in range(8):
            wanted = sum(
                int(times) * alone[d][index][name].values
                for d, times in zip(documents, weights[replicate], strict=True)
            )
            np.testing.assert_array_equal(found[name].sel(replicate=replicate), wanted)
    whole = scan(capture, [Load()])[0]
    xr.testing.assert_allclose(scan(capture, asked)[1]["share"].isel(replicate=0, drop=True), whole["share"])


def test_intervals_and_p_values_are_the_ranks_of_replicates() -> None:
    values = xr.DataArray([[5.0, 1.0], *([float(n), 0.0] for n in range(1, 101))], dims=("replicate", "x"))
    found = interval(values, level=0.9)
    assert found["estimate"].values.tolist() == [5.0, 1.0]
    np.testing.assert_allclose(found["low"], [np.quantile(np.arange(1, 101), 0.05), 0])
    np.testing.assert_allclose(found["high"], [np.quantile(np.arange(1, 101), 0.95), 0])
    np.testing.assert_allclose(found["standard_error"], [np.std(np.arange(1, 101), ddof=1), 0])
    assert p_value(values).values.tolist() == [pytest.approx(97 / 101), pytest.approx(1 / 101)]
    with pytest.raises(ValueError, match=r"level=1\.5"):
        interval(values, level=1.5)
    with pytest.raises(ValueError, match="replicates=0"):
        Resampled(Load(), 0)


@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=30))
def test_false_discovery_is_the_step_up_of_benjamini_and_hochberg(p: list[float | None]) -> None:
    values = xr.DataArray([np.nan if one is None else one for one in p], dims="cell")
    adjusted = false_discovery(values).values
    tested = sorted(one for one in p if one is not None)
    for q in (0.01, 0.05, 0.2, 0.5):
        passing = [rank for rank, one in enumerate(tested, 1) if one <= q * rank / len(tested)]
        limit = tested[passing[-1] - 1] if passing else -1.0
        for one, found in zip(p, adjusted, strict=True):
            if one is None:
                assert np.isnan(found)
            elif abs(found - q) > 1e-9:
                assert (found < q) == (one <= limit), (one, found, q)


def coverage_of_intervals(simulations: int, documents: int, replicates: int, seed: int) -> float:
    """Share of simulated data sets whose 95 % interval of an expert's share holds the true share.

    Documents have sizes and preferences of their own, so that tokens of one resemble each other: intervals over tokens
    would hold it half the time.
    """
    random = np.random.default_rng(seed)
    weights = poisson_weights(np.arange(documents), replicates)
    truth, held = 0.3, 0
    for _ in range(simulations):
        size = random.integers(50, 150, documents)
        hits = random.binomial(size, random.beta(3, 7, documents))  # of mean 0.3, whatever the size
        found = interval(xr.DataArray((weights @ hits) / (weights @ size), dims="replicate"))
        held += bool(found["low"] <= truth <= found["high"])
        weights = poisson_weights(np.arange(documents), replicates, seed=int(random.integers(2**31)))
    return held / simulations


def test_intervals_of_95_percent_hold_the_truth_about_that_often() -> None:
    simulations = 200
    error = np.sqrt(0.95 * 0.05 / simulations)
    assert abs(coverage_of_intervals(simulations, documents=150, replicates=300, seed=4) - 0.95) < 3 * error


def test_repetition_can_be_resampled_too() -> None:
    capture = make_capture(documents=30)
    found = scan(capture, [Resampled(Repetition(joint=False), 60)])[0]
    tails = interval(found["any_shared"].sel(lag=1))
    assert bool(((tails["low"] <= tails["estimate"]) & (tails["estimate"] <= tails["high"])).all())
    assert bool((tails["standard_error"] > 0).all())
    xr.testing.assert_allclose(tails["estimate"], scan(capture, [Repetition()])[0]["any_shared"].sel(lag=1))


def test_what_has_no_value_has_no_p_value_either() -> None:
    values = xr.DataArray([[np.nan, 3.0], [1.0, 1.0], [2.0, 5.0]], dims=("replicate", "cell"))
    found = p_value(values)
    assert bool(found.isnull()[0])
    assert float(found[1]) == 2 / 3


def test_what_is_no_sum_cannot_be_resampled() -> None:
    with pytest.raises(ValueError, match="TokenCounts is no sum over rows"):
        Resampled(TokenCounts())


def test_a_thinned_count_is_that_of_some_documents_whole_and_the_same_in_any_order() -> None:
    capture = make_capture(documents=400, seed=4)
    thinned = scan(capture, [Thinned(Load(), 0.25)])[0]
    documents = np.unique(capture["document_id"].values)
    alone = {
        number: scan(capture.isel(doc=capture["document_id"].values == number), [Thinned(Load(), 0.25)])[0]
        for number in documents[:40].tolist()
    }
    whole = {number: int((capture["document_id"].values == number).sum()) for number in alone}
    assert {found.attrs["n"] > 0 for found in alone.values()} == {True, False}, whole
    assert 0.15 < thinned.attrs["n"] / scan(capture, [Load()])[0].attrs["n"] < 0.35
    for number, found in alone.items():  # all of a document, or nothing
        own = capture.isel(doc=capture["document_id"].values == number)
        assert found.attrs["n"] in (0, scan(own, [Load()])[0].attrs["n"])
    backwards = capture.isel(doc=slice(None, None, -1)).chunk({"doc": 3})
    assert scan(backwards, [Thinned(Load(), 0.25)])[0]["count"].equals(thinned["count"])
    assert scan(capture, [Thinned(Load(), 1.0)])[0]["count"].equals(scan(capture, [Load()])[0]["count"])


def test_what_cannot_be_thinned_is_refused() -> None:
    with pytest.raises(ValueError, match="Choices counts codes"):
        Thinned(Choices(), 0.5)
    with pytest.raises(ValueError, match="share=0: above 0, and at most 1"):
        Thinned(Load(), 0)
