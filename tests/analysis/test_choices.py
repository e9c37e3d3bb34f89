"""Co-activation, transitions and repetition compared with plain Python, and with published figures of the real
Mixtral."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import captures, make_capture
from test_scan import routed_tokens

from analysis import scanning
from analysis.metrics.choices import (
    Choices,
    coactivation,
    coactivation_of,
    layer_overlap_of,
    random_overlap,
    transitions,
    transitions_of,
)
from analysis.metrics.load import Load, expert_load
from analysis.metrics.repetition import Repetition, repetition
from analysis.metrics.tokens import TokenCounts
from analysis.scanning import Selection, scan

# Counts published with OLMoE (allenai/OLMoE, Apache-2.0) and table 5 of Mixtral of Experts (arXiv 2401.04088).
PUBLISHED = json.loads((Path(__file__).parents[2] / "analysis" / "metrics" / "mixtral_published.json").read_text())

some = settings(max_examples=20, deadline=None)


@some
@given(captures())
def test_choices_equal_a_loop_over_tokens(capture: xr.Dataset) -> None:
    layers, k, n = capture.sizes["layer"], capture.sizes["k"], 0
    chosen: Counter[tuple[int, ...]] = Counter()
    together: dict[str, Counter[tuple[int, ...]]] = {"all": Counter(), "adjacent": Counter(), "olmoe": Counter()}
    followed: dict[str, Counter[tuple[int, ...]]] = {"all": Counter(), "first": Counter(), "rank": Counter()}
    jaccard: list[list[float]] = [[] for _ in range(layers - 1)]
    for _, routes, _ in routed_tokens(capture):
        n += 1
        experts = [[int(e) for e in layer] for layer in routes]
        for layer, here in enumerate(experts):
            chosen.update((layer, rank, e) for rank, e in enumerate(here))
            together["all"].update((layer, a, b) for i, a in enumerate(here) for j, b in enumerate(here) if i != j)
            together["adjacent"].update((layer, a, b) for a, b in pairwise(here))
            for a, b in pairwise(here):  # like their do_correlation_analysis
                together["olmoe"].update([(layer, a, b), (layer, b, a)])
        for layer, (here, there) in enumerate(pairwise(experts)):
            followed["all"].update((layer, a, b) for a in here for b in there)
            followed["first"][layer, here[0], there[0]] += 1
            followed["rank"].update((layer, a, b) for a, b in zip(here, there, strict=True))
            jaccard[layer].append(len({*here} & {*there}) / len({*here} | {*there}))
    counts = scan(capture, [Choices()])[0]
    assert counts.attrs["n"] == n
    tables = {"chosen": chosen, **{f"together_{by}": together[by] for by in ("all", "adjacent")}}
    tables |= {f"followed_{by}": found for by, found in followed.items()}
    for name, wanted in tables.items():
        got = counts[name].values
        assert {tuple(map(int, place)): int(got[tuple(place)]) for place in np.argwhere(got)} == dict(wanted), name

    for by, found in together.items():
        table = coactivation_of(counts, by=by)  # type: ignore[arg-type]
        for (layer, a, b), times in found.items():
            last = k - 1 if by == "adjacent" else k
            of_a = sum(c for (at, r, e), c in chosen.items() if (at, e) == (layer, a) and r < last)
            assert float(table["probability"][layer, a, b]) == pytest.approx(times / of_a)
            assert int(table["counts"][layer, a, b]) == times
    for by, found in followed.items():
        table = transitions_of(counts, by=by)  # type: ignore[arg-type]
        for (layer, a, b), times in found.items():
            pairs = {place: c for place, c in found.items() if place[0] == layer}
            leaving = sum(c for (_, x, _), c in pairs.items() if x == a)
            arriving = sum(c for (_, _, y), c in pairs.items() if y == b)
            assert float(table["probability"][layer, a, b]) == pytest.approx(times / leaving)
            assert float(table["lift"][layer, a, b]) == pytest.approx(times * sum(pairs.values()) / leaving / arriving)
    if n:
        np.testing.assert_allclose(layer_overlap_of(counts)["jaccard"], [np.mean(each) for each in jaccard])
    assert layer_overlap_of(counts)["next_layer"].values.tolist() == capture["layer"].values[1:].tolist()


def test_for_two_choices_all_pairs_are_olmoe_s_and_another_convention_is_refused() -> None:
    counts = scan(make_capture(), [Choices()])[0]
    one, other = (coactivation_of(counts, by=by) for by in ("all", "olmoe"))  # type: ignore[arg-type]
    assert one["probability"].equals(other["probability"])
    assert one.attrs["null"] == other.attrs["null"]
    assert not one["counts"].equals(coactivation_of(counts, by="adjacent")["counts"])
    with pytest.raises(ValueError, match=r"by='rank': choose from 'all', 'adjacent', 'olmoe'"):
        coactivation_of(counts, by="rank")  # type: ignore[arg-type]


@some
@given(captures(), st.data())
def test_transitions_between_any_two_layers_equal_a_loop_over_tokens(capture: xr.Dataset, data: st.DataObject) -> None:
    numbers = capture["layer"].values.tolist()
    pairs = data.draw(st.lists(st.tuples(st.sampled_from(numbers), st.sampled_from(numbers)), min_size=1, max_size=3))
    followed: dict[str, Counter[tuple[int, ...]]] = {"all": Counter(), "first": Counter(), "rank": Counter()}
    n = 0
    for _, routes, _ in routed_tokens(capture):
        n += 1
        for pair, layers in enumerate(pairs):
            here, there = ([int(e) for e in routes[numbers.index(layer)]] for layer in layers)
            followed["all"].update((pair, a, b) for a in here for b in there)
            followed["first"][pair, here[0], there[0]] += 1
            followed["rank"].update((pair, a, b) for a, b in zip(here, there, strict=True))
    for by, wanted in followed.items():
        found = transitions(capture, by=by, layers=pairs)  # type: ignore[arg-type]
        assert found.attrs["n"] == n
        assert list(zip(found["layer"].values.tolist(), found["next_layer"].values.tolist(), strict=True)) == pairs
        got = found["counts"].transpose("pair", "expert", "next_expert").values
        assert {tuple(map(int, place)): int(got[tuple(place)]) for place in np.argwhere(got)} == dict(wanted)
        for (pair, a, b), times in wanted.items():
            leaving = sum(c for (at, x, _), c in wanted.items() if (at, x) == (pair, a))
            arriving = sum(c for (at, _, y), c in wanted.items() if (at, y) == (pair, b))
            every = sum(c for (at, _, _), c in wanted.items() if at == pair)
            assert float(found["probability"][pair, a, b]) == pytest.approx(times / leaving)
            assert float(found["lift"][pair, a, b]) == pytest.approx(times * every / leaving / arriving)


def test_neighbouring_layers_that_are_named_are_those_of_the_default() -> None:
    capture = make_capture(layers=(1, 3, 4), documents=30)
    for by in ("first", "all", "rank"):
        default = transitions(capture, by=by)  # type: ignore[arg-type]
        named = transitions(capture, by=by, layers=[(1, 3), (3, 4)], threads=3)  # type: ignore[arg-type]
        for name in ("counts", "probability", "lift"):
            np.testing.assert_array_equal(named[name].values, default[name].values)
        assert named["next_layer"].values.tolist() == default["next_layer"].values.tolist()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(0, 2)], r"layers \[0, 2\] were not captured; the capture has \[1, 3, 4\]"),
        ([], r"layers=\[\]: must be pairs of layers"),
        ([(1, 3, 4)], r"layers=\[\(1, 3, 4\)\]: must be pairs of layers"),
    ],
)
def test_layers_that_are_no_pairs_or_were_not_captured_are_refused(layers: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transitions(make_capture(layers=(1, 3, 4)), layers=layers)


@some
@given(captures(), st.sets(st.integers(1, 9), min_size=1, max_size=3))
def test_repetition_equals_a_loop_over_pairs_of_one_row(capture: xr.Dataset, lags: set[int]) -> None:
    data = capture.compute()
    fill, special = np.iinfo(data["expert"].dtype).max, capture.attrs["special_token_ids"]
    expert, token, length = (data[name].values for name in ("expert", "token", "length"))
    kept = [
        [p for p in range(length[row]) if expert[row, p, 0, 0] != fill and token[row, p] not in special]
        for row in range(len(length))
    ]
    found = repetition(capture, lags=sorted(lags))
    assert found.attrs["tokens"] == sum(map(len, kept))
    for index, lag in enumerate(sorted(lags)):
        pairs = [(row, p) for row, positions in enumerate(kept) for p in positions if p + lag in positions]
        assert found.attrs["pairs_by_lag"][index] == len(pairs)
        for layer in range(capture.sizes["layer"]):
            one = [expert[row, p, layer].tolist() for row, p in pairs]
            other = [expert[row, p + lag, layer].tolist() for row, p in pairs]
            both = list(zip(one, other, strict=True))
            wanted = {
                "first_repeated": [a[0] == b[0] for a, b in both],
                "any_shared": [bool({*a} & {*b}) for a, b in both],
                "same_set": [{*a} == {*b} for a, b in both],
                "jaccard": [len({*a} & {*b}) / len({*a} | {*b}) for a, b in both],
            }
            for name, values in wanted.items():
                got = float(found[name].sel(lag=lag)[layer])
                assert got == pytest.approx(np.mean(values)) if values else np.isnan(got), (name, lag, layer)


@some
@given(captures())
def test_the_joint_histogram_counts_what_is_counted_one_by_one(capture: xr.Dataset) -> None:
    reducers = [Choices(), Repetition((1, 2))]
    fast = scan(capture, reducers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scanning, "CODES", 0)
        slow = scan(capture, reducers)
    for one, other in zip(fast, slow, strict=True):
        xr.testing.assert_identical(one, other)


@some
@given(captures(), st.data())
def test_a_selection_counts_what_a_smaller_capture_holds(capture: xr.Dataset, data: st.DataObject) -> None:
    documents = data.draw(st.none() | st.sets(st.integers(0, 5), min_size=1))
    tokens = data.draw(st.none() | st.sets(st.integers(0, 11), min_size=1))
    start, stop = data.draw(st.none() | st.sampled_from([(0, 3), (2, 8), (7, 20)])) or (0, 8)
    only = Selection(
        documents=None if documents is None else tuple(documents),
        tokens=None if tokens is None else tuple(tokens),
        positions=(start, stop),
    )
    left = capture.compute()
    place = np.arange(left.sizes["position"])
    keep = np.broadcast_to((place >= start) & (place < stop), left["token"].shape).copy()
    if documents is not None:
        keep &= np.isin(left["document_id"].values, list(documents))[:, None]
    if tokens is not None:
        keep &= np.isin(left["token"].values, list(tokens))
        left = left.assign_attrs(special_token_ids=[])
    fill = np.iinfo(left["expert"].dtype).max
    left = left.assign(
        expert=left["expert"].where(xr.DataArray(keep, dims=("doc", "position")), fill).astype(left["expert"].dtype)
    )
    reducers = [Choices(), Repetition(), Load(), TokenCounts()]
    for one, other in zip(scan(capture, reducers, only=only), scan(left, reducers), strict=True):
        one.attrs.pop("pairs_lost_by_lag", None), other.attrs.pop("pairs_lost_by_lag", None)
        xr.testing.assert_identical(one, other)


def test_a_selection_reads_only_the_shards_that_it_needs() -> None:
    capture = make_capture(documents=40, rows_per_shard=2)
    document = int(capture["document_id"][9])
    shards = scanning.shards_to_read(capture, Selection(documents=(document,)))
    rows = np.flatnonzero(capture["document_id"].values == document)
    assert [(s.start, s.stop) for s in shards] == sorted({(row // 2 * 2, row // 2 * 2 + 2) for row in rows.tolist()})
    with pytest.raises(ValueError, match="token 40: the vocabulary has tokens 0 to 39"):
        scan(capture, [Choices()], only=Selection(tokens=(40,)))
    with pytest.raises(ValueError, match=r"positions \(3, 3\)"):
        Selection(positions=(3, 3))


def test_parts_of_a_scan_add_up_to_the_whole() -> None:
    capture = make_capture(documents=30, rows_per_shard=2)
    reducers = [Choices(), Repetition(), Load(), TokenCounts()]
    shards = scanning.shards_to_read(capture)
    parts = [scanning.accumulate(capture, reducers, shards[start::3]) for start in range(3)]
    merged = scanning.merge(reducers, scanning.merge(reducers, parts[2], parts[0]), parts[1])
    for reducer, state, whole in zip(reducers, merged, scan(capture, reducers), strict=True):
        xr.testing.assert_identical(reducer.finish(state, capture), whole)


def test_windows_that_cut_documents_cost_pairs_and_the_attributes_say_how_many() -> None:
    capture = make_capture(documents=20, special_token_ids=(), chunked=False)
    whole = {int(d): int(capture["length"][capture["document_id"] == d].sum()) for d in capture["document_id"]}
    for lag in (1, 3):
        found = repetition(capture, lags=[lag]).attrs
        assert found["pairs_by_lag"][0] + found["pairs_lost_by_lag"][0] == sum(max(0, n - lag) for n in whole.values())
        assert found["pairs_lost_by_lag"][0] > 0


# Captures made of published figures.


def capture_of(expert: np.ndarray, layers: list[int], positions: int = 2048, num_experts: int = 8) -> xr.Dataset:
    """A capture with these choices, (tokens, layers, k), in as many full rows as possible."""
    rows = -(-len(expert) // positions)
    padded = np.full((rows * positions, *expert.shape[1:]), 255, np.uint8)
    padded[: len(expert)] = expert
    length = np.clip(len(expert) - positions * np.arange(rows), 0, positions).astype(np.int32)
    token = np.where(np.arange(positions) < length[:, None], 0, -1).astype(np.int32)
    return xr.Dataset(
        {
            "expert": (("doc", "position", "layer", "k"), padded.reshape(rows, positions, *expert.shape[1:])),
            "weight": (("doc", "position", "layer", "k"), np.zeros((rows, positions, *expert.shape[1:]), np.float16)),
            "token": (("doc", "position"), token),
            "length": ("doc", length),
            "document_id": ("doc", np.arange(rows)),
            "piece": ("token_id", np.array(["a"], dtype=object)),
        },
        coords={"layer": layers},
        attrs={"num_experts": num_experts, "special_token_ids": [], "rows_per_shard": 16, "dataset": "published"},
    ).chunk({"doc": 16})


def chains(tables: list[np.ndarray]) -> np.ndarray:
    """Sequences through the layers, (tokens, layers), whose counts at adjacent layers are those of these tables."""
    found = np.repeat(np.argwhere(tables[0] >= 0), tables[0].ravel(), axis=0)
    for table in tables[1:]:
        order = np.argsort(found[:, -1], kind="stable")
        following = np.repeat(np.argwhere(table >= 0), table.ravel(), axis=0)
        np.testing.assert_array_equal(found[order, -1], following[:, 0], "the tables do not belong together")
        found = np.column_stack([found[order], following[:, 1]])
    return found


def apart(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The second chains in an order in which none has the expert of the first one at any layer."""
    random = np.random.default_rng(0)
    second = second[random.permutation(len(second))]
    while len(wrong := np.flatnonzero((first == second).any(1))):
        other = random.permutation(len(second))[: len(wrong)]
        alone = ~np.isin(other, wrong)
        one, other = wrong[alone], other[alone]
        fits = (first[one] != second[other]).all(1) & (first[other] != second[one]).all(1)
        one, other = one[fits], other[fits]
        second[one], second[other] = second[other], second[one].copy()
    return second


