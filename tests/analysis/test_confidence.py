"""Router confidence against a loop over tokens."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import captures, make_capture
from test_scan import routed_tokens

from analysis.metrics.confidence import router_confidence

some = settings(max_examples=15, deadline=None)


@some
@given(captures(), st.integers(1, 9))
def test_histograms_and_means_equal_a_loop(capture: xr.Dataset, bins: int) -> None:
    found = router_confidence(capture, bins=bins)
    k, edges = capture.sizes["k"], np.linspace(0, 1, bins + 1)
    weights = np.array([weight for _, _, weight in routed_tokens(capture)]).reshape(-1, capture.sizes["layer"], k)
    assert found.attrs["n"] == len(weights)
    for layer in range(capture.sizes["layer"]):
        weight = weights[:, layer]
        share = weight / weight.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.where(share > 0, share * np.log2(share), 0).sum(1)
        values = {"first": weight[:, 0]} | ({"margin": weight[:, 0] - weight[:, 1]} if k > 1 else {})
        for name, value in values.items():
            np.testing.assert_array_equal(found[name][layer], np.histogram(value, edges)[0])
            if len(value):
                assert float(found[f"mean_{name}"][layer]) == value.mean()
        if len(weight):
            assert float(found["mean_entropy"][layer]) == pytest.approx(entropy.mean(), abs=2.0**-23)
            assert int(found["entropy"][layer].sum()) == len(weight)
            counts = np.histogram(entropy, edges * np.log2(k))[0] if k > 1 else None
            # Rounding may move an entropy at an edge to the neighbouring bin.
            assert counts is None or abs(np.cumsum(counts - found["entropy"][layer].values)).max() <= 1
    if k == 1:
        assert bool(found["mean_margin"].isnull().all())
        assert int(found["margin"].sum()) == 0


def test_a_sure_and_an_unsure_router_are_at_the_ends() -> None:
    capture = make_capture(chunked=False, layers=(0, 1))
    weight = capture["weight"].values.copy()
    weight[:, :, 0], weight[:, :, 1] = [1, 0], [0.5, 0.5]
    found = router_confidence(capture.assign(weight=(capture["weight"].dims, weight)), bins=4)
    n = found.attrs["n"]
    assert n > 0
    np.testing.assert_array_equal(found["first"], [[0, 0, 0, n], [0, 0, n, 0]])
    np.testing.assert_array_equal(found["margin"], [[0, 0, 0, n], [n, 0, 0, 0]])
    np.testing.assert_array_equal(found["entropy"], [[n, 0, 0, 0], [0, 0, 0, n]])
    assert found["mean_entropy"].values.tolist() == [0, 1]


def test_a_weight_that_is_not_finite_is_refused() -> None:
    capture = make_capture(chunked=False)
    weight = capture["weight"].values.copy()
    weight[0, 0, 1, 1] = np.nan
    with pytest.raises(ValueError, match="a weight is not a finite number"):
        router_confidence(capture.assign(weight=(capture["weight"].dims, weight)))
