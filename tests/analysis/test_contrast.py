"""Data sets contrasted: the planted difference and no other, chance where there is only chance, known values."""

import math

import numpy as np
import pytest
import xarray as xr
from synthetic import make_capture

from analysis.metrics.contrast import contrast
from analysis.metrics.load import expert_load


def documents_of(capture: xr.Dataset, keep: np.ndarray) -> xr.Dataset:
    """A part of a capture's documents."""
    return capture.isel(doc=np.isin(capture["document_id"].values, keep)).chunk({"doc": 4})


@pytest.fixture(scope="module")
def whole() -> xr.Dataset:
    return make_capture(seed=3, documents=240, sequence_length=32, layers=(0, 4, 9), chunked=False)


def test_a_split_of_one_data_set_is_no_more_than_chance_and_p_is_uniform(whole: xr.Dataset) -> None:
    random = np.random.default_rng(0)
    found = []
    for _ in range(8):
        order = random.permutation(240)
        halves = {"a": documents_of(whole, order[:120]), "b": documents_of(whole, order[120:])}
        found.append(contrast(halves, replicates=99))
    p = np.concatenate([one["p"].values for one in found])
    assert 0.2 < p.mean() < 0.8
    assert (p <= 0.05).mean() < 0.2
    assert np.mean([float(one["difference_q"].min()) > 0.05 for one in found]) > 0.7
    chance = np.concatenate([(one["divergence"] / one["divergence_by_chance"]).values for one in found])
    assert 0.4 < chance.mean() < 1.8


def test_a_planted_difference_is_found_where_it_is_and_nowhere_else(whole: xr.Dataset) -> None:
    order = np.random.default_rng(5).permutation(240)
    one, other = documents_of(whole, order[:120]), documents_of(whole, order[120:]).compute()
    expert = other["expert"].values.copy()
    fill, moved = 255, np.random.default_rng(2).random(expert.shape[:2]) < 0.3
    pair = expert[:, :, 1]  # layer 4: a third of the tokens that have not expert 6 get it as the second choice
    lacks = moved & (pair != 6).all(-1) & (pair[..., 0] != fill)
    pair[lacks, 1] = 6
    changed = other.assign(expert=(other["expert"].dims, expert)).chunk({"doc": 4})
    found = contrast({"a": one, "b": changed}, replicates=199)
    assert found["p"].sel(layer=4) == pytest.approx(1 / 200)
    assert float(found["p"].sel(layer=[0, 9]).min()) > 0.02
    cell = found.sel(data_set="b", layer=4, expert=6)
    assert float(cell["difference_low"]) > 0.1
    assert float(cell["difference_q"]) < 0.05
    assert int(abs(found["difference"].sel(data_set="b")).argmax(...)["layer"]) == 1
    elsewhere = found["difference_q"].sel(layer=[0, 9])
    assert float(elsewhere.min()) > 0.05
    assert bool((found["divergence_low"] <= found["divergence_corrected"]).all())
    assert bool((found["divergence_corrected"] <= found["divergence_high"]).all())
    assert float(found["divergence_low"].sel(layer=4)) > 10 * float(found["divergence_high"].sel(layer=[0, 9]).max())


def test_values_are_those_of_the_shares(whole: xr.Dataset) -> None:
    parts = {name: documents_of(whole, np.arange(240)[start::3]) for start, name in enumerate("xyz")}
    found = contrast(parts, replicates=19)
    shares = {name: expert_load(part)["share"] for name, part in parts.items()}
    for index in range(3):
        rows = [[float(s) for s in share[index]] for share in shares.values()]
        mean = [sum(column) / 3 for column in zip(*rows, strict=True)]

        def bits(values: list[float]) -> float:
            return -sum(v * math.log2(v) for v in values if v)

        assert float(found["divergence"][index]) == pytest.approx(bits(mean) - sum(map(bits, rows)) / 3)
        for number, row in enumerate(rows):
            others = [other for other in rows if other is not row]
            for e, value in enumerate(row):
                wanted = 2 * (value - sum(other[e] for other in others) / 2)
                assert float(found["difference"][number, index, e]) == pytest.approx(wanted)
        apart = sum(abs(a - b) for a, b in zip(rows[0], rows[1], strict=True)) / 2
        assert float(found["total_variation"].sel(data_set="x", other_data_set="y")[index]) == pytest.approx(apart)
    again = contrast(parts, replicates=19, threads=1)
    xr.testing.assert_identical(found, again)


def test_what_is_not_of_one_model_is_refused(whole: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="1 captures: a contrast needs two or more"):
        contrast({"a": whole})
    with pytest.raises(ValueError, match="a and b are not of one model"):
        contrast({"a": whole, "b": make_capture(layers=(0, 4))})


def test_a_data_set_with_nothing_captured_has_no_divergence_and_no_p(whole: xr.Dataset) -> None:
    nothing = whole.assign(length=whole["length"] * 0)
    found = contrast({"a": whole, "b": nothing}, replicates=9)
    for name in ("divergence", "divergence_low", "p", "difference_p", "difference_q", "total_variation"):
        cells = found[name] if "data_set" not in found[name].dims else found[name].sel(data_set="b")
        assert bool(cells.isnull().all()), name
