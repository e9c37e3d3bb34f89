"""Differences of means: compared with Welch's test of documents, and how often equal means are rejected."""

from typing import Any

import numpy as np
import pytest
import xarray as xr
from drawn_means import counted, documents
from scipy import stats
from synthetic import make_capture

from analysis import (
    Jackknife,
    LogProbability,
    RouterDistribution,
    Saliency,
    mean_contrast,
    mean_contrast_of,
    scan,
    scores_of,
)
from analysis.statistics.jackknife import interval
from analysis.statistics.resampled import Totals, together


def test_estimates_and_errors_are_those_of_welch_for_documents_of_one_length() -> None:
    random = np.random.default_rng(2)
    sides = random.normal(0, 1, (12, 1)), random.normal(0.8, 3, (30, 1))
    found = mean_contrast_of({n: counted(s, np.full(s.shape, 50)) for n, s in zip("ab", sides, strict=True)}, "value")
    welch = stats.ttest_ind(*(side[:, 0] for side in sides), equal_var=False)
    own = found.sel(data_set="a").isel(cell=0)
    assert float(own["difference"]) == pytest.approx(sides[0].mean() - sides[1].mean())
    assert float(own["difference_p"]) == pytest.approx(welch.pvalue, abs=0.06)
    assert found["difference_p"].values.tolist() == [[float(own["difference_p"])]] * 2
    assert float(own["difference_high"] - own["difference"]) == pytest.approx(
        float(own["difference"] - own["difference_low"])
    )
    one, other = (
        Totals(*(each[0] - each[1:] for each in (side["value"].values * side["tokens"].values, side["tokens"].values)))
        for side in (counted(s, np.full(s.shape, 50)) for s in sides)
    )
    error = np.sqrt(sum(float(each.fitted(np.ones((1, len(each.total))))[1][0, 0]) for each in (one, other)))
    assert float(own["difference"]) / error == pytest.approx(welch.statistic)
    assert float(one.degrees[0]) == pytest.approx(11)


def test_one_draw_of_documents_is_their_mean_and_error_by_a_loop() -> None:
    random = np.random.default_rng(6)
    total, amount = random.normal(size=(9, 2)), random.integers(1, 50, (9, 2)).astype(float)
    times = np.bincount(random.integers(0, 9, 9), minlength=9)
    mean, variance = Totals(total, amount).fitted(times[None].astype(float))
    for cell in range(2):
        drawn = [(total[u, cell], amount[u, cell]) for u in range(9) for _ in range(times[u])]
        m = sum(s for s, _ in drawn) / sum(n for _, n in drawn)
        part = amount[:, cell] / amount[:, cell].sum()
        squares = sum(times[u] * (total[u, cell] - amount[u, cell] * m) ** 2 / (1 - part[u]) for u in range(9))
        assert mean[0, cell] == pytest.approx(m)
        assert variance[0, cell] == pytest.approx(squares / sum(n for _, n in drawn) ** 2)


def test_p_of_one_test_is_that_of_a_bootstrap_by_hand_and_more_cells_make_it_larger() -> None:
    random = np.random.default_rng(3)
    values = random.normal(0.6, 1, (15, 6))
    values[:, 1:] -= values[:, 1:].mean(0)  # nothing to find in the other cells
    amount = np.full(values.shape, 10.0)
    alone, six = (together([Totals(values[:, :n] * 10, amount[:, :n])], np.ones((1, 1))) for n in (1, 6))
    own = values[:, 0]
    t = abs(own.mean()) / (own.std(ddof=1) / np.sqrt(15))
    drawn = own[random.integers(0, 15, (4000, 15))]
    by_hand = abs(drawn.mean(1) - own.mean()) / (drawn.std(axis=1) * np.sqrt(15 / 14) / np.sqrt(15))
    assert float(alone.p[0, 0]) == pytest.approx((by_hand >= t).mean(), abs=0.03)
    assert (alone.tests, six.tests) == (1, 6)
    assert six.p[0, 0] > alone.p[0, 0]
    assert (six.high - six.low)[0, 0] > (alone.high - alone.low)[0, 0]