@pytest.mark.parametrize("domain", ["c4", "github"])
def test_published_counts_as_a_stream_of_routes_are_given_back_exactly(domain: str) -> None:
    steps, layers = ["0->7", "7->15"], PUBLISHED["layers"]
    top1 = [np.array(PUBLISHED["crosslayer_top1"][domain][step]) for step in steps]
    rank = [np.array(PUBLISHED["crosslayer_samerank_top2"][domain][step]) for step in steps]
    first = chains(top1)
    second = apart(first, chains([both - one for both, one in zip(rank, top1, strict=True)]))
    capture = capture_of(np.stack([first, second], axis=-1), layers)
    counts, load = scan(capture, [Choices(), Load()])
    assert counts.attrs["n"] == 208_896
    for index, step in enumerate(steps):
        np.testing.assert_array_equal(counts["followed_first"][index], top1[index], step)
        np.testing.assert_array_equal(counts["followed_rank"][index], rank[index], step)
    for layer in layers:
        top2 = np.array(PUBLISHED["expert_counts_top2"][domain][str(layer)])
        np.testing.assert_array_equal(load["counts"].sel(layer=layer).sum("k"), top2)
        one = PUBLISHED["expert_counts_top1"][domain][str(layer)]
        np.testing.assert_array_equal(load["counts"].sel(layer=layer, k=0), one)
        np.testing.assert_array_equal(load["share"].sel(layer=layer), top2 / top2.sum())
    assert int(coactivation(capture)["counts"].sum()) == 2 * 208_896 * len(layers)


