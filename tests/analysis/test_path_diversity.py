"""Windows and whole paths compared with Counters, exact and sampled."""

import math
from collections import Counter

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from synthetic import captures, make_capture
from test_scan import routed_tokens

from analysis.metrics.path_diversity import TOPS, whole_paths, window_diversity

some = settings(max_examples=15, deadline=None)


def bits(counts: Counter[tuple[int, ...]]) -> float:
    n = sum(counts.values())
    return -sum(c / n * math.log2(c / n) for c in counts.values())


def first_choices(capture: xr.Dataset) -> list[tuple[int, ...]]:
    return [tuple(expert[:, 0].tolist()) for _, expert, _ in routed_tokens(capture)]


@some
@given(captures())
def test_windows_equal_a_counter(capture: xr.Dataset) -> None:
    layers, experts = capture.sizes["layer"], capture.attrs["num_experts"]
    lengths = [n for n in (1, 2, 3) if n <= layers and experts**n < 10**6]
    found = window_diversity(capture, lengths)
    paths = first_choices(capture)
    assert found.attrs["n"] == len(paths)
    for n in lengths if paths else ():
        for start in range(layers):
            cell = found.sel(length=n).isel(layer=start)
            if start + n > layers:
                assert bool(cell["entropy"].isnull())
                continue
            counts = Counter(path[start : start + n] for path in paths)
            assert int(cell["distinct"]) == len(counts)
            assert float(cell["entropy"]) == pytest.approx(bits(counts), abs=1e-12)
            assert float(cell["rate"]) == pytest.approx(bits(counts) / n, abs=1e-12)
            before = bits(Counter(path[start : start + n - 1] for path in paths))
            assert float(cell["conditional"]) == pytest.approx(bits(counts) - before, abs=1e-9)
            for top in TOPS:
                most = sum(count for _, count in counts.most_common(top))
                assert float(cell["coverage"].sel(top=top)) == pytest.approx(most / len(paths))


@some
@given(captures())
def test_whole_paths_equal_a_counter(capture: xr.Dataset) -> None:
    counts = Counter(first_choices(capture))
    if not counts:
        with pytest.raises(ValueError, match="no token is captured"):
            whole_paths(capture)
        return
    found = whole_paths(capture, top=5)
    n = sum(counts.values())
    wanted = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    listed = [tuple(path) for path in found["expert"].transpose("path", "layer").values.tolist()]
    assert list(zip(listed, found["counts"].values.tolist(), strict=True)) == wanted
    assert (found.attrs["n"], int(found["distinct"]), float(found["distinct_sd"])) == (n, len(counts), 0)
    assert float(found["entropy"]) == pytest.approx(bits(counts), abs=1e-12)
    assert float(found["unseen"]) == sum(count == 1 for count in counts.values()) / n
    assert bool(found["proven"].all())
    for top in TOPS:
        most = sum(count for _, count in counts.most_common(top))
        assert float(found["coverage"].sel(top=top)) == pytest.approx(most / n)


@pytest.fixture(scope="module")
def large() -> xr.Dataset:
    return make_capture(seed=1, documents=500, sequence_length=64, layers=range(6), strength=1.0, chunked=False)


@pytest.fixture(scope="module")
def paths(large: xr.Dataset) -> list[tuple[int, ...]]:
    """Its tokens' first choices."""
    return first_choices(large)


def test_frequent_paths_are_exact_and_the_others_estimated(large: xr.Dataset, paths: list[tuple[int, ...]]) -> None:
    counts = Counter(paths)
    n = sum(counts.values())
    ordered = [count for _, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    for kept in (2**13, 2**11):
        found = whole_paths(large, kept=kept, top=30)
        assert float(found["distinct_sd"]) > 0
        assert found["counts"].values.tolist() == ordered[:30]
        assert [counts[tuple(path)] for path in found["expert"].values.tolist()] == ordered[:30]
        for top, proven in zip(TOPS, found["proven"].values, strict=True):
            coverage = float(found["coverage"].sel(top=top)) * n
            exact = sum(ordered[:top])
            assert round(coverage) == exact if proven else coverage <= exact + 1e-6
        assert bool(found["proven"][0])
        assert abs(float(found["distinct"]) - len(counts)) < 4 * float(found["distinct_sd"])
        assert float(found["entropy"]) == pytest.approx(bits(counts), abs=0.4)
        once = sum(count == 1 for count in counts.values())
        assert float(found["once"]) == pytest.approx(once, abs=4 * float(found["distinct_sd"]))


@pytest.mark.parametrize("chunk", [7, 100])
def test_the_sample_does_not_depend_on_chunks_threads_or_order(large: xr.Dataset, chunk: int) -> None:
    wanted = whole_paths(large, kept=2**12)
    order = np.random.default_rng(chunk).permutation(large.sizes["doc"])
    xr.testing.assert_identical(whole_paths(large.isel(doc=order).chunk({"doc": chunk}), kept=2**12, threads=3), wanted)


def test_the_estimate_of_distinct_paths_is_not_biased(large: xr.Dataset, paths: list[tuple[int, ...]]) -> None:
    """Other layers, other hashes: the errors of many samples are standard normal together."""
    errors = []
    for layers in (
        [0, 1, 2, 3, 4],
        [1, 2, 3, 4, 5],
        [0, 2, 3, 4, 5],
        [0, 1, 3, 4, 5],
        [5, 4, 3, 2, 1, 0],
        [3, 2, 1, 0],
    ):
        found = whole_paths(large.isel(layer=layers), kept=2**10)
        distinct = len({tuple(path[layer] for layer in layers) for path in paths})
        errors.append((float(found["distinct"]) - distinct) / float(found["distinct_sd"]))
    assert abs(np.mean(errors)) < 4 / np.sqrt(len(errors))
    assert max(map(abs, errors)) < 5


def test_uniform_paths_have_the_entropy_of_chance() -> None:
    capture = make_capture(seed=5, documents=800, sequence_length=64, layers=(0, 1, 2), strength=0)
    found = window_diversity(capture, (1, 2, 3))
    np.testing.assert_allclose(found["corrected"].sel(layer=0) / found["length"], found.attrs["null"], atol=0.01)
    assert found.attrs["null"] == 3


def test_senseless_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="top=0, kept=5: both must be at least 1"):
        whole_paths(make_capture(), top=0, kept=5)


def test_lengths_are_by_default_those_that_fit() -> None:
    assert window_diversity(make_capture(layers=(3,)))["length"].values.tolist() == [1]
    assert window_diversity(make_capture(layers=range(6)))["length"].values.tolist() == [1, 2, 3, 4]
