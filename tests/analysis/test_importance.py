"""The effect of every expert on predictions: compared with plain numpy, all sign flips and scipy, and a planted
effect."""

from itertools import product

import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr
from synthetic import make_capture

from analysis import expert_load, importance, importances, interval, least_important, saliency
from analysis.metrics.importance import _spearman

UNIT = 2.0**-20
ARRAYS = ("output_norm", "effect")


def capture_of(documents: int = 9, seed: int = 0, record: tuple[str, ...] = ARRAYS) -> xr.Dataset:
    return make_capture(seed=seed, documents=documents, record=record, chunked=False)


def by_document(capture: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Sums of effects (document, layer, expert) and predicted tokens (document), token by token."""
    special = capture.attrs["special_token_ids"]
    sums: dict[int, np.ndarray] = {}
    many: dict[int, int] = {}
    for row in range(capture.sizes["doc"]):
        document = int(capture["document_id"][row])
        for position in range(int(capture["length"][row]) - 1):
            if int(capture["token"][row, position + 1]) not in special:
                own = capture["effect"].values[row, position].astype(float)
                sums[document] = sums.get(document, 0) + own
                many[document] = many.get(document, 0) + 1
    return np.array(list(sums.values())), np.array(list(many.values()))


def test_effect_interval_and_p_are_those_of_documents() -> None:
    capture = capture_of()
    found = importance(capture, replicates=4000)
    sums, many = by_document(capture)
    mean = sums.sum(0) / many.sum()
    assert (found.attrs["n"], found.attrs["untested"]) == (many.sum(), "")
    np.testing.assert_allclose(found["effect"], mean, atol=UNIT)
    without = (sums.sum(0) - sums) / (many.sum() - many)[:, None, None]
    error = np.sqrt(((without - mean) ** 2).sum(0) * (len(many) - 1) / len(many))
    half = (found["effect_high"] - found["effect_low"]).values / 2
    assert (half > 1.96 * error).all()
    np.testing.assert_allclose(found["effect_low"], mean - half, atol=1e-6)

    signs = np.array(list(product([-1.0, 1.0], repeat=len(many))))
    part = (many / many.sum())[:, None]
    for layer, expert in ((0, 3), (2, 7), (1, 0)):
        own = sums[:, layer, expert] / many.sum()
        flipped = signs * own
        error = np.sqrt(((flipped - part.T * flipped.sum(1)[:, None]) ** 2 / (1 - part.T)).sum(1))
        statistic = abs(flipped.sum(1)) / error
        exact = (statistic >= statistic[-1] - 1e-9).mean()
        assert abs(float(found["p"][layer, expert]) - exact) < 4 * np.sqrt(exact * (1 - exact) / 4000) + 1e-3
    p = found["p"].values.ravel()
    ranks = [(p <= each).sum() for each in p]
    q = [
        min(p[p >= each] * len(p) / np.array([r for r, own in zip(ranks, p, strict=True) if own >= each])) for each in p
    ]
    np.testing.assert_allclose(found["q"].values.ravel(), np.minimum(q, 1))


def test_what_may_predict_an_effect_stands_beside_it_with_its_rank_correlation() -> None:
    capture = capture_of()
    found, load, salient = importance(capture, replicates=9), expert_load(capture), saliency(capture)
    wanted = {"share": load["share"], "weight_share": load["mass_share"]}
    wanted |= {name: salient[name] for name in ("mean_saliency", "total_saliency")}
    assert found["predictor"].values.tolist() == list(wanted)
    loss = -found["effect"].values
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values.transpose("layer", "expert"))
        own = values.transpose("layer", "expert").fillna(0).values
        within = np.mean([spearmanr(loss[layer], own[layer]).statistic for layer in range(3)])
        row = found.sel(predictor=name)
        assert float(row["within_layers"]) == pytest.approx(within)
        assert float(row["over_all"]) == pytest.approx(spearmanr(loss.ravel(), own.ravel()).statistic)
        for kind in ("within_layers", "over_all"):
            assert -1 <= float(row[f"{kind}_low"]) <= float(row[kind]) <= float(row[f"{kind}_high"]) <= 1


def planted(documents: int, seed: int) -> xr.Dataset:
    """Effects around 0, which differ between documents, except expert 5 of layer 1, which always helps."""
    capture = capture_of(documents, seed)
    random = np.random.default_rng(seed)
    own = random.normal(0, 0.05, (documents, 3, 8))[capture["document_id"].values][:, None]
    effect = np.where(np.isnan(capture["effect"]), np.nan, own + random.normal(0, 0.1, capture["effect"].shape))
    effect[:, :, 1, 5] -= 0.3
    return capture.assign(effect=(capture["effect"].dims, effect.astype(np.float32)))


def test_of_all_experts_only_the_planted_one_is_beyond_chance_and_the_others_p_are_even() -> None:
    others = []
    for seed in range(6):
        found = importance(planted(20, seed))
        assert float(found["q"].sel(layer=1, expert=5)) < 0.05
        others.append(np.delete(found["p"].values.ravel(), 13))
        assert (found["q"].values.ravel()[np.arange(24) != 13] < 0.05).sum() <= 1
    assert 0.02 < (np.array(others) < 0.1).mean() < 0.2
    assert found["effect"].argmin(...)["expert"] == 5


def test_it_is_the_same_in_any_chunks_and_of_measured_layers_alone() -> None:
    capture = capture_of()
    whole = importance(capture, replicates=9)
    xr.testing.assert_identical(whole, importance(capture.chunk({"doc": 3}), replicates=9))
    some = capture.copy(deep=True)
    some["effect"].values[:, :, 1] = np.nan
    found = importance(some, replicates=9)
    assert found["layer"].values.tolist() == [0, 2]
    np.testing.assert_array_equal(found["effect"], whole["effect"].sel(layer=[0, 2]))
    some["effect"].values[:] = np.nan
    with pytest.raises(ValueError, match="no effect of an expert was measured"):
        importance(some)
    some["effect"].values[2, 0, 0, 3] = 0.5
    with pytest.raises(ValueError, match="not a finite number: the shard is damaged"):
        importance(some)
    with pytest.raises(ValueError, match=r"needs effect, which .* does not have; python jobs/importance.py makes"):
        importance(capture.drop_vars("effect"))


def test_few_documents_have_effects_and_no_intervals() -> None:
    found = importance(capture_of(4), replicates=9)
    assert "a sign-flip test needs at least 6" in found.attrs["untested"]
    assert np.isfinite(found["effect"]).all()
    assert np.isfinite(found["within_layers"]).all()
    ends = [name for name in found if str(name).endswith(("_low", "_high"))]
    assert all(np.isnan(found[name]).all() for name in (*ends, "p", "q"))


def test_of_several_data_sets_the_least_important_experts_are_those_of_the_mean() -> None:
    captures = {name: capture_of(seed=seed) for name, seed in (("a", 1), ("b", 2))}
    found = {name: importance(capture, replicates=9) for name, capture in captures.items()}
    together = importances(captures, replicates=9)
    for name, alone in found.items():
        own = together.sel(data_set=name, drop=True)
        xr.testing.assert_equal(own[["effect", "p", "q", "share"]], alone[["effect", "p", "q", "share"]])
        share, average = alone["share"].values, (found["a"]["share"].values + found["b"]["share"].values) / 2
        np.testing.assert_allclose(own["lift"], share / average)
        ranks = [
            spearmanr(loss, lift).statistic for loss, lift in zip(-alone["effect"].values, share / average, strict=True)
        ]
        assert float(own["within_layers"].sel(predictor="lift")) == pytest.approx(np.mean(ranks))
    assert "lift" not in importances({"a": captures["a"]}, replicates=9)
    assert together["effect"].dims == ("data_set", "layer", "expert")
    assert (together["n"].values == [found["a"].attrs["n"], found["b"].attrs["n"]]).all()
    mean = (found["a"]["effect"] + found["b"]["effect"]).values / 2
    assert least_important(together, 2) == {layer: np.argsort(-mean[layer])[:2].tolist() for layer in range(3)}
    equal = together.assign(effect=together["effect"] * 0)
    assert least_important(equal, 3) == {layer: [0, 1, 2] for layer in range(3)}
    with pytest.raises(ValueError, match="no data set"):
        importances({})


def test_the_interval_of_a_rank_correlation_holds_what_samples_of_so_many_documents_give() -> None:
    random = np.random.default_rng(1)
    loss = random.lognormal(-3.5, 1, (4, 8))
    salient = loss**0.7 * random.lognormal(0, 0.5, loss.shape)
    found, ends = [], []
    for _ in range(40):
        tokens = random.lognormal(0, 0.4, 12)
        shapes = (12, *loss.shape)
        drawn = loss * (1 + 1.5 * random.standard_t(5, shapes)), salient * random.gamma(4, 1 / 4, shapes)
        times = np.concatenate([np.ones((1, 12)), 1 - np.eye(12)]) * tokens
        means = [np.tensordot(times, each, 1) / times.sum(1)[:, None, None] for each in drawn]
        values = xr.DataArray(
            _spearman(*means, True), dims="replicate", coords={"left_out": ("replicate", [0, *tokens])}
        )
        sure = interval(values)
        found.append(float(sure["estimate"]))
        ends.append((float(sure["low"]), float(sure["high"])))
    low, high = np.array(ends).T
    assert ((low <= np.mean(found)) & (np.mean(found) <= high)).mean() >= 0.9