def stream(a: float, b: float, c: float, tokens: int, seed: int) -> np.ndarray:
    """Pairs of eight experts, (tokens, 1, 2), by the generator of the metrics' definitions.

    With probability a the first choice is kept and the second redrawn; with b the second becomes the first and the
    second is redrawn; with c a fresh pair is drawn; otherwise one without an expert of the last pair.
    """
    random = np.random.default_rng(seed)
    fate, found, pair = random.random(tokens), np.empty((tokens, 1, 2), np.uint8), (0, 1)

    def other(*taken: int) -> int:
        left = [expert for expert in range(8) if expert not in taken]
        return left[random.integers(len(left))]

    for token in range(tokens):
        if fate[token] < a:
            pair = pair[0], other(pair[0])
        elif fate[token] < a + b:
            pair = pair[1], other(pair[1])
        elif fate[token] < a + b + c:
            one = other()
            pair = one, other(one)
        else:
            one = other(*pair)
            pair = one, other(one, *pair)
        found[token, 0] = pair
    return found


@pytest.mark.parametrize("domain", PUBLISHED["table5_generator_abcd"])
@pytest.mark.parametrize("layer", ["0", "15", "31"])
def test_a_stream_made_for_a_cell_of_mixtrals_table_5_gives_the_cell(domain: str, layer: str) -> None:
    a, b, c, _ = PUBLISHED["table5_generator_abcd"][domain][layer]
    capture = capture_of(stream(a, b, c, 100_000, seed=5), [int(layer)])
    found = repetition(capture).isel(lag=0, layer=0)
    cell = PUBLISHED["mixtral_paper_table5_percent"][domain]
    assert float(found["first_repeated"]) * 100 == pytest.approx(cell["first_choice"][layer], abs=0.4)
    assert float(found["any_shared"]) * 100 == pytest.approx(cell["first_or_second"][layer], abs=0.4)


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (8, 1), (16, 4), (64, 8), (4, 4)])
def test_uniform_routing_gives_the_exact_nulls(experts: int, k: int) -> None:
    random, tokens, layers = np.random.default_rng(1), 30_000, 3
    expert = random.random((tokens, layers, experts)).argsort(-1)[..., :k].astype(np.uint8)
    capture = capture_of(expert, [0, 1, 2], num_experts=experts)
    counts, again = scan(capture, [Choices(), Repetition((1, 5))])

    def within(found: xr.DataArray, null: float, n: float) -> None:
        error = 5 * np.sqrt(max(null * (1 - null), 1e-12) / n)
        assert float(abs(found - null).max()) < error + 1e-12, (found, null)

    null = random_overlap(k, experts)
    if (experts, k) == (8, 2):
        assert null == pytest.approx({"any_shared": 13 / 28, "same_set": 1 / 28, "jaccard": 5 / 28})
    for name, value in null.items():
        within(again[name], value, again.attrs["pairs_by_lag"][1])
        assert again[name].attrs["null"] == value
    within(again["first_repeated"], 1 / experts, again.attrs["pairs_by_lag"][1])
    within(layer_overlap_of(counts)["jaccard"], null["jaccard"], tokens)
    within(expert_load(capture)["share"], 1 / experts, tokens)
    for by in ("first", "all", "rank"):
        within(transitions_of(counts, by=by)["probability"], 1 / experts, tokens / experts * 0.8)  # type: ignore[arg-type]
    for by in ("all", "adjacent", "olmoe") if k > 1 else ():
        table = coactivation_of(counts, by=by)  # type: ignore[arg-type]
        off = ~np.eye(experts, dtype=bool)
        values = table["probability"].where(xr.DataArray(off, dims=("expert", "other_expert")), table.attrs["null"])
        within(values, table.attrs["null"], tokens / experts * 0.8)
