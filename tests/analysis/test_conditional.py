"""Conditional mutual information compared with sums over its definition, its nulls with all shuffles, and
simulations."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import bursty, make_capture

from analysis.metrics.conditional import domain_information, position_information, token_information
from analysis.metrics.excess import token_excess_of
from analysis.metrics.sample import SampledRoutes
from analysis.scanning import scan
from analysis.statistics.conditional import conditional_information

some = settings(max_examples=20, deadline=None)


def routes(experts: object) -> xr.DataArray:
    """Experts of tokens at one layer, (token, k)."""
    values = np.asarray(experts, np.uint8)[:, None]
    return xr.DataArray(values, {"layer": [4]}, ("token", "layer", "k"))


def bits(experts: list[list[int]], x: list[int], given: list[int]) -> float:
    """Σ P(e, x, g) log2(P(e, x, g) P(g) / (P(e, g) P(x, g))), by which experts are chosen."""
    seen = [(e, a, g) for chosen, a, g in zip(experts, x, given, strict=True) for e in chosen]
    n, cell = len(seen), Counter(seen)
    of_eg, of_xg = Counter((e, g) for e, _, g in seen), Counter((a, g) for _, a, g in seen)
    of_g = Counter(g for _, _, g in seen)
    return sum(c / n * math.log2(c * of_g[g] / of_eg[e, g] / of_xg[a, g]) for (e, a, g), c in cell.items())


tokens = st.lists(
    st.tuples(st.permutations(range(4)), st.sampled_from([3, 8, 9]), st.sampled_from([-1, 5])), min_size=1, max_size=30
)


@some
@given(tokens, st.integers(1, 3))
def test_information_is_the_sum_over_its_definition(told: list[tuple[list[int], int, int]], k: int) -> None:
    experts, x, known = [list(e[:k]) for e, _, _ in told], [a for _, a, _ in told], [g for *_, g in told]
    found = conditional_information(routes(experts), x, known, draws=2)
    assert float(found["mutual_information"].sel(layer=4)) == pytest.approx(bits(experts, x, known), abs=1e-9)


def test_nothing_and_everything_are_told() -> None:
    x, known, other = (each.ravel() for each in np.meshgrid(range(2), range(4), range(3), indexing="ij"))
    nothing = conditional_information(routes(4 * other[:, None] + known[:, None]), x, known, draws=20)
    assert abs(nothing["mutual_information"].item()) < 1e-12, "the expert depends on what is known, and on neither"
    whole = conditional_information(routes(2 * known[:, None] + x[:, None]), x, known, draws=20)
    assert whole["mutual_information"].item() == pytest.approx(1), "one bit: which of two"
    assert 0 < whole["null"].item() < whole["null_high"].item() <= 1


STRATA = {
    "given": ({}, lambda order: True),
    "within": ({"within": [0, 0, 0, 1, 1, 1]}, lambda order: set(order[:3]) == {0, 1, 2}),
    "unit": ({"unit": [0, 0, 1, 2, 2, 3]}, None),
}


@pytest.mark.parametrize("kind", STRATA)
def test_the_null_is_the_mean_over_all_shuffles(kind: str) -> None:
    more, allowed = STRATA[kind]
    experts = [[0], [0], [1], [2], [1], [1]]
    x, known = ([5, 5, 6, 6, 6, 7], [1, 1, 2, 2, 1, 1]) if kind == "unit" else ([5, 6, 7, 5, 5, 7], [1] * 6)
    if allowed:
        shuffles = [[x[at] for at in order] for order in permutations(range(6)) if allowed(order)]
    else:
        shuffles = [[four[u] for u in more["unit"]] for four in permutations([5, 6, 6, 7])]
    values = [bits(experts, each, known) for each in shuffles]
    found = conditional_information(routes(experts), x, known, draws=3000, **more)
    assert found["null"].item() == pytest.approx(np.mean(values), abs=5 * np.std(values) / math.sqrt(3000) + 1e-12)
    assert found["corrected"].item() == pytest.approx(bits(experts, x, known) - found["null"].item())


def test_senseless_shuffles_are_refused() -> None:
    experts = routes([[0], [1]])
    with pytest.raises(ValueError, match="draws=0: must be at least 1"):
        conditional_information(experts, [0, 1], [0, 0], draws=0)
    with pytest.raises(ValueError, match="at most one of `within` and `unit`"):
        conditional_information(experts, [0, 1], [0, 0], within=[0, 0], unit=[0, 1])
    with pytest.raises(ValueError, match="x differs within a unit"):
        conditional_information(experts, [0, 1], [0, 0], unit=[0, 0])
    one, other = make_capture(), make_capture(pieces=[f"other{n}" for n in range(40)])
    with pytest.raises(
        ValueError, match="one and other have different token ids: both must be made with one tokenizer"
    ):
        domain_information({"one": one, "other": other})


def test_of_words_of_a_document_only_those_with_experts_tell_something() -> None:
    shape = {"documents": 40, "sequence_length": 32, "layers": (2, 7)}
    alone, own = (token_information(bursty(by, **shape), draws=40) for by in ("document", "token"))
    assert bool((alone["mutual_information"] > 0.05).all()), "by maximum likelihood they seem to"
    assert bool((alone["corrected"] < 1.5 * (alone["null_high"] - alone["null"])).all())
    assert bool((abs(alone["corrected"]) < 0.02).all())
    assert bool((own["corrected"] > 0.3).all())
    assert bool((own["mutual_information"] > own["null_high"]).all())


def test_data_sets_of_other_words_tell_nothing_and_those_of_other_routes_do() -> None:
    shape = {"documents": 30, "sequence_length": 32, "layers": (2, 7), "burst": 0.2}
    one, alike, unlike = (bursty("token", seed=seed, world=world, **shape) for seed, world in ((1, 0), (2, 0), (3, 1)))
    for capture, words in ((one, np.arange(20)), (alike, np.arange(10, 30))):  # half of the words are in both
        capture["length"].values[:] = np.where(np.isin(capture["token"][:, 0], words), capture["length"], 0)
    same, other = (domain_information({"a": one, "b": each}, draws=40) for each in (alike, unlike))
    assert bool((same["corrected"] < 1.5 * (same["null_high"] - same["null"])).all())
    assert bool((abs(same["corrected"]) < 0.03).all())
    assert bool((other["corrected"] > 0.2).all())
    assert bool((other["mutual_information"] > other["null_high"]).all())
    alone = domain_information({"a": bursty("document", seed=1, **shape), "b": bursty("document", seed=2, **shape)})
    assert bool((abs(alone["corrected"]) < 0.05).all()), "documents that differ are not data sets that do"


def test_positions_with_other_words_tell_nothing_and_those_of_other_routes_do() -> None:
    capture = bursty("token", documents=60, sequence_length=32, layers=(2, 7), burst=0.5)
    n = capture["length"].values
    for row in range(len(n)):  # words in order: those of low numbers stand first
        order = np.argsort(capture["token"].values[row, : n[row]], kind="stable")
        for name in ("token", "expert"):
            capture[name].values[row, : n[row]] = capture[name].values[row, : n[row]][order]
    by_words = position_information(capture, bins=4, draws=40)
    assert bool((abs(by_words["corrected"]) < 0.02).all())
    planted = capture.copy(deep=True)
    early = (np.arange(32) < 8)[None, :] & (np.arange(32) < n[:, None])
    mixed = np.random.default_rng(0).random(early.shape) < 0.5
    token = np.random.default_rng(1).integers(0, 40, early.shape)
    planted["token"].values[:] = np.where(planted["token"] >= 0, token, -1)
    planted["expert"].values[early & mixed, 1] = [6, 7]  # at one layer, of half the tokens of a row's beginning
    found = position_information(planted, bins=4, draws=40)
    assert float(found["corrected"].sel(layer=7)) > 0.05
    assert float(found["mutual_information"].sel(layer=7)) > float(found["null_high"].sel(layer=7))
    assert abs(float(found["corrected"].sel(layer=2))) < 0.02
    lengths = bursty("document", documents=60, sequence_length=32, burst=5.0)
    assert bool((abs(position_information(lengths, bins=4)["corrected"]) < 0.02).all()), "nor do lengths of documents"


def test_a_token_s_excess_is_what_a_loop_over_documents_finds() -> None:
    capture = bursty("token", documents=12, layers=(2, 7))
    [sample] = scan(capture, [SampledRoutes()])
    found = token_excess_of(sample, min_count=3)
    document, token = sample["document_id"].values.tolist(), sample["token_id"].values.tolist()
    occurrences = Counter(token)
    assert found["token_id"].values.tolist() == sorted(x for x, n in occurrences.items() if n >= 3)
    assert found["piece"].values.tolist() == [f"▁w{x}" for x in found["token_id"].values]
    tokens_of, both = Counter(document), Counter(zip(token, document, strict=True))
    for layer in range(2):
        chosen = sample["expert"].values[:, layer].tolist()
        of_document = Counter((d, e) for d, pair in zip(document, chosen, strict=True) for e in pair)
        cells = Counter((x, e) for x, pair in zip(token, chosen, strict=True) for e in pair)
        for x in found["token_id"].values.tolist():
            n = occurrences[x]
            for e in range(8):
                cell = found.isel(layer=layer).sel(token_id=x, expert=e)
                mean = sum(both[x, d] * of_document[d, e] / tokens_of[d] for d in tokens_of)
                assert (int(cell["counts"]), int(cell["tokens"])) == (cells[x, e], n)
                assert float(cell["expected"]) == pytest.approx(mean)
                share, least = mean / n, cells[x, e]
                tail = sum(math.comb(n, i) * share**i * (1 - share) ** (n - i) for i in range(least, n + 1))
                assert float(cell["p"]) == pytest.approx(tail if least >= mean + 1 else 1.0, abs=1e-12)


def test_an_excess_is_no_less_likely_than_its_p_says() -> None:
    random, p = np.random.default_rng(0), []
    document, expert = np.repeat([0, 1, 2], [30, 200, 70]), np.zeros(300, np.uint8)
    for d, share in enumerate((0.9, 0.1, 0.4)):
        expert[document == d] = random.random((document == d).sum()) < share
    for _ in range(400):
        token = np.where(random.random(300) < np.array([0.8, 0.1, 0.3])[document], 1, 2)
        sample = xr.Dataset(
            {
                "expert": (("token", "layer", "k"), expert[:, None, None]),
                "document_id": ("token", document),
                "token_id": ("token", token),
            },
            coords={"layer": [0], "piece": ("token", token.astype(str))},
            attrs={"n": 300, "of": 300, "documents": 3, "experts": 2},
        )
        p.append(token_excess_of(sample)["p"].sel(token_id=1, expert=1).item())
    assert 0 < np.mean(np.array(p) <= 0.2) <= 0.2
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_senseless_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="min_count=0: must be at least 1"):
        token_excess_of(scan(make_capture(), [SampledRoutes()])[0], min_count=0)
