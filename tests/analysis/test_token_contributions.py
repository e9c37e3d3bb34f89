"""The tokens that cause a difference, compared with loops and planted causes; the origin of documents, compared with a
loop and chance."""

import math
from collections import Counter

import numpy as np
import pytest
import xarray as xr
from synthetic import make_capture
from test_contrast import documents_of
from test_scan import routed_tokens

from analysis.metrics.document_scores import PRIOR, document_scores
from analysis.metrics.token_contributions import token_contributions
from analysis.metrics.tokens import TokenCounts
from analysis.scanning import Selection, scan
from analysis.statistics import parts as parts_of


@pytest.fixture(scope="module")
def whole() -> xr.Dataset:
    return make_capture(seed=3, documents=240, sequence_length=32, layers=(0, 4, 9), chunked=False)


def test_contributions_equal_a_loop_and_add_up(whole: xr.Dataset) -> None:
    one, other = documents_of(whole, np.arange(5)), documents_of(whole, np.arange(5, 60))
    found = token_contributions(one, other, top=1000)
    sides = []
    for capture in (one, other):
        tokens, sent = Counter(), Counter()
        for x, expert, _ in routed_tokens(capture):
            tokens[x] += 1
            sent.update((layer, x, int(e)) for layer in range(3) for e in expert[layer])
        sides.append((tokens, sent, sum(tokens.values())))
    (n1, s1, t1), (n2, s2, t2) = sides
    assert set(n2) - set(n1), "a token that one side lacks is the interesting case"
    for layer in range(3):
        for e in range(8):
            cell = found.isel(layer=layer, expert=e)
            by_token = {
                int(x): (float(c), float(u), float(r))
                for x, c, u, r in zip(
                    *(cell[name].values for name in ("token_id", "contribution", "token_usage", "token_routing")),
                    strict=True,
                )
                if x >= 0
            }
            total = [0.0, 0.0, 0.0]
            for x in set(n1) | set(n2):
                p1, p2 = n1[x] / t1, n2[x] / t2
                r1 = s1[layer, x, e] / n1[x] if n1[x] else s2[layer, x, e] / n2[x]
                r2 = s2[layer, x, e] / n2[x] if n2[x] else r1
                wanted = (p1 * r1 - p2 * r2, (p1 - p2) * (r1 + r2) / 2, (p1 + p2) / 2 * (r1 - r2))
                if abs(wanted[0]) > 1e-15:
                    assert by_token[x] == pytest.approx(wanted, abs=1e-12)
                total = [a + b for a, b in zip(total, wanted, strict=True)]
            sums = [float(cell[name]) for name in ("difference", "usage", "routing")]
            assert sums == pytest.approx(total, abs=1e-12)
            sizes = [abs(c) for c, *_ in by_token.values()]
            assert sizes == sorted(sizes, reverse=True)


def test_a_token_that_goes_elsewhere_is_routing_and_one_that_is_frequent_is_usage(whole: xr.Dataset) -> None:
    one = whole.chunk({"doc": 4})
    expert, token = whole["expert"].values.copy(), whole["token"].values
    sent = (token == 7)[..., None] & (expert[:, :, 1] != 255) & (expert[:, :, 1] != 6).all(-1, keepdims=True)
    expert[:, :, 1] = np.where(sent & (np.arange(2) == 1), 6, expert[:, :, 1])
    rerouted = token_contributions(whole.assign(expert=(whole["expert"].dims, expert)), one, [4], top=3)
    cell = rerouted.sel(layer=4, expert=6)
    assert int(cell["token_id"][0]) == 7
    assert float(cell["routing"]) == pytest.approx(float(cell["difference"]))
    assert float(cell["difference"]) > 0.01
    assert float(abs(cell["usage"])) < 1e-12
    assert cell["piece"].values.tolist() == ["▁w7", "", ""]
    frequent = Selection(tokens=tuple(x for x in range(40) if x not in (1, 9)))
    assert scan(one, [TokenCounts()], only=frequent)[0].attrs["n"] > 0
    rarer = whole.assign(token=(whole["token"].dims, np.where(token == 9, 1, token)))  # 1 is special: not counted
    used = token_contributions(rarer, one)
    assert float(abs(used["routing"]).max()) < 1e-12
    assert int(used["token_id"].sel(expert=0, place=1)[0]) in range(40)


