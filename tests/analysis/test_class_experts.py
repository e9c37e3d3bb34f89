"""Experts of token classes: compared with counts one by one and with each document left out, and with nothing known."""

import re

import numpy as np
import pytest
import xarray as xr
from scipy.stats import binom
from scipy.stats import t as student
from synthetic import make_capture

from analysis import ClassCounts, SampledRoutes, class_excess_of, class_experts, members_of, strongest_experts_of
from analysis.metrics.class_experts import lift_of_class
from analysis.scanning import scan
from analysis.statistics.jackknife import Jackknife

PIECES = ["7", "▁12", "<s>", "▁the", "The", "of", "HTTP", "▁+", "(", "<0x0A>", "def", "▁return"]
IN = {
    "digits": r" ?\d+",
    "capitalized": "[A-Z][a-z]+",
    "keywords": "def| return",
    "/^ [a-z]/": " [a-z].*",
    "han": "a^",
}
CAPTURE = make_capture(documents=9, vocabulary=12, special_token_ids=(2,), pieces=PIECES)


def plainly(capture: xr.Dataset) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Tokens that each expert gets, [document, layer, expert], by class and, as "", for all; and the number of tokens,
    last."""
    shape = (capture.sizes["document"], capture.sizes["layer"], capture.attrs["num_experts"] + 1)
    found = {which: np.zeros(shape, int) for which in (*IN, "")}
    for row in range(capture.sizes["doc"]):
        for at in range(int(capture["length"][row])):
            if (token := int(capture["token"][row, at])) not in capture.attrs["special_token_ids"]:
                text = PIECES[token].replace("▁", " ")
                for which in [which for which in IN if re.fullmatch(IN[which], text)] + [""]:
                    own = found[which][int(capture["document_id"][row])]
                    own[:, -1] += 1
                    for layer, chosen in enumerate(capture["expert"].values[row, at]):
                        own[layer, chosen] += 1
    return {which: each[..., :-1] for which, each in found.items()}, np.stack([e[:, 0, -1] for e in found.values()])


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_counts_shares_and_lifts_are_those_of_a_loop(rows: int) -> None:
    found = class_experts(CAPTURE.chunk({"doc": rows}), list(IN))
    counts, tokens = plainly(CAPTURE.compute())
    of_all = counts[""].sum(0) / tokens[-1].sum()
    assert found.attrs["n"] == tokens[-1].sum()
    for at, which in enumerate(IN):
        own = found.sel(token_class=which)
        count, n = counts[which].sum(0), int(tokens[at].sum())
        assert int(own["tokens"]) == n
        np.testing.assert_array_equal(own["counts"], count)
        share = count / n if n else np.full(count.shape, np.nan)
        np.testing.assert_allclose(own["share"], share)
        np.testing.assert_allclose(own["lift"], share / of_all)
    assert int(found["tokens"].sel(token_class="digits")) > 20
    assert int(found["tokens"].sel(token_class="han")) == 0


def test_an_interval_is_that_of_documents_left_out_one_by_one() -> None:
    found = class_experts(CAPTURE, ["capitalized", "digits"], level=0.9).sel(token_class="digits")
    counts, tokens = plainly(CAPTURE.compute())
    here = tokens[-1] > 0
    count, n, every, total = counts["digits"][here], tokens[0][here], counts[""][here], tokens[-1][here]
    effective = n.sum() ** 2 / (n**2).sum()
    assert float(found["effective_documents"]) == pytest.approx(effective)
    left = np.arange(here.sum())
    shares = np.array([count[left != d].sum(0) / n[left != d].sum() for d in left])
    lifts = np.array([share / (every[left != d].sum(0) / total[left != d].sum()) for d, share in enumerate(shares)])
    share = count.sum(0) / n.sum()
    lift = share / (every.sum(0) / total.sum())
    quantile, units = student.ppf(0.95, effective - 1), len(left)

    def reach(values: np.ndarray, own: np.ndarray) -> np.ndarray:
        return quantile * np.sqrt(((values - own) ** 2).sum(0) * (units - 1) / units)

    inside = (lifts > 0).all(0)
    assert inside.sum() > 12
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.exp(np.log(lift) + np.array([-1, 1])[:, None, None] * reach(np.log(lifts), np.log(lift)))
        odds = np.log(share / (1 - share)) + np.array([-1, 1])[:, None, None] * reach(shares, share) / share / (
            1 - share
        )
    for side, end in enumerate(("low", "high")):
        np.testing.assert_allclose(found[f"lift_{end}"].values[inside], ends[side][inside])
        np.testing.assert_allclose(found[f"share_{end}"].values[inside], 1 / (1 + np.exp(-odds[side][inside])))
    assert np.isnan(found["lift_low"].values[~inside]).all()


def test_a_class_in_few_documents_has_no_interval_and_a_lift_all_the_same() -> None:
    few = make_capture(documents=3, vocabulary=12, special_token_ids=(2,), pieces=PIECES)
    found = class_experts(few, ["digits", "han"])
    assert np.isfinite(found["lift"].sel(token_class="digits")).any()
    assert np.isnan(found[["share_low", "lift_low", "lift_high"]].to_array()).all()
    assert np.isnan(found["lift"].sel(token_class="han")).all()


def test_the_strongest_expert_has_the_highest_lift_of_those_with_enough_tokens() -> None:
    members = {which: members_of(which, PIECES) for which in IN}
    counted = scan(CAPTURE, [Jackknife(ClassCounts(members))])[0]
    whole, found = class_experts(CAPTURE, list(IN)), strongest_experts_of(counted, min_count=8)
    chosen = set()
    for which in IN:
        for layer in whole["layer"].values.tolist():
            own, one = (each.sel(token_class=which, layer=layer) for each in (whole, found))
            enough = np.flatnonzero(own["counts"].values >= 8)
            best = max(enough, key=lambda expert: float(own["lift"][expert]), default=-1)
            chosen.add(int(best))
            assert int(one["strongest"]) == best
            if best >= 0:
                for name in ("counts", "share", "lift", "lift_low", "share_high"):
                    assert float(one[name]) == pytest.approx(float(own[name][best]), nan_ok=True)
            else:
                assert (int(one["counts"]), np.isnan(float(one["lift"]))) == (0, True)
    assert len(chosen - {-1}) > 2
    assert -1 in chosen
    with pytest.raises(ValueError, match="min_count=0: must be at least 1"):
        strongest_experts_of(counted, min_count=0)


def test_the_excess_of_a_class_is_that_of_its_tokens_as_one() -> None:
    routes = scan(CAPTURE, [SampledRoutes()])[0]
    found = class_excess_of(routes, {which: members_of(which, PIECES) for which in IN}, min_count=5)
    assert found["token_class"].values.tolist() == [which for which in IN if which != "han"]
    counts, tokens = plainly(CAPTURE.compute())
    here = tokens[-1] > 0
    expected = (tokens[0][here, None, None] * counts[""][here] / tokens[-1][here, None, None]).sum(0)
    own = found.sel(token_class="digits")
    np.testing.assert_allclose(own["expected"], expected)
    np.testing.assert_array_equal(own["counts"], counts["digits"].sum(0))
    tail = binom.sf(counts["digits"].sum(0) - 1, tokens[0].sum(), expected / tokens[0].sum())
    far = counts["digits"].sum(0) >= expected + 1
    np.testing.assert_allclose(own["p"].values[far], tail[far], rtol=1e-9)
    assert (own["p"].values < 1e-3).any()
    with pytest.raises(ValueError, match="no token class"):
        class_excess_of(routes, {})


def test_the_class_of_all_tokens_has_a_lift_of_one_and_a_class_is_needed() -> None:
    whole = scan(CAPTURE, [Jackknife(ClassCounts({"all": np.ones(12, bool)}))])[0]
    assert float(lift_of_class(whole).min()) == float(lift_of_class(whole).max()) == 1.0
    with pytest.raises(ValueError, match="no token class to count"):
        ClassCounts({})
    with pytest.raises(ValueError, match="unknown token class 'numbers'"):
        class_experts(CAPTURE, ["numbers"])
