"""The effect of a second capture on predictions: compared with plain numpy and all flips, and with nothing known."""

from itertools import product

import numpy as np
import pytest
import xarray as xr
from drawn_effects import documents
from scipy.stats import t as student
from synthetic import make_capture

from analysis import effect, effect_by_data_set
from analysis.metrics.effect import effect_of

UNIT = 2.0**-20


def predicting(capture: xr.Dataset, seed: int, shift: float = 0.0) -> xr.Dataset:
    """The capture with log-probabilities of the next tokens, worse by `shift` on average; NaN if no token follows."""
    random = np.random.default_rng(seed)
    followed = np.arange(capture.sizes["position"]) < capture["length"].values[:, None] - 1
    values = np.where(followed, -random.gamma(2.0, size=followed.shape) - shift, np.nan).astype(np.float32)
    return capture.assign(logprob=(("doc", "position"), values)).chunk({"doc": 4})


def plainly(one: xr.Dataset, other: xr.Dataset) -> list[tuple[int, int, float]]:
    """Document, predicted token and difference, one by one."""
    found = []
    special = one.attrs["special_token_ids"]
    for row in range(one.sizes["doc"]):
        for position in range(int(one["length"][row]) - 1):
            token = int(one["token"][row, position + 1])
            if token not in special:
                values = [float(each["logprob"][row, position]) for each in (one, other)]
                found.append((int(one["document_id"][row]), token, values[1] - values[0]))
    return found


def test_the_effect_its_interval_and_p_are_those_of_documents() -> None:
    whole = make_capture(documents=9, chunked=False)
    one, other = predicting(whole, 1), predicting(whole, 2, 0.3)
    found, plain = effect(one, other, replicates=4000), plainly(one.load(), other.load())
    difference = np.array([each[2] for each in plain])
    assert (found.attrs["n"], found.attrs["untested"]) == (len(plain), "")
    assert float(found["effect"]) == pytest.approx(difference.mean(), abs=UNIT)
    for token in range(whole.sizes["token_id"]):
        own = [each[2] for each in plain if each[1] == token]
        assert int(found["tokens"][token]) == len(own)
        if own:
            assert float(found["of_token"][token]) == pytest.approx(np.mean(own), abs=UNIT)

    document = np.array([each[0] for each in plain])
    sums, many = (np.array([f(difference[document == d]) for d in np.unique(document)]) for f in (np.sum, len))
    without = (sums.sum() - sums) / (many.sum() - many)
    error = np.sqrt(((without - difference.mean()) ** 2).sum() * (len(many) - 1) / len(many))
    half = float(found["high"] - found["low"]) / 2
    assert half > 1.96 * error
    assert float(found["low"]) == pytest.approx(difference.mean() - half, abs=1e-5)

    def studentized(signs: np.ndarray) -> float:
        own, part = signs * sums / many.sum(), many / many.sum()
        return abs(own.sum()) / np.sqrt(((own - part * own.sum()) ** 2 / (1 - part)).sum())

    flips = np.array([studentized(np.array(signs)) for signs in product([-1.0, 1.0], repeat=len(sums))])
    exact = (flips >= studentized(np.ones(len(sums))) - 1e-9).mean()
    assert abs(float(found["p"]) - exact) < 4 * np.sqrt(exact * (1 - exact) / 4000) + 1e-3


def test_the_effect_on_classes_is_that_of_their_tokens_and_p_is_adjusted_for_all_of_them() -> None:
    pieces = [("7", "▁the", "HTTP", "▁(", "が")[number % 5] for number in range(40)]
    whole = make_capture(documents=13, chunked=False, pieces=pieces, special_token_ids=())
    one, other = predicting(whole, 1), predicting(whole, 2, 0.3)
    wanted = {"digits": "7", "word-initial": "▁the", "uppercase": "HTTP", "/[(]/": "▁(", "han": ""}
    found, plain = effect(one, other, classes=list(wanted), replicates=4000), plainly(one.load(), other.load())
    documents, units, statistics = sorted({each[0] for each in plain}), len(set(one["document_id"].values.tolist())), {}
    flips = np.array(list(product([1.0, -1.0], repeat=len(documents))))  # the first row has the original signs
    for name, piece in wanted.items():
        own, of_class = found.sel(token_class=name), [each for each in plain if pieces[each[1]] == piece]
        sums = np.array([sum(each[2] for each in of_class if each[0] == d) for d in documents])
        many = np.array([sum(each[0] == d for each in of_class) for d in documents])
        assert int(own["class_tokens"]) == many.sum()
        effective = many.sum() ** 2 / max((many**2).sum(), 1)
        if (many > 0).sum() < 6 or effective < 4:
            assert np.isnan([float(own[each]) for each in ("class_low", "class_high", "class_p")]).all()
            continue
        mean, part = sums.sum() / many.sum(), many / many.sum()
        error = np.sqrt(((((sums.sum() - sums) / (many.sum() - many)) - mean) ** 2).sum() * (1 - 1 / units))
        assert float(own["of_class"]) == pytest.approx(mean, abs=UNIT)
        reach = student.ppf(0.975, effective - 1) * error
        assert [float(own[f"class_{end}"]) for end in ("low", "high")] == pytest.approx(
            [mean - reach, mean + reach], abs=1e-6
        )
        whole_sum = flips @ sums / many.sum()
        apart = (flips * sums / many.sum() - part * whole_sum[:, None]) ** 2 / (1 - part)
        statistics[name] = abs(whole_sum) / np.sqrt(apart.sum(1))
    p = np.array([[(each >= one * (1 - 1e-9)).mean() for one in each] for each in statistics.values()])
    exact = (p.min(0) <= p[:, :1] + 1e-12).mean(1)
    here = found["class_p"].sel(token_class=list(statistics)).values
    assert len(statistics) > 2
    assert (abs(here - exact) < 4 * np.sqrt(exact * (1 - exact) / 4000) + 2e-3).all()
    assert (exact > p[:, 0]).all()
    assert np.isnan(float(found["of_class"].sel(token_class="han")))