def test_documents_are_scored_by_the_other_half(whole: xr.Dataset) -> None:
    order = np.random.default_rng(1).permutation(240)
    parts = {"a": documents_of(whole, order[:100]), "b": documents_of(whole, order[100:])}
    found = document_scores(parts)
    counts, halves = {}, {}
    for number, (name, part) in enumerate(parts.items()):
        ids = np.unique(part["document_id"].values)
        first = parts_of.halves(np.arange(240), seed=number + 1)[0]
        halves[name] = first
        for half in (0, 1):
            count = np.full((3, 8), PRIOR)
            only = Selection(documents=tuple(d for d in ids.tolist() if first[d] == half))
            table = scan(part, [TokenCounts()], only=only)[0]["counts"].sum("token_id")
            counts[name, half] = count + table.transpose("layer", "expert").values
    for name, part in parts.items():
        mine = found.isel(document=found["data_set"].values == name)
        for number in (0, len(mine["document"]) // 2):
            document = int(mine["document_id"][number])
            own = part.isel(doc=part["document_id"].values == document)
            routes = [expert for _, expert, _ in routed_tokens(own)]
            assert int(mine["tokens"][number]) == len(routes)
            for candidate in parts:
                count = counts[candidate, 1 - halves[name][document]]
                share = count / count.sum(1, keepdims=True)
                score = sum(math.log2(share[layer, e]) for route in routes for layer in range(3) for e in route[layer])
                wanted = score / len(routes)
                assert float(mine["score"].sel(candidate=candidate)[number]) == pytest.approx(wanted, abs=1e-5)
    again = document_scores({name: part.chunk({"doc": 9}) for name, part in parts.items()}, threads=1)
    xr.testing.assert_identical(found, again)


def test_documents_of_one_data_set_are_told_apart_no_better_than_chance(whole: xr.Dataset) -> None:
    found = []
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(240)
        parts = {"a": documents_of(whole, order[:120]), "b": documents_of(whole, order[120:])}
        found.append(document_scores(parts))
    assert abs(np.mean([one["auc"].values for one in found]) - 0.5) < 0.05
    assert abs(np.mean([one["right"].values for one in found]) - 0.5) < 0.06


def test_documents_of_other_data_sets_are_told_apart(whole: xr.Dataset) -> None:
    other = make_capture(seed=8, documents=90, sequence_length=32, layers=(0, 4, 9))
    third = make_capture(seed=9, documents=90, sequence_length=32, layers=(0, 4, 9))
    found = document_scores({"a": documents_of(whole, np.arange(90)), "b": other, "c": third})
    assert bool((found["right"] > 0.8).all())
    assert bool((found["auc"] > 0.9).all())
    assert set(found["likeliest"].values.tolist()) == {"a", "b", "c"}


def test_what_is_not_of_one_model_or_tokenizer_is_refused(whole: xr.Dataset) -> None:
    other = make_capture(layers=(0, 4, 9), pieces=[f"▁{number}" for number in range(40)])
    with pytest.raises(ValueError, match="different tokenizers: their pieces differ"):
        token_contributions(whole, other)
    with pytest.raises(ValueError, match="one and other are from different models"):
        token_contributions(whole, make_capture(layers=(0, 4)))
    with pytest.raises(ValueError, match="1 captures: a contrast needs at least two"):
        document_scores({"a": whole})


def test_nothing_captured_is_refused(whole: xr.Dataset) -> None:
    nothing = whole.assign(length=whole["length"] * 0)
    with pytest.raises(ValueError, match="the other capture has no counted token"):
        token_contributions(whole, nothing)
    with pytest.raises(ValueError, match="b has too few documents: one of its halves is empty"):
        document_scores({"a": whole, "b": documents_of(whole, np.array([3]))})
