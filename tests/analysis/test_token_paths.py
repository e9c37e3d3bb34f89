"""The paths of some tokens compared with loops over every token, and the choice of interesting tokens."""

from collections import Counter
from itertools import pairwise
from math import lgamma, log

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from synthetic import captures, make_capture
from test_scan import few, routed_tokens

from analysis.charts.paths import SURE_BITS, Way, circle_rows, evidence, link_rows, path_chart
from analysis.metrics.load import expert_load
from analysis.metrics.token_paths import TokenPaths, frequent_ids, telling
from analysis.scanning import accumulate, merge, scan, shards_to_read


def counted(capture: xr.Dataset, tokens: set[int]) -> tuple[Counter, Counter, Counter]:  # type: ignore[type-arg]
    """Occurrences, first choices and transitions of tokens, one token at a time."""
    occurrences, first, followed = Counter(), Counter(), Counter()  # type: ignore[var-annotated]
    for token, expert, _ in routed_tokens(capture):
        if token in tokens:
            chosen = [int(e) for e in expert[:, 0]]
            occurrences[token] += 1
            first.update((token, layer, e) for layer, e in enumerate(chosen))
            followed.update((token, layer, *pair) for layer, pair in enumerate(pairwise(chosen)))
    return occurrences, first, followed


def as_counter(values: xr.DataArray) -> dict[tuple[int, ...], int]:
    """The nonzero entries, with token ids instead of the first index."""
    ids = values["token_id"].values
    return {
        (int(ids[place[0]]), *map(int, place[1:])): int(values.values[tuple(place)])
        for place in np.argwhere(values.values)
    }


@few
@given(captures(), st.sets(st.integers(0, 11), min_size=1))
def test_paths_of_tokens_equal_a_loop_over_tokens(capture: xr.Dataset, tokens: set[int]) -> None:
    occurrences, first, followed = counted(capture, tokens)
    found = scan(capture, [TokenPaths(sorted(tokens, reverse=True))])[0]
    assert found["token_id"].values.tolist() == sorted(tokens, reverse=True)
    assert {int(t): int(n) for t, n in zip(found["token_id"], found["tokens"], strict=True) if n} == dict(occurrences)
    assert as_counter(found["first"].transpose("token_id", "layer", "expert")) == dict(first)
    assert as_counter(found["followed"].transpose("token_id", "lower_layer", "expert", "next_expert")) == dict(followed)
    assert found.attrs["n"] == sum(occurrences.values())
    assert found["piece"].values.tolist() == [f"▁w{token}" for token in sorted(tokens, reverse=True)]


def test_counts_that_32_bits_do_not_hold_get_64() -> None:
    capture = make_capture(documents=30, rows_per_shard=2)
    reducer = TokenPaths([0, 3])
    shards = shards_to_read(capture)
    halves = [accumulate(capture, [reducer], shards[start::2])[0] for start in range(2)]
    assert halves[0]["followed"].dtype == np.uint32
    full = 2**32 - 5
    for half in halves:
        half["tokens"][0] = half["first"][0, 0, 0] = full
    # A shard that comes after a number of tokens:
    rows = capture.isel(doc=slice(0, 2)).compute()
    block = {name: rows[name].values for name in ("expert", "token")} | {"counted": rows["token"].values >= 0}
    state = {name: array.copy() for name, array in halves[0].items()}
    reducer.update(state, block)
    chosen = (rows["expert"].values[:, :, 0, 0] == 0) & (rows["token"].values == 0)
    assert state["first"].dtype == np.int64
    assert state["first"][0, 0, 0] == full + chosen.sum()
    # Two machines:
    [merged] = merge([reducer], [halves[0]], [halves[1]])
    assert merged["first"][0, 0, 0] == merged["tokens"][0] == 2 * full


def test_frequent_tokens_are_found_without_a_route_and_special_ones_left_out() -> None:
    capture = make_capture(documents=40, chunked=False)
    token = capture["token"].values
    times = Counter(token[token >= 0].tolist())
    del times[1]  # special
    hidden = capture.drop_vars(["expert", "weight"]).assign(expert=capture["expert"] * 0)
    hidden = hidden.chunk({"doc": capture.sizes["doc"]})  # one shard
    found = frequent_ids(hidden, 12)
    assert found == sorted(times, key=lambda t: (-times[t], t))[:12]
    assert len(frequent_ids(hidden, 1000)) == len(times)
    assert frequent_ids(hidden.assign(captured=("doc", np.zeros(capture.sizes["doc"], bool))), 5) == []


def test_frequent_tokens_of_a_large_capture_are_looked_for_in_a_few_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = make_capture(documents=60, rows_per_shard=2)
    loads: list[int] = []
    load = xr.Variable.load
    monkeypatch.setattr(xr.Variable, "load", lambda self, **given: loads.append(len(self)) or load(self, **given))
    frequent_ids(capture, 5)
    assert loads == [2] * 4


