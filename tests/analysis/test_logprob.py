"""Log-probabilities by expert and surprise: against loops, least squares and numpy, and against what words explain."""

from collections import defaultdict

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_capture
from test_distribution import by_hand, counted

from analysis import LogProbability, logprob_by_expert, scan, surprise, surprise_and_entropy

BOTH = ("logit", "logprob")


def used(capture: xr.Dataset) -> np.ndarray:
    """Tokens that count and have a next one; bool (row, position)."""
    return counted(capture) & capture["logprob"].notnull().values


def least_squares(y: np.ndarray, reached: np.ndarray, stratum: np.ndarray) -> float:
    """The coefficient of reaching an expert beside one effect for each stratum."""
    effects = (stratum[:, None] == np.unique(stratum)).astype(float)
    return float(np.linalg.lstsq(np.column_stack([reached, effects]), y, rcond=None)[0][0])


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(8, 2), (5, 3), (20, 1)]), st.none() | st.integers(1, 9))
def test_means_equal_numpy_s_and_those_within_tokens_equal_least_squares(
    seed: int, shape: tuple[int, int], chunk: int | None
) -> None:
    capture = make_capture(
        seed=seed, documents=5, num_experts=shape[0], experts_per_token=shape[1], record=BOTH, missing=(1,),
        vocabulary=9, chunked=False,
    )  # fmt: skip
    own = used(capture)
    y, expert = capture["logprob"].values[own].astype(float), capture["expert"].values[own]
    row = np.nonzero(own)[0]
    stratum = row * 1000 + capture["token"].values[own]
    found = logprob_by_expert(capture if chunk is None else capture.chunk({"doc": chunk}))
    assert found.attrs["n"] == len(y)
    for layer in (0, 2):
        for e in range(shape[0]):
            at, cell = (expert[:, layer] == e).any(1), found.isel(layer=layer, expert=e)
            assert int(cell["tokens"]) == at.sum()
            if at.any() and not at.all():
                assert float(cell["mean_logprob"]) == pytest.approx(y[at].mean(), abs=1e-5)
                assert float(cell["difference"]) == pytest.approx(y[at].mean() - y[~at].mean(), abs=1e-5)
            mixed = [s for s in np.unique(stratum) if 0 < at[stratum == s].sum() < (stratum == s).sum()]
            assert int(cell["compared"]) == sum((stratum == s).sum() for s in mixed)
            if mixed:
                assert float(cell["within"]) == pytest.approx(least_squares(y, at, stratum), abs=1e-4)
            else:
                assert bool(cell["within"].isnull())


def planted(capture: xr.Dataset, of_token: float, of_expert: float, seed: int = 0) -> xr.Dataset:
    """Log-probabilities that depend on the token's id, and on whether the first choice at layer 1 is expert 2."""
    random = np.random.default_rng(seed)
    made = -4 + of_token * (capture["token"].values % 5) + of_expert * (capture["expert"].values[:, :, 1, 0] == 2)
    made = made + random.normal(0, 0.5, made.shape)
    there = capture["logprob"].notnull().values
    return capture.assign(logprob=(("doc", "position"), np.where(there, made, np.nan).astype(np.float32)))


def test_words_explain_a_difference_and_nothing_within_them() -> None:
    capture = make_capture(documents=40, sequence_length=64, vocabulary=15, experts_per_token=1, record=("logprob",))
    words = logprob_by_expert(planted(capture, of_token=1.0, of_expert=0.0))
    assert float(abs(words["difference"]).max()) > 0.5
    assert float(words["within_p"].min()) > 0.05
    assert float(abs(words["within"]).max()) < 0.5
    real = logprob_by_expert(planted(capture, of_token=1.0, of_expert=-0.7))
    cell = real.sel(layer=1, expert=2)
    assert float(cell["within_low"]) < -0.7 < float(cell["within_high"]) < 0
    assert float(cell["within_p"]) == 0.001


