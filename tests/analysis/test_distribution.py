"""The distribution over all experts: compared with scipy and a loop, and its bounds with the possible values."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from scipy.stats import entropy
from synthetic import make_capture
from test_jackknife import left_out_one

from analysis import router_distribution, scan, scores_of
from analysis.metrics.distribution import RouterDistribution
from analysis.metrics.scores import entropies, probabilities

LOGIT = ("logit",)


def counted(capture: xr.Dataset) -> np.ndarray:
    fill = np.iinfo(capture["expert"].dtype).max
    chosen = capture["expert"].values[:, :, 0, 0] != fill
    return chosen & ~np.isin(capture["token"].values, capture.attrs["special_token_ids"])


def by_hand(capture: xr.Dataset) -> dict[str, np.ndarray]:
    """Entropy, effective experts, mass and margin of each token that counts: (token, layer)."""
    own = counted(capture)
    logit, expert = capture["logit"].values[own].astype(float), capture["expert"].values[own].astype(int)
    if capture.attrs["router_transformation"] == "sigmoid":
        p = expit(logit) / expit(logit).sum(-1, keepdims=True)
    else:
        p = softmax(logit, axis=-1)
    bits = entropy(p, base=2, axis=-1)
    chosen = np.zeros(logit.shape, bool)
    np.put_along_axis(chosen, expert, True, -1)
    margin = np.where(chosen, logit, np.inf).min(-1) - np.where(chosen, -np.inf, logit).max(-1)
    return {"entropy": bits, "effective_experts": 2**bits, "mass": (p * chosen).sum(-1), "margin": margin}


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from([(8, 2), (5, 3), (20, 1)]), st.sampled_from(["softmax", "sigmoid"]),
    st.none() | st.integers(1, 9),
)  # fmt: skip
def test_means_equal_those_of_scipy(seed: int, shape: tuple[int, int], scores: str, chunk: int | None) -> None:
    capture = make_capture(
        seed=seed, documents=6, num_experts=shape[0], experts_per_token=shape[1], record=LOGIT, scores=scores,
        missing=(1,), chunked=False,
    )  # fmt: skip
    wanted = by_hand(capture)
    found = router_distribution(capture if chunk is None else capture.chunk({"doc": chunk}))
    assert found.attrs["n"] == len(wanted["mass"])
    for name, values in wanted.items():
        if len(values):
            np.testing.assert_allclose(found[f"mean_{name}"], values.mean(0), atol=2e-6)
    assert found["mean_entropy"].attrs["null"] == np.log2(shape[0])
    assert found["mean_mass"].attrs["null"] == shape[1] / shape[0]


def test_a_router_that_likes_all_experts_the_same_gives_the_null() -> None:
    capture = make_capture(record=LOGIT, chunked=False)
    even = capture.assign(logit=xr.zeros_like(capture["logit"]).where(capture["logit"].notnull()))
    found = router_distribution(even)
    for name in ("mean_entropy", "mean_effective_experts", "mean_mass", "mean_margin"):
        np.testing.assert_allclose(found[name], found[name].attrs["null"], atol=1e-6)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("recorded", "choices"), [(4, 2), (2, 2), (3, 1)])
def test_of_the_largest_logits_the_bounds_hold_the_truth_and_are_tight(
    recorded: int, choices: int, scores: str
) -> None:
    shape = {"num_experts": 9, "experts_per_token": choices, "scores": scores, "chunked": False}
    whole = make_capture(record=LOGIT, **shape)
    some = make_capture(record=("logit", "logit_expert"), top_logits=recorded, **shape)
    truth, found = router_distribution(whole), router_distribution(some)
    for name in ("mean_entropy", "mean_effective_experts", "mean_mass"):
        assert name not in found
        low, high = found[f"{name}_at_least"], found[f"{name}_at_most"]
        assert bool(((low <= truth[name] + 1e-6) & (truth[name] <= high + 1e-6)).all())
        assert bool((low < high).all())
    if recorded > choices:
        xr.testing.assert_allclose(found["mean_margin"], truth["mean_margin"])
        assert found["margin_tokens"].values.tolist() == [found.attrs["n"]] * 3
    else:
        assert found["margin_tokens"].values.tolist() == [0] * 3
        assert bool(found["mean_margin"].isnull().all())
    # Tight: filling the unknown logits with very small ones and with copies of the smallest one gives the bounds.
    values, ids = some["logit"].values, some["logit_expert"].values
    for end, entropy_end, mass_end in ((-500.0, "at_least", "at_most"), (0.0, "at_most", "at_least")):
        filled = np.where(np.isnan(whole["logit"].values), np.nan, values[..., -1:] + end)
        at = np.where(ids == 255, 0, ids).astype(int)
        np.put_along_axis(filled, at, np.where(ids == 255, np.nan, values), -1)
        made = router_distribution(whole.assign(logit=(whole["logit"].dims, filled)))
        np.testing.assert_allclose(found[f"mean_entropy_{entropy_end}"], made["mean_entropy"], atol=1e-5)
        np.testing.assert_allclose(found[f"mean_mass_{mass_end}"], made["mean_mass"], atol=1e-5)


def test_experts_that_a_bias_chose_have_a_margin_below_0_and_bounds_where_their_logits_are_not_known() -> None:
    whole = make_capture(record=LOGIT, chunked=False)
    logit = whole["logit"].values.copy()
    chosen = whole["expert"].values[..., -1:].astype(int) % 8
    np.put_along_axis(logit, chosen, logit.min(-1, keepdims=True) - 1, -1)  # the second choice has the smallest logit
    biased = whole.assign(logit=(whole["logit"].dims, logit))
    found = router_distribution(biased)
    np.testing.assert_allclose(found["mean_margin"], by_hand(biased)["margin"].mean(0), atol=2e-6)
    assert bool((found["mean_margin"] < 0).all())
    order = np.argsort(-logit, axis=-1)[..., :4]
    ids = np.where(np.isnan(logit[..., :1]), 255, order).astype(np.uint8)
    dims = (*whole["logit"].dims[:-1], "candidate")
    some = biased.drop_vars("logit").assign(
        logit=(dims, np.take_along_axis(logit, order, -1)), logit_expert=(dims, ids)
    )
    bounds = router_distribution(some)
    assert bounds["margin_tokens"].values.tolist() == [0] * 3
    assert bool((bounds["mean_mass_at_least"] <= found["mean_mass"]).all())
    assert bool((bounds["mean_mass_at_most"] >= found["mean_mass"]).all())


def test_the_interval_is_that_of_the_documents_left_out() -> None:
    capture = make_capture(documents=12, record=LOGIT, chunked=False)
    found = router_distribution(capture)
    replicates = [float(router_distribution(part)["mean_entropy"][1]) for part in left_out_one(capture)]
    error = np.sqrt(((np.array(replicates) - float(found["mean_entropy"][1])) ** 2).sum() * (1 - 1 / len(replicates)))
    half = float(found["mean_entropy_high"][1] - found["mean_entropy_low"][1]) / 2
    assert 2 < half / error < 3  # Student's t of about ten documents


def test_what_is_not_known_or_damaged_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"needs logit, .* synthetic does not have; .*--record logits makes it"):
        router_distribution(make_capture())
    odd = make_capture(record=LOGIT, scores="unknown")
    with pytest.raises(ValueError, match=r"router_transformation='unknown': .* for softmax, renormalized, sigmoid"):
        router_distribution(odd)
    for scores in ("softmax", "sigmoid"):
        for value in (np.nan, np.inf, -np.inf):
            damaged = make_capture(record=LOGIT, scores=scores, chunked=False)
            damaged["logit"].values[0, 0, 1, 3] = value
            with pytest.raises(ValueError, match="a logit is not a finite number"):
                router_distribution(damaged)
    with pytest.raises(ValueError, match=r"RouterDistribution needs logit, .*--record logits makes it"):
        scan(make_capture(), [RouterDistribution(scores_of(damaged))])


def test_a_token_s_own_distribution_and_entropy_are_those_of_scipy() -> None:
    for scores in ("softmax", "sigmoid"):
        capture = make_capture(record=LOGIT, scores=scores, chunked=False)
        logit = capture["logit"].values[counted(capture)]
        p = probabilities(logit, scores_of(capture))
        np.testing.assert_allclose(p.sum(-1), 1)
        wanted = by_hand(capture)["entropy"]
        np.testing.assert_allclose(entropy(p, base=2, axis=-1), wanted)
        np.testing.assert_allclose(entropies(logit.astype(float), 8, scores == "sigmoid"), wanted)