def test_half_of_the_tokens_told_are_the_most_frequent_and_half_go_furthest_from_the_others() -> None:
    capture = make_capture(documents=300, vocabulary=30, special_token_ids=())
    ids = frequent_ids(capture, 20)
    paths, load = scan(capture, [TokenPaths(ids)])[0], expert_load(capture)
    told = telling(paths, load, 8, min_count=20)
    occurrences, first, _ = counted(capture, set(ids))
    n, layers = sum(1 for _ in routed_tokens(capture)), capture.sizes["layer"]
    all_first: Counter = Counter()  # type: ignore[type-arg]
    for _, expert, _ in routed_tokens(capture):
        all_first.update(enumerate(int(e) for e in expert[:, 0]))

    def cells(token: int) -> dict[tuple[int, int], float]:
        own = {(layer, e): c / occurrences[token] for (t, layer, e), c in first.items() if t == token}
        return {place: share * np.log2(share / (all_first[place] / n)) for place, share in own.items()}

    apart = {t: sum(cells(t).values()) / layers - 7 / (2 * np.log(2) * occurrences[t]) for t in ids}
    frequent = sorted(ids, key=lambda t: -occurrences[t])
    special = sorted(frequent[4:], key=lambda t: -apart[t])[:4]
    wanted = sorted([*frequent[:4], *special], key=lambda t: -occurrences[t])
    assert told["token_id"].values.tolist() == wanted
    for index, token in enumerate(wanted):
        assert float(told["apart"][index]) == pytest.approx(apart[token])
        most = max(cells(token), key=cells(token).__getitem__)
        assert (int(told["telling_layer"][index]), int(told["telling_expert"][index])) == most
    assert telling(paths, load, 8, min_count=10**6).sizes["token_id"] == 0


def test_a_token_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="repeated"):
        TokenPaths([3, 3])


def tail_bits(n: int, x: int, experts: int) -> float:
    """-log2 P(X >= x) of a binomial with chance 1 / experts, from its terms."""
    terms = [
        lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) - i * log(experts) + (n - i) * log(1 - 1 / experts)
        for i in range(x, n + 1)
    ]
    return -float(np.logaddexp.reduce(terms)) / log(2)


@pytest.mark.parametrize("experts", [2, 8, 128])
def test_evidence_never_claims_more_than_the_exact_tail_allows(experts: int) -> None:
    for n in (1, 5, 40, 700):
        for x in sorted({0, 1, n // experts, n // experts + 1, n // 2, n}):
            if x > n:
                continue
            count = np.zeros(experts, np.int64)
            count[0], count[1] = x, n - x
            bits = float(evidence(count)[0])
            exact = tail_bits(n, x, experts)
            assert bits <= exact + 1e-6
            assert bits == 0 if x <= n / experts else bits > exact - 8  # and not much less


def way_of(capture: xr.Dataset) -> Way:
    moves = scan(capture, [TokenPaths([0])])[0].isel(token_id=0)
    return Way(counted="“x”", n=int(moves["tokens"]), first=moves["first"], followed=moves["followed"], whole=False)


def test_links_of_even_choices_are_hardly_ever_drawn_and_planted_ones_always() -> None:
    even = [way_of(make_capture(seed=seed, documents=300, strength=0, layers=range(8))) for seed in range(3)]
    assert sum(len(link_rows(way, 1000)[0]) for way in even) <= 4  # of 3 * 7 * 64 cells, at most one in 1,024
    capture = make_capture(seed=1, documents=300, strength=0, layers=(0, 5, 9))
    routes = capture["expert"].compute().copy()
    is_token = capture["token"].values == 0
    routes.values[is_token, 1] = [6, 2]
    routes.values[is_token, 2] = [3, 2]
    way = way_of(capture.assign(expert=routes.chunk(capture["expert"].chunksizes)))
    rows, sure = link_rows(way, 1000)
    assert sure == len(rows)
    assert [rows[-1][key] for key in ("layer", "expert", "next_layer", "next_expert")] == [5, 6, 9, 3]
    assert (rows[-1]["share"], rows[-1]["times_chance"], rows[-1]["tokens"]) == (100, 8, way.n)
    assert link_rows(way, 1)[0] == rows[-1:]
    circles = circle_rows(way, rows)
    assert {(row["layer"], row["expert"]) for row in circles} >= {(5, 6), (9, 3)}
    assert {row["first"] for row in circles if row["layer"] == 5} == {100}


def test_a_picture_names_the_rows_of_each_way_and_draws_the_surest_links_last() -> None:
    ways = [way_of(make_capture(seed=seed, documents=200)) for seed in (1, 2)]
    drawing, told = path_chart(ways)
    links, circles = drawing.rows.values()
    assert [row["way"] for row in links] == sorted(row["way"] for row in links)
    for index, way in enumerate(ways):
        own = [row for row in links if row["way"] == index]
        count = way.followed.values
        bits = [float(evidence(count)[row["layer"], row["expert"], row["next_expert"]]) for row in own]
        assert bits == sorted(bits)
        assert bits[0] >= SURE_BITS
        assert told[index][0].startswith(f"n = {way.n:,} “x”")
        for row in own:
            times = count[row["layer"], row["expert"], row["next_expert"]]
            assert row["tokens"] == times
            assert row["share"] == pytest.approx(100 * times / count[row["layer"], row["expert"]].sum(), rel=1e-3)
        touched = {(row[f"{end}layer"], row[f"{end}expert"]) for row in own for end in ("", "next_")}
        assert touched == {(row["layer"], row["expert"]) for row in circles if row["way"] == index}
