"""Mean weights and margins compared with those of the histograms, and without documents."""

import numpy as np
import xarray as xr
from hypothesis import given
from synthetic import captures, make_capture
from test_scan import few, routed_tokens

from analysis.metrics.confidence import Confidence, MeanWeights
from analysis.scanning import scan
from analysis.statistics.jackknife import Jackknife, unit_of


@few
@given(captures())
def test_mean_weights_equal_a_loop_and_the_histograms_means(capture: xr.Dataset) -> None:
    found, histograms = scan(capture, [MeanWeights(), Confidence(4)])
    weights = np.array([weight for _, _, weight in routed_tokens(capture)])
    assert found.attrs["n"] == len(weights)
    if not len(weights):
        assert bool(found["mean_first"].isnull().all())
        return
    np.testing.assert_allclose(found["mean_first"], weights[:, :, 0].mean(0))
    xr.testing.assert_allclose(found["mean_first"], histograms["mean_first"], rtol=1e-12)
    if capture.sizes["k"] > 1:
        np.testing.assert_allclose(found["mean_margin"], (weights[:, :, 0] - weights[:, :, 1]).mean(0), atol=1e-12)
        xr.testing.assert_allclose(found["mean_margin"], histograms["mean_margin"], rtol=1e-12)
    else:
        assert bool(found["mean_margin"].isnull().all())


def test_mean_weights_can_leave_documents_out() -> None:
    capture = make_capture(documents=30, special_token_ids=())
    found = scan(capture, [Jackknife(MeanWeights(), 7)])[0]
    weight, length = capture["weight"].values.astype(float), capture["length"].values
    document = capture["document_id"].values
    unit = unit_of(np.unique(document, return_inverse=True)[1], 7)
    times = np.array([np.ones_like(unit), *(unit != number for number in range(7))])
    for replicate in range(8):
        total, tokens = np.zeros(capture.sizes["layer"]), 0
        for row, size in enumerate(length):
            total += times[replicate, row] * weight[row, :size, :, 0].sum(0)
            tokens += times[replicate, row] * size
        np.testing.assert_allclose(found["mean_first"].sel(replicate=replicate), total / tokens)
