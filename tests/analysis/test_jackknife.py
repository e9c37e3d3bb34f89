"""The jackknife: compared with captures that really lack a document, and with the coverage of its intervals."""

import numpy as np
import pytest
import xarray as xr
from drawn_documents import Documents, counted, lengths
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import make_capture

from analysis.metrics.choices import Choices
from analysis.metrics.load import ExpertCounts, Load, balance_of, share_of_experts
from analysis.metrics.repetition import Repetition
from analysis.metrics.tokens import TokenCounts
from analysis.scanning import scan
from analysis.statistics.jackknife import (
    MIN_EFFECTIVE_DOCUMENTS,
    UNITS,
    Jackknife,
    effective_documents,
    interval,
    unit_of,
    without_each,
)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(8, 2), (5, 3), (20, 2)]), st.none() | st.integers(1, 9))
def test_a_replicate_is_the_capture_without_a_unit(seed: int, shape: tuple[int, int], chunk: int | None) -> None:
    capture = make_capture(seed=seed, documents=7, num_experts=shape[0], experts_per_token=shape[1], chunked=False)
    asked = [Choices(joint=False), Load()]
    document = np.unique(capture["document_id"].values, return_inverse=True)[1]
    chunked = capture if chunk is None else capture.chunk({"doc": chunk})
    for units in (3, 128):
        found = scan(chunked, [Jackknife(reducer, units) for reducer in asked])
        unit, tokens = unit_of(document, units), {}
        for number in range(units):
            left = capture.isel(doc=unit != number)
            lost = int(scan(capture, [Load()])[0].attrs["n"]) - int(scan(left, [Load()])[0].attrs["n"])
            if lost:
                tokens[number] = lost
        assert found[0].attrs["units"] == len(tokens)
        assert found[0]["left_out"].values.tolist() == [0, *tokens.values()]
        for replicate, number in enumerate([None, *tokens]):
            part = capture if number is None else capture.isel(doc=unit != number)
            for result, whole, name in zip(found, scan(part, asked), ("followed_all", "counts"), strict=True):
                np.testing.assert_array_equal(result[name].sel(replicate=replicate), whole[name])


def test_up_to_so_many_documents_are_units_of_their_own_and_more_are_spread_evenly() -> None:
    assert unit_of(np.arange(UNITS), UNITS).tolist() == list(range(UNITS))
    many = unit_of(np.arange(10 * UNITS), UNITS)
    assert np.bincount(many).tolist() == [10] * UNITS
    assert len(set(many.reshape(10, UNITS)[:, 0].tolist())) > 5  # at random, and not each block in the same order
    shuffled = np.random.default_rng(0).permutation(10 * UNITS)
    np.testing.assert_array_equal(unit_of(shuffled, UNITS), many[shuffled])


def test_numbers_of_documents_do_not_matter() -> None:
    capture = make_capture(documents=20)
    other = capture.assign(document_id=("doc", 1000 - 7 * capture["document_id"].values[::1]))
    one, two = (interval(scan(data, [Jackknife(Load())])[0]["share"], scale="share") for data in (capture, other))
    for name in ("estimate", "low", "high", "standard_error"):
        np.testing.assert_allclose(one[name], two[name], rtol=1e-9)


def test_the_interval_of_a_mean_is_students() -> None:
    random = np.random.default_rng(3)
    values = random.normal(size=12)
    left = np.array([np.delete(values, n).mean() for n in range(12)])
    found = interval(xr.DataArray([values.mean(), *left], dims="replicate"), level=0.9)
    error = values.std(ddof=1) / np.sqrt(12)
    low, high = stats.t.interval(0.9, 11, loc=values.mean(), scale=error)
    assert float(found["standard_error"]) == pytest.approx(error)
    assert [float(found["low"]), float(found["high"])] == pytest.approx([low, high])


def test_the_bias_of_a_plug_in_variance_is_taken_off_exactly() -> None:
    values = np.random.default_rng(3).normal(size=9)
    plug_in = [values.var(), *(np.delete(values, n).var() for n in range(9))]
    found = interval(xr.DataArray(plug_in, dims="replicate"), corrected=True)
    assert float(found["estimate"]) == pytest.approx(values.var(ddof=1))


