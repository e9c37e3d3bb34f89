"""Entropy, association, balance and position compared with plain Python and known values."""

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import captures, make_capture

from analysis.metrics.choices import transitions
from analysis.metrics.load import balance_of, domain_specialization, expert_load
from analysis.metrics.position import position_load
from analysis.statistics.information import association, entropy

some = settings(max_examples=20, deadline=None)


def bits(values: Iterable[int]) -> tuple[float, float]:
    """Entropy of counts, plain and corrected."""
    kept = [value for value in values if value]
    n = sum(kept)
    plain = -sum(value / n * math.log2(value / n) for value in kept)
    return plain, plain + (len(kept) - 1) / (2 * n * math.log(2))


@some
@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=5))
def test_association_equals_sums_over_the_table(rows: list[list[int]]) -> None:
    counts = xr.DataArray([rows, [[0] * 3] * len(rows)], dims=("layer", "a", "b"))
    found = association(counts, "a", "b", draws=5)
    missing = [name for name in found if name not in ("n", "drawn")]
    assert all(bool(np.isnan(found[name][1])) for name in missing), "nothing was observed"
    n = sum(map(sum, rows))
    if not n:
        return
    columns, flat = list(zip(*rows, strict=True)), [value for row in rows for value in row]
    parts = [bits(map(sum, rows)), bits(map(sum, columns)), bits(flat)]
    plain, corrected = (parts[0][index] + parts[1][index] - parts[2][index] for index in range(2))
    assert float(found["mutual_information"][0]) == pytest.approx(plain, abs=1e-12)
    by_chance = float(found["null_information"][0])
    assert float(found["corrected"][0]) == pytest.approx(plain - by_chance, abs=1e-12)
    if not found["drawn"][0]:
        assert by_chance == pytest.approx(plain - corrected, abs=1e-12)
    assert float(entropy(counts, ("a", "b"))["corrected"][0]) == pytest.approx(parts[2][1])
    seen = [[i for i, row in enumerate(rows) if sum(row)], [j for j, column in enumerate(columns) if sum(column)]]
    chi = sum(
        (rows[i][j] - sum(rows[i]) * sum(columns[j]) / n) ** 2 / (sum(rows[i]) * sum(columns[j]) / n)
        for i in seen[0]
        for j in seen[1]
    )
    smaller = min(map(len, seen)) - 1
    if smaller:
        assert float(found["cramers_v"][0]) == pytest.approx(math.sqrt(chi / n / smaller), abs=1e-9)
    else:
        assert np.isnan(found["cramers_v"][0])
    assert float(found["best_guess"][0]) == pytest.approx(sum(map(max, rows)) / n)
    assert float(found["best_guess_alone"][0]) == pytest.approx(max(map(sum, columns)) / n)


def independent(random: np.random.Generator, cells: int, n: int, times: int) -> xr.DataArray:
    """Tables (run, a, b) of two independent variables."""
    pairs = random.integers(0, cells, (times, n)) * cells + random.integers(0, cells, (times, n))
    tables = [np.bincount(own, minlength=cells**2).reshape(cells, cells) for own in pairs]
    return xr.DataArray(np.stack(tables), dims=("run", "a", "b"))


@pytest.mark.parametrize(("n", "drawn"), [(400, True), (4000, False)])
def test_the_null_of_independent_things_is_what_they_have(n: int, drawn: bool) -> None:
    found = association(independent(np.random.default_rng(0), 8, n, 150), "a", "b")
    assert set(found["drawn"].values.tolist()) == {drawn}
    assert float(found["mutual_information"].mean()) == pytest.approx(49 / (2 * n * math.log(2)), rel=0.1), "all bias"
    for name, null in (("mutual_information", "null_information"), ("cramers_v", "null_cramers_v")):
        error = float(found[name].std()) / math.sqrt(150)
        assert abs(float((found[name] - found[null]).mean())) < 4 * error
        beyond = float((found[name] > found[f"{null}_high"]).mean())
        assert abs(beyond - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 150), name


def test_the_null_of_few_observations_in_many_cells_is_drawn() -> None:
    """The Miller–Madow correction leaves more than half a bit here."""
    found = association(independent(np.random.default_rng(0), 64, 3000, 4), "a", "b", draws=30)
    assert bool((found["mutual_information"] > 1).all())
    assert bool((abs(found["corrected"]) < 0.04).all())
    assert bool((found["cramers_v"] < found["null_cramers_v_high"] * 1.03).all())
    routes = make_capture(documents=160, sequence_length=16, num_experts=64, strength=0, layers=range(4))
    assert 2500 < routes.sizes["doc"] * 16 < 6000
    for by, bias in (("first", 1.0), ("all", (62 / 63) ** 2)):
        moves = association(transitions(routes, by=by)["counts"], "expert", "next_expert", bias=bias, draws=30)
        assert bool(moves["drawn"].all())
        assert bool((abs(moves["corrected"]) < 0.04).all()), by