def test_a_capture_has_no_effect_beside_itself_and_few_documents_no_p() -> None:
    one = predicting(make_capture(documents=9, chunked=False), 1)
    same = effect(one, one, replicates=99)
    assert (float(same["effect"]), float(same["p"])) == (0.0, 1.0)
    few = predicting(make_capture(documents=4, chunked=False), 1)
    found = effect(few, predicting(few, 2))
    assert "a sign-flip test needs at least 6" in found.attrs["untested"]
    assert np.isnan([float(found[name]) for name in ("low", "high", "p")]).all()
    assert np.isfinite(float(found["effect"]))


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_places_that_lose_most_are_those_of_a_loop_in_any_order(rows: int) -> None:
    whole = make_capture(documents=9, chunked=False)
    one, other = predicting(whole, 1), predicting(whole, 2, 0.3)
    found = effect(one.chunk({"doc": rows}), other.chunk({"doc": rows}), replicates=9, places=6)
    lost = np.rint((other["logprob"].values.astype(float) - one["logprob"].values)[:, :-1] / UNIT)
    lost[np.isin(one["token"].values[:, 1:], one.attrs["special_token_ids"]) | ~np.isfinite(lost)] = 0
    worst = sorted((float(values.min()), row, int(values.argmin()) + 1) for row, values in enumerate(lost))[:6]
    columns = [found[name].values.tolist() for name in ("of_place", "row", "position")]
    assert list(zip(*columns, strict=True)) == [(value * UNIT, row, position) for value, row, position in worst]
    assert worst[-1][0] < 0
    better = effect(one, one.assign(logprob=one["logprob"] + 0.5), replicates=9)
    assert (better.sizes["place"], float(better["effect"])) == (0, pytest.approx(0.5, abs=UNIT))


@pytest.mark.parametrize(("number", "lengths", "shape"), [(9, "equal", "normal"), (40, "unequal", "long tails")])
def test_intervals_hold_no_effect_and_p_rejects_it_as_often_as_they_say(number: int, lengths: str, shape: str) -> None:
    """tests/benchmarks/effects.py does the same with more simulations, and for shapes for which this is not quite
    true."""
    random = np.random.default_rng(5)
    found = [effect_of(documents(random, number, lengths, shape, 3), replicates=99) for _ in range(40)]
    tested = [each for each in found if not each.attrs["untested"]]
    sure = 3 * np.sqrt(0.05 * 0.95 / len(tested))
    assert len(tested) > 30
    assert np.mean([float(each["low"]) <= 0 <= float(each["high"]) for each in tested]) > 0.95 - sure
    assert np.mean([float(each["p"]) <= 0.05 for each in tested]) < 0.05 + sure
    assert np.mean([bool((each["class_p"] <= 0.05).any()) for each in tested]) < 0.05 + sure
    p = [float(each["p"]) for each in tested]
    assert 0.3 < np.mean(p) < 0.7


def test_effects_of_data_sets_are_those_of_each_pair_and_differ_as_their_means_do() -> None:
    pairs = {}
    for at, (name, shift) in enumerate({"prose": 0.8, "code": 0.0}.items()):
        whole = make_capture(seed=at, documents=24, chunked=False)
        pairs[name] = predicting(whole, 10 + at), predicting(whole, 20 + at, shift)
    found = effect_by_data_set(pairs, classes=["word-initial"], replicates=99)
    for name, pair in pairs.items():
        alone, own = effect(*pair, classes=["word-initial"], replicates=99), found.sel(data_set=name)
        for variable in ("effect", "low", "high", "p"):
            assert float(own[variable]) == float(alone[variable])
        assert float(own["class_p"][0]) == float(alone["class_p"][0])
        assert int(own["predicted"]) == alone.attrs["n"] == found.attrs["n"][name]
    prose, code = (found.sel(data_set=name) for name in pairs)
    assert float(prose["difference"]) == pytest.approx(float(prose["effect"] - code["effect"]))
    assert float(prose["difference_high"]) < 0 < float(code["difference_low"])
    assert float(prose["difference_p"]) < 0.05
    few = {name: tuple(each.isel(doc=slice(3)) for each in pair) for name, pair in pairs.items()}
    untested = effect_by_data_set({"one": few["prose"]})
    assert "difference" not in untested
    assert "a sign-flip test needs at least 6" in untested.attrs["untested"]["one"]
    with pytest.raises(ValueError, match="no pair of captures"):
        effect_by_data_set({})
    silent = pairs["code"][1].drop_vars("logprob")
    with pytest.raises(ValueError, match=r"^code: .*logprob"):
        effect_by_data_set({**few, "code": (silent, silent)})


def test_other_tokens_and_captures_without_predictions_are_refused() -> None:
    one = predicting(make_capture(documents=9, chunked=False), 1)
    token = one["token"].compute().copy()
    row = int(np.flatnonzero(one["length"].values > 3)[0])
    token[row, 2] = 39 - token[row, 2]
    with pytest.raises(ValueError, match="the captures hold different texts: at position 2"):
        effect(one, one.assign(token=token.chunk({"doc": 4})))
    with pytest.raises(ValueError, match="needs logprob"):
        effect(one.drop_vars("logprob"), one)
    with pytest.raises(ValueError, match="needs other_logprob"):
        effect(one, one.drop_vars("logprob"))