def test_shares_stay_within_0_and_1_and_few_effective_documents_have_no_interval() -> None:
    tokens = xr.DataArray([0, 90, 10, 10, 10, 10], dims="replicate")
    assert effective_documents(tokens.values[1:]) == pytest.approx(130**2 / (90**2 + 400))
    values = xr.DataArray([0.01, 0.0, 0.02, 0.01, 0.01, 0.01], dims="replicate")
    alike = interval(values, scale="share")
    assert 0 < float(alike["low"]) < 0.01 < float(alike["high"]) < 1
    unequal = interval(values.assign_coords(left_out=tokens), scale="share")
    assert unequal.attrs["effective_documents"] < MIN_EFFECTIVE_DOCUMENTS
    assert float(unequal["estimate"]) == 0.01
    assert bool(unequal[["low", "high", "standard_error"]].isnull().all().to_array().all())
    never = interval(xr.zeros_like(values), scale="share")
    assert bool(never["low"].isnull()) and bool(never["high"].isnull())  # noqa: PT018


@pytest.mark.parametrize(
    ("kind", "spread", "number", "experts"),
    [("200", 40, 8, 8), ("200 ± 1", 5, 12, 8), ("200 ± 1", None, 12, 8), ("200", None, 100, 64)],
)
def test_intervals_of_95_percent_hold_the_truth_about_that_often(
    kind: str, spread: float | None, number: int, experts: int
) -> None:
    """A small form of the table "coverage" of tests/benchmarks/inference.py; layers are simulations."""
    random = np.random.default_rng(11)
    share_held, balance_held, known = 0, 0, 0
    for _ in range(4):
        documents = Documents(random, lengths(random, kind, number), spread, experts=experts)
        found = counted(documents.counts(100), documents.tokens)
        share, truth = share_of_experts(found["counts"]), documents.reach / documents.reach.sum()
        ends = interval(share, scale="share")
        if not bool(ends["low"].isel(expert=0).notnull().any()):
            continue
        known += 100
        share_held += int(((ends["low"] <= truth) & (truth <= ends["high"])).isel(expert=0).sum())
        even = balance_of(xr.Dataset({"share": share}, attrs=found.attrs))["effective_experts"]
        ends = interval(even, corrected=True)
        balance_held += int(((ends["low"] <= experts + 1e-9) & (experts - 1e-9 <= ends["high"])).sum())
    assert known >= 300
    assert share_held / known > 0.95 - 3 * np.sqrt(0.95 * 0.05 / known)
    assert balance_held / known > 0.95 - 3 * np.sqrt(0.95 * 0.05 / known)


def test_repetition_has_intervals_too() -> None:
    capture = make_capture(documents=30)
    found = scan(capture, [Jackknife(Repetition())])[0]
    ends = interval(found["any_shared"].sel(lag=1), scale="share")
    assert bool(((ends["low"] < ends["estimate"]) & (ends["estimate"] < ends["high"])).all())
    xr.testing.assert_allclose(ends["estimate"], scan(capture, [Repetition()])[0]["any_shared"].sel(lag=1))


def test_what_cannot_be_left_out_or_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="TokenCounts is not a sum over rows"):
        Jackknife(TokenCounts())
    with pytest.raises(ValueError, match="units=1: must be at least 2"):
        Jackknife(ExpertCounts(), 1)
    with pytest.raises(ValueError, match=r"level=1\.5"):
        interval(xr.DataArray([1.0, 1.0], dims="replicate"), level=1.5)


def left_out_one(capture: xr.Dataset) -> list[xr.Dataset]:
    """A capture without each of its documents in turn."""
    document = capture["document_id"].values
    return [capture.isel(doc=document != own) for own in np.unique(document)]


def test_a_mean_over_the_tokens_of_few_documents_has_their_degrees_of_freedom() -> None:
    """Of two means over ten documents, the second is of tokens that only five of them have."""
    random = np.random.default_rng(0)
    value = random.normal(size=(10, 2))
    tokens = np.array([[100] * 10, [100] * 5 + [0] * 5]).T
    totals, counts = without_each(value * tokens), without_each(tokens)
    values, amount = (xr.DataArray(each, dims=("replicate", "cell")) for each in (totals / counts, counts))
    found = interval(values, amount=amount)
    for cell, n in ((0, 10), (1, 5)):
        own = value[:n, cell]
        low, high = stats.t.interval(0.95, n - 1, own.mean(), own.std(ddof=1) / np.sqrt(n))
        # With ten units of which five are empty, the jackknife's factor is 9/10 in place of 4/5.
        stretch = np.sqrt((9 / 10) / ((n - 1) / n))
        assert float(found["high"][cell] - found["low"][cell]) == pytest.approx((high - low) * stretch)
    few = xr.where(amount == 500, 500, amount).isel(cell=[1]) * 0 + without_each(
        np.array([[97], [1], [1], [1]] + [[0]] * 6)
    )
    assert bool(interval(values.isel(cell=[1]), amount=few)["low"].isnull().all())