def test_few_documents_have_no_interval() -> None:
    capture = make_capture(documents=3, sequence_length=64, record=("logprob",))
    found = logprob_by_expert(capture)
    assert bool(found["within"].notnull().any())
    assert bool(found[["within_low", "within_p", "mean_logprob_low"]].isnull().to_array().all())


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, "doubling"]), st.none() | st.integers(1, 9))
def test_surprise_by_position_equals_numpy_s(seed: int, bins: int | str, chunk: int | None) -> None:
    capture = make_capture(seed=seed, documents=6, record=("logprob",), missing=(1,), chunked=False)
    starts = [0, 1, 2, 4, 8] if bins == "doubling" else list(range(0, 16, -(-16 // int(bins))))
    place = np.searchsorted(starts, np.nonzero(used(capture))[1], side="right") - 1
    y = -capture["logprob"].values[used(capture)].astype(float)
    found = surprise(capture if chunk is None else capture.chunk({"doc": chunk}), bins=bins)  # type: ignore[arg-type]
    by_range = defaultdict(list)
    for at, value in zip(place, y, strict=True):
        by_range[starts[at]].append(value)
    assert found["start"].values.tolist() == starts
    assert found["tokens"].values.tolist() == [len(by_range[start]) for start in starts]
    for start in starts:
        wanted = np.mean(by_range[start]) if by_range[start] else np.nan
        np.testing.assert_allclose(found["mean_surprise"].sel(start=start), wanted, atol=1e-6)
    if len(y):
        assert float(found["surprise_of_all"]) == pytest.approx(y.mean(), abs=1e-6)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_correlations_equal_numpy_s_over_tokens_and_within_them(scores: str) -> None:
    capture = make_capture(documents=20, record=BOTH, vocabulary=9, scores=scores, chunked=False)
    entropy = np.full((*capture["token"].shape, 3), np.nan)
    entropy[counted(capture)] = by_hand(capture)["entropy"]
    own = used(capture)
    x, y = -capture["logprob"].values[own].astype(float), entropy[own]
    stratum = np.nonzero(own)[0] * 1000 + capture["token"].values[own]
    same = (stratum[:, None] == stratum).astype(float)
    centre = lambda values: values - same @ values / same.sum(1).reshape(-1, *[1] * (values.ndim - 1))
    found = surprise_and_entropy(capture)
    assert found.attrs["n"] == len(x)
    for layer in range(3):
        assert float(found["correlation"][layer]) == pytest.approx(np.corrcoef(x, y[:, layer])[0, 1], abs=1e-4)
        within = np.corrcoef(centre(x), centre(y)[:, layer])[0, 1]
        assert float(found["within"][layer]) == pytest.approx(within, abs=1e-4)
        assert float(found["within_low"][layer]) < within < float(found["within_high"][layer])


def test_surprise_that_follows_the_entropy_is_correlated_and_that_of_words_is_not_within_them() -> None:
    capture = make_capture(
        documents=30, sequence_length=64, vocabulary=9, special_token_ids=(), record=BOTH, chunked=False
    )
    entropy = np.full((*capture["token"].shape, 3), np.nan)
    entropy[counted(capture)] = by_hand(capture)["entropy"]
    random = np.random.default_rng(1)
    there = capture["logprob"].notnull().values
    mean = np.array([np.nanmean(entropy[capture["token"].values == token, 1]) for token in range(9)])
    noise = random.normal(0, 0.1, there.shape)
    for made, within in ((entropy[..., 1] + noise, True), (mean[capture["token"].values] + noise, False)):
        logprob = np.where(there, -made, np.nan).astype(np.float32)
        found = surprise_and_entropy(capture.assign(logprob=(("doc", "position"), logprob))).sel(layer=1)
        assert float(found["correlation_low"]) > 0.1
        assert (float(found["within_low"]) > 0.1) is within


def test_what_is_not_there_is_named_with_what_makes_it() -> None:
    for ask in (logprob_by_expert, surprise):
        with pytest.raises(ValueError, match=r"needs logprob, .*--record logprob makes it"):
            ask(make_capture())
    with pytest.raises(ValueError, match=r"LogProbability needs logprob, which synthetic does not have"):
        scan(make_capture(), [LogProbability()])
    with pytest.raises(ValueError, match=r"needs logit, .*--record logits makes it"):
        surprise_and_entropy(make_capture(record=("logprob",)))
    with pytest.raises(ValueError, match="bins=0"):
        surprise(make_capture(record=("logprob",)), bins=0)
