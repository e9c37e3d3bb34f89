"""Every result says what it is: of how many tokens, by which estimator, what chance would give, and whence it comes."""

from collections.abc import Callable

import pytest
import xarray as xr
from synthetic import make_capture

from analysis.exports.placement import gpu_load
from analysis.metrics.agreement import agreement
from analysis.metrics.caching import cache_hits
from analysis.metrics.choices import Choices, coactivation, layer_overlap_of, transitions
from analysis.metrics.confidence import router_confidence
from analysis.metrics.contrast import contrast
from analysis.metrics.document_scores import document_scores
from analysis.metrics.load import balance_of, domain_specialization, expert_load
from analysis.metrics.path_diversity import whole_paths, window_diversity
from analysis.metrics.paths import frequent_windows
from analysis.metrics.position import position_load
from analysis.metrics.repetition import repetition
from analysis.metrics.segments import segment_cache_hits, segment_routing
from analysis.metrics.token_contributions import token_contributions
from analysis.metrics.tokens import expert_tokens, token_experts
from analysis.metrics.vocabulary import vocabulary_specialization
from analysis.scanning import scan

METRICS: dict[str, Callable[[xr.Dataset], xr.Dataset]] = {
    "load": expert_load,
    "balance": lambda capture: balance_of(expert_load(capture)),
    "domain specialization": lambda capture: domain_specialization(expert_load(capture)),
    "vocabulary specialization": lambda capture: vocabulary_specialization(capture, min_count=2, draws=5),
    "token to expert": lambda capture: token_experts(capture, 1),
    "expert to token": lambda capture: expert_tokens(capture, 1),
    "co-activation": coactivation,
    "co-activation by neighbouring ranks": lambda capture: coactivation(capture, by="adjacent"),
    "repetition": repetition,
    "transitions": transitions,
    "overlap of layers": lambda capture: layer_overlap_of(scan(capture, [Choices()])[0]),
    "windows": frequent_windows,
    "diversity": lambda capture: window_diversity(capture, (1, 2)),
    "whole paths": whole_paths,
    "confidence": router_confidence,
    "position": position_load,
    "contrast": lambda capture: contrast({"a": capture, "b": capture}, replicates=5),
    "contributions": lambda capture: token_contributions(capture, make_capture(seed=5)),
    "scores": lambda capture: document_scores({"a": capture, "b": make_capture(seed=5)}),
    "agreement": lambda capture: agreement(capture, capture),
    "caches": lambda capture: cache_hits(capture, [2, 3]),
    "placement": lambda capture: gpu_load(expert_load(capture), 2),
    "segments": lambda capture: segment_routing(capture, [4]),
    "segment caches": lambda capture: segment_cache_hits(capture, [4], [2]),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_result_says_what_it_is(name: str) -> None:
    result = METRICS[name](make_capture())
    assert {"n", "null", "estimator", "definition", "source"} <= result.attrs.keys()
    assert result.attrs["definition"]
    assert result.attrs["source"]
    assert result.attrs["n"], "a number of tokens, or one for each data set"
    assert all(dim in result.coords or dim in ("k", "step", "bin", "document") for dim in result.dims), result
