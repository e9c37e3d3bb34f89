"""Data sets contrasted: only the planted difference is found, chance where there is only chance, known values."""

import math

import numpy as np
import pytest
import xarray as xr
from drawn_documents import Documents, counted, lengths
from synthetic import make_capture

from analysis.metrics.contrast import contrast, contrast_of
from analysis.metrics.load import expert_load


def documents_of(capture: xr.Dataset, keep: np.ndarray) -> xr.Dataset:
    """A part of a capture's documents."""
    return capture.isel(doc=np.isin(capture["document_id"].values, keep)).chunk({"doc": 4})


@pytest.fixture(scope="module")
def whole() -> xr.Dataset:
    return make_capture(seed=3, documents=240, sequence_length=32, layers=(0, 4, 9), chunked=False)


def test_a_split_of_one_data_set_is_no_more_than_chance(whole: xr.Dataset) -> None:
    random = np.random.default_rng(0)
    found = []
    for _ in range(8):
        order = random.permutation(240)
        found.append(contrast({"a": documents_of(whole, order[:120]), "b": documents_of(whole, order[120:])}))
    p = np.concatenate([one["p"].values for one in found])
    assert 0.2 < p.mean() < 0.8
    assert (p <= 0.05).mean() < 0.2
    assert np.mean([float(one["difference_p"].min()) > 0.05 for one in found]) > 0.7
    chance = np.concatenate([(one["divergence"] / one["divergence_by_chance"]).values for one in found])
    assert 0.4 < chance.mean() < 1.8


@pytest.mark.parametrize(
    ("kinds", "spreads", "numbers"),
    [
        (("20", "1000"), (None, None), (12, 100)),  # shuffled labels rejected 100 of 100
        (("200", "200"), (5, 100), (12, 60)),  # 87 of 100
        (("200 ± 1", "200 ± 1"), (40, 40), (20, 20)),
        (("200", "200"), (40, 40), (5, 50)),
    ],
)
def test_equal_data_sets_are_told_apart_five_times_of_a_hundred(
    kinds: tuple[str, str], spreads: tuple[float | None, float | None], numbers: tuple[int, int]
) -> None:
    """A small form of the table "rejections" of tests/benchmarks/inference.py; layers are simulations."""
    random = np.random.default_rng(7)
    p = []
    for _ in range(24):
        sides = [
            Documents(random, lengths(random, kind, number), spread, experts=8)
            for kind, number, spread in zip(kinds, numbers, spreads, strict=True)
        ]
        counts = {name: counted(side.counts(9), side.tokens) for name, side in zip("ab", sides, strict=True)}
        p += contrast_of(counts, replicates=199)["p"].dropna("layer").values.tolist()
    assert len(p) > 200
    assert 0.05 - 3 * np.sqrt(0.05 * 0.95 / len(p)) < np.mean(np.array(p) <= 0.05) < 0.07 + 2 * 0.013


def test_no_expert_is_one_data_sets_own_where_another_avoids_it() -> None:
    """a and b are even, and c avoids expert 0: it is not the specialist of a or b."""
    random, named, all_held = np.random.default_rng(1), 0, 0
    for _ in range(40):
        sides = [Documents(random, lengths(random, "200", 30), 40, experts=8) for _ in "ab"]
        avoids = Documents(random, lengths(random, "200", 30), 40, experts=8, planted=-8.0 * 0.1)
        counts = {n: counted(s.counts(2), s.tokens) for n, s in zip("abc", [*sides, avoids], strict=True)}
        found = contrast_of(counts, replicates=199)
        apart = found["pairwise_low"].where(found["data_set"] != found["other_data_set"])
        named += bool((apart.min("other_data_set").sel(data_set=["a", "b"], expert=0) > 0).any())
        share = xr.DataArray([side.reach for side in [*sides, avoids]], dims=("data_set", "expert"))
        true = share - share.rename(data_set="other_data_set")
        held = (found["pairwise_low"] <= true + 1e-12) & (true - 1e-12 <= found["pairwise_high"])
        all_held += bool(held.all())
        assert bool((apart.sel(data_set="a", other_data_set="c", expert=0) > 0).all())
    assert named <= 4
    assert all_held >= 34


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
    assert float(cell["difference_p"]) == pytest.approx(1 / 200)
    assert int(abs(found["difference"].sel(data_set="b")).argmax(...)["layer"]) == 1
    assert float(found["difference_p"].sel(layer=[0, 9]).min()) > 0.05
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
                pair = found["pairwise_difference"].isel(data_set=number, layer=index, expert=e)
                assert pair.values.tolist() == pytest.approx([2 * (value - other[e]) for other in rows])
        apart = sum(abs(a - b) for a, b in zip(rows[0], rows[1], strict=True)) / 2
        assert float(found["total_variation"].sel(data_set="x", other_data_set="y")[index]) == pytest.approx(apart)
    again = contrast(parts, replicates=19, threads=1)
    xr.testing.assert_identical(found, again)


def test_a_data_set_against_its_copy_has_an_interval(whole: xr.Dataset) -> None:
    found = contrast({"a": whole.chunk({"doc": 4}), "b": whole.chunk({"doc": 4})})
    assert bool((found["difference"] == 0).all())
    assert bool((found["difference_high"] - found["difference_low"] > 0.01).all())
    assert bool((found["p"] == 1).all())


def test_what_is_not_of_one_model_is_refused(whole: xr.Dataset) -> None:
    with pytest.raises(ValueError, match="1 captures: a contrast needs at least two"):
        contrast({"a": whole})
    with pytest.raises(ValueError, match="a and b are from different models"):
        contrast({"a": whole, "b": make_capture(layers=(0, 4))})


def test_a_data_set_with_nothing_captured_has_no_divergence_and_no_p(whole: xr.Dataset) -> None:
    nothing = whole.assign(length=whole["length"] * 0)
    found = contrast({"a": whole, "b": nothing}, replicates=9)
    assert found.attrs["untested"] == {"b": "it has no counted token"}
    for name in ("divergence", "divergence_low", "p", "difference_p", "difference_low", "total_variation"):
        cells = found[name] if "data_set" not in found[name].dims else found[name].sel(data_set="b")
        assert bool(cells.isnull().all()), name


def test_data_sets_of_one_document_are_not_tested_and_say_why(whole: xr.Dataset) -> None:
    alone = {name: documents_of(whole, np.array([number])) for number, name in enumerate("cdefghi", 3)}
    found = contrast(alone)
    assert set(found.attrs["untested"].values()) == {
        "it is one document, which cannot be tested unless block_tokens divides it into blocks"
    }
    assert bool(found["p"].isnull().all()) and bool(found["difference_low"].isnull().all())  # noqa: PT018
    assert bool(found["difference"].notnull().all())
    mixed = contrast(
        {"one": alone["c"], "a": documents_of(whole, np.arange(40)), "b": documents_of(whole, np.arange(40, 80))}
    )
    assert list(mixed.attrs["untested"]) == ["one"]
    both = contrast({"a": documents_of(whole, np.arange(40)), "b": documents_of(whole, np.arange(40, 80))})
    for name in ("p", "difference_low", "difference_p", "pairwise_high"):
        kept = mixed[name]
        for dim in set(kept.dims) & {"data_set", "other_data_set"}:
            kept = kept.sel({dim: ["a", "b"]})
        np.testing.assert_array_equal(kept, both[name], err_msg=name)