@pytest.mark.parametrize(
    ("numbers", "lengths", "spreads"),
    [((14, 14), "equal", (0.3, 0.3)), ((12, 60), "equal", (0.7, 0.2)), ((30, 60), "unequal", (0.7, 0.2)),
     ((30, 100), "unequal", (0.2, 0.7))],
)  # fmt: skip
def test_equal_means_are_seldom_told_apart_where_documents_are_few_unequal_and_unlike(
    numbers: tuple[int, int], lengths: str, spreads: tuple[float, float]
) -> None:
    random = np.random.default_rng(17)
    rejected, known = 0, 0
    for _ in range(150):
        sides = {
            n: documents(random, size, lengths, spread, 8)
            for n, size, spread in zip("ab", numbers, spreads, strict=True)
        }
        p = mean_contrast_of(sides, "value", replicates=199)["difference_p"]
        known += bool(p.notnull().any())
        rejected += float(p.min()) <= 0.05
    assert known >= 100
    assert rejected / known < 0.05 + 3 * np.sqrt(0.05 * 0.95 / known)


@pytest.mark.parametrize(("number", "lengths"), [(8, "equal"), (20, "unequal")])
def test_intervals_of_95_percent_hold_a_mean_about_that_often(number: int, lengths: str) -> None:
    random, held, known = np.random.default_rng(3), 0, 0
    for _ in range(60):
        drawn = documents(random, number, lengths, 0.3, 8)
        ends = interval(drawn["value"], amount=drawn["tokens"])
        known += int(ends["low"].notnull().sum())
        held += int(((ends["low"] <= 1) & (ends["high"] >= 1)).sum())
    assert known >= 400
    assert held / known > 0.95 - 3 * np.sqrt(0.95 * 0.05 / known)


def test_a_difference_is_found_and_its_interval_holds_it() -> None:
    random = np.random.default_rng(4)
    sides = {name: documents(random, 40, "unequal", 0.3, 6) for name in "ab"}
    moved = sides["b"].assign(value=sides["b"]["value"] + xr.DataArray([0, 0, 1.0, 0, 0, 0], dims="cell").values)
    moved["value"].attrs["amount"] = "tokens"
    found = mean_contrast_of({"a": sides["a"], "b": moved}, "value").sel(data_set="b")
    assert float(found["difference_p"][2]) == 0.001
    assert float(found["difference_low"][2]) < 1 < float(found["difference_high"][2])
    assert float(found["difference_p"].drop_isel(cell=2).min()) > 0.05


def test_few_documents_and_cells_of_few_documents_are_not_tested() -> None:
    random = np.random.default_rng(5)
    sides = {name: documents(random, number, "equal", 0.3, 3) for name, number in (("a", 20), ("b", 20), ("few", 6))}
    found = mean_contrast_of(sides, "value")
    assert list(found.attrs["untested"]) == ["few"]
    assert bool(found["difference_p"].sel(data_set="few").isnull().all())
    only = mean_contrast_of({name: sides[name] for name in "ab"}, "value")
    np.testing.assert_array_equal(found["difference"].sel(data_set=["a", "b"]), only["difference"])
    tokens = np.full((20, 2), 50.0)
    tokens[8:, 1] = 0
    part = counted(random.normal(size=(20, 2)), tokens)
    p = mean_contrast_of({"a": part, "b": part}, "value")["difference_p"]
    assert p.isnull().values.tolist() == [[False, True]] * 2


@pytest.mark.parametrize("variable", ["mean_entropy", "mean_saliency", "within"])
def test_captures_are_contrasted_by_any_mean(variable: str) -> None:
    record = ("logit", "output_norm", "logprob")
    captures = {
        name: make_capture(seed=seed, documents=30, vocabulary=8, record=record) for name, seed in (("a", 1), ("b", 2))
    }
    reducers: dict[str, Any] = {
        "mean_entropy": RouterDistribution(scores_of(captures["a"])),
        "mean_saliency": Saliency(),
        "within": LogProbability(),
    }
    found = mean_contrast(captures, reducers[variable], variable)
    one, other = (scan(capture, [reducers[variable]])[0][variable] for capture in captures.values())
    np.testing.assert_allclose(found["difference"].sel(data_set="a"), one - other)
    assert found["difference_low"].notnull().any()


def test_what_cannot_be_contrasted_is_an_error() -> None:
    capture = make_capture(documents=12, record=("output_norm",))
    with pytest.raises(
        ValueError, match="'mean_salience' is not a mean of the reducer; it has mean_saliency, mean_norm"
    ):
        mean_contrast({"a": capture, "b": capture}, Saliency(), "mean_salience")
    with pytest.raises(ValueError, match="Saliency needs output_norm"):
        mean_contrast({"a": capture, "b": make_capture()}, Saliency(), "mean_saliency")
    found = scan(capture, [Jackknife(Saliency())])[0]
    with pytest.raises(ValueError, match="1 data sets: a contrast needs at least two"):
        mean_contrast_of({"a": found}, "mean_saliency")
    with pytest.raises(ValueError, match="level=2"):
        mean_contrast_of({"a": found, "b": found}, "mean_saliency", level=2)