def test_the_drawn_null_is_the_mean_over_all_tables_with_the_same_sums() -> None:
    counts = xr.DataArray([[3, 1], [1, 4]], dims=("a", "b"))
    ways = {first: math.comb(4, first) * math.comb(5, 4 - first) for first in range(5)}  # of 9 with sums 4, 5 and 4, 5
    values = {}
    for first in ways:
        flat, n = [first, 4 - first, 4 - first, 1 + first], 9
        expected = [4 * 4 / n, 4 * 5 / n, 5 * 4 / n, 5 * 5 / n]
        chi = sum((c - e) ** 2 / e for c, e in zip(flat, expected, strict=True))
        values[first] = (sum(c / n * math.log2(c / e) for c, e in zip(flat, expected, strict=True) if c), chi)
    total = sum(ways.values())
    found = association(counts, "a", "b", draws=4000)
    information = sum(ways[first] * values[first][0] for first in ways) / total
    cramers_v = sum(ways[first] * math.sqrt(values[first][1] / 9) for first in ways) / total
    assert float(found["null_information"]) == pytest.approx(information, rel=0.05)
    assert float(found["null_cramers_v"]) == pytest.approx(cramers_v, rel=0.05)
    halved = association(counts, "a", "b", bias=0.5, draws=4000)
    assert float(halved["null_information"]) == pytest.approx(float(found["null_information"]) / 2)
    with pytest.raises(ValueError, match="draws=0: must be at least 1"):
        association(counts, "a", "b", draws=0)


def test_association_knows_all_and_nothing() -> None:
    same = association(xr.DataArray(np.eye(8, dtype=int) * 1000, dims=("a", "b")), "a", "b")
    assert [float(same[name]) for name in ("mutual_information", "cramers_v", "best_guess")] == [3, 1, 1]
    none = association(xr.DataArray(np.full((8, 8), 1000), dims=("a", "b")), "a", "b")
    assert [float(none[name]) for name in ("mutual_information", "cramers_v", "best_guess")] == [0, 0, 1 / 8]


@some
@given(captures())
def test_balance_and_specialization_are_those_of_the_shares(capture: xr.Dataset) -> None:
    load = expert_load(capture)
    balance, special = balance_of(load), domain_specialization(load)
    experts, k = capture.attrs["num_experts"], capture.sizes["k"]
    for layer in range(capture.sizes["layer"]):
        count = [int(c) for c in load["counts"][layer].sum("k")]
        if not sum(count):
            assert all(bool(np.isnan(balance[name][layer])) for name in balance)
            continue
        share = [c / sum(count) for c in count]
        mean, plain = 1 / experts, bits(count)[0]
        ordered = sorted(share)
        wanted = {
            "max_violation": max(share) / mean - 1,
            "variation": math.sqrt(sum((s - mean) ** 2 for s in share) / experts) / mean,
            "entropy": plain,
            "relative_entropy": plain / math.log2(experts),
            "effective_experts": 2**plain,
            "gini": sum(abs(a - b) for a in share for b in share) / (2 * experts),
            "jain": 1 / (experts * sum(s * s for s in share)),
            "balancedness": mean / max(share),
        }
        assert ordered
        for name, value in wanted.items():
            assert float(balance[name][layer]) == pytest.approx(value, abs=1e-12), name
        n = load.attrs["n"]
        np.testing.assert_allclose(special["any_choice"][layer], [c / n for c in count])
        np.testing.assert_allclose(special["first_choice"][layer], load["counts"][layer, 0] / n)
    assert special["any_choice"].attrs["null"] == k / experts


def test_an_even_load_has_the_nulls() -> None:
    load = xr.Dataset({"share": (("layer", "expert"), np.full((2, 8), 1 / 8))}, attrs={"n": 8})
    found = balance_of(load.assign_coords(expert=np.arange(8)))
    for name in found:
        np.testing.assert_allclose(found[name], found[name].attrs["null"], atol=1e-12)
    assert float(found["entropy"][0]) == 3


@some
@given(captures(), st.integers(1, 10))
def test_load_by_position_equals_a_loop(capture: xr.Dataset, bins: int) -> None:
    data, positions = capture.compute(), capture.sizes["position"]
    fill, width = np.iinfo(data["expert"].dtype).max, -(-positions // bins)
    wanted: Counter[tuple[int, int, int]] = Counter()
    for row in range(data.sizes["doc"]):
        for p in range(int(data["length"][row])):
            routes = data["expert"].values[row, p]
            if routes[0, 0] != fill and int(data["token"][row, p]) not in capture.attrs["special_token_ids"]:
                wanted.update((p // width, layer, int(e)) for layer, chosen in enumerate(routes) for e in chosen)
    found = position_load(capture, bins=bins)
    got = found["counts"].transpose("start", "layer", "expert").values
    assert {tuple(map(int, place)): int(got[tuple(place)]) for place in np.argwhere(got)} == dict(wanted)
    assert found["start"].values.tolist() == list(range(0, positions, width))
    assert found.attrs["n"] == sum(wanted.values()) // (capture.sizes["k"] * capture.sizes["layer"])


def test_uniform_routes_tell_nothing_of_position_or_the_next_layer() -> None:
    capture = make_capture(documents=400, sequence_length=64, rows_per_shard=64, strength=0, chunked=False)
    found = position_load(capture, bins=8)
    n = found.attrs["n"]
    degrees = 7 * 7
    spread = 5 * math.sqrt(2 * degrees) / (2 * n * math.log(2))  # of chi² / (2 n ln 2)
    assert float(abs(found["mutual_information"]).max()) < spread
    assert bool((found["by_chance_high"] > 0).all())
    assert float(found["by_chance_high"].max()) < spread
    moves = association(transitions(capture)["counts"], "expert", "next_expert")
    assert float(abs(moves["corrected"]).max()) < spread
    learned = make_capture(documents=400, sequence_length=64, rows_per_shard=64, strength=2, chunked=False)
    assert float(association(transitions(learned)["counts"], "expert", "next_expert")["corrected"].min()) > 10 * spread


def test_bins_of_no_length_are_refused() -> None:
    with pytest.raises(ValueError, match="bins=0"):
        position_load(make_capture(), bins=0)
