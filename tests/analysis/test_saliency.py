"""Saliency compared with a loop over tokens, and its interval with Student's for documents of equal sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic import make_capture
from test_distribution import counted

from analysis import Saliency, saliency, scan, write_saliency

NORMS = ("output_norm",)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(8, 2), (5, 3), (20, 1)]), st.none() | st.integers(1, 9))
def test_mean_total_and_largest_equal_a_loop(seed: int, shape: tuple[int, int], chunk: int | None) -> None:
    capture = make_capture(
        seed=seed, documents=6, num_experts=shape[0], experts_per_token=shape[1], record=NORMS, missing=(1,),
        chunked=False,
    )  # fmt: skip
    own = counted(capture)
    expert = capture["expert"].values[own].astype(int)
    norm, weight = capture["output_norm"].values[own].astype(float), capture["weight"].values[own].astype(float)
    found = saliency(capture if chunk is None else capture.chunk({"doc": chunk}))
    assert found.attrs["n"] == len(expert)
    for layer in range(3):
        product = (weight * norm)[:, layer]
        for e in range(shape[0]):
            at, cell = expert[:, layer] == e, found.isel(layer=layer, expert=e)
            assert int(cell["tokens"]) == at.sum()
            if not at.any():
                assert all(bool(cell[name].isnull()) for name in ("mean_saliency", "largest_saliency", "mean_norm"))
                continue
            assert float(cell["mean_saliency"]) == pytest.approx(product[at].mean(), abs=1e-6)
            assert float(cell["total_saliency"]) == pytest.approx(product[at].sum(), abs=1e-6 * at.sum())
            assert float(cell["largest_saliency"]) == product[at].max()
            assert float(cell["mean_norm"]) == pytest.approx(norm[:, layer][at].mean(), abs=1e-6)
            assert float(cell["largest_norm"]) == norm[:, layer][at].max()
            assert float(cell["share"]) == pytest.approx(product[at].sum() / product.sum(), abs=1e-6)


def test_the_interval_is_students_over_documents_of_equal_parts() -> None:
    """Documents of one row each, in which every token has the document's own norm and goes to the same experts."""
    random = np.random.default_rng(5)
    capture = make_capture(documents=40, record=NORMS, special_token_ids=(), chunked=False)
    full = capture.isel(doc=np.unique(capture["document_id"].values, return_index=True)[1])
    full = full.isel(doc=full["length"].values == 16)
    n = full.sizes["doc"]
    of_document = random.lognormal(size=n).astype(np.float32)
    full["expert"].values[:], full["weight"].values[:] = [3, 5], [0.75, 0.25]
    full["output_norm"].values[:] = of_document[:, None, None, None]
    found = saliency(full)
    for e, weight in ((3, 0.75), (5, 0.25)):
        own = weight * of_document.astype(float)
        low, high = stats.t.interval(0.95, n - 1, own.mean(), own.std(ddof=1) / np.sqrt(n))
        np.testing.assert_allclose(found["mean_saliency_low"].sel(expert=e), low, atol=1e-5)
        np.testing.assert_allclose(found["mean_saliency_high"].sel(expert=e), high, atol=1e-5)


def test_an_expert_that_few_documents_reach_has_a_mean_and_no_interval() -> None:
    capture = make_capture(documents=20, record=NORMS, chunked=False)
    first = capture["document_id"].values[0]
    expert = capture["expert"].values
    expert[expert == 7] = 6
    own = (capture["document_id"].values == first)[:, None] & (np.arange(16) < capture["length"].values[:, None])
    expert[own] = [7, 0]
    cell = saliency(capture).sel(expert=7)
    assert bool(cell["mean_saliency"].notnull().all())
    assert bool(cell["mean_saliency_low"].isnull().all())


def test_weights_in_float32_give_what_those_in_float16_give() -> None:
    capture = make_capture(record=NORMS)
    xr.testing.assert_equal(saliency(capture), saliency(capture.assign(weight=capture["weight"].astype(np.float32))))


def test_what_is_not_there_or_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Saliency needs output_norm, .*--record output_norm makes it"):
        saliency(make_capture())
    damaged = make_capture(record=NORMS, chunked=False)
    damaged["output_norm"].values[0, 0, 1, 1] = np.inf
    with pytest.raises(ValueError, match="an output's norm is not a finite number"):
        scan(damaged, [Saliency()])


@pytest.mark.parametrize("by", ["mean_saliency", "largest_norm"])
def test_the_file_has_each_layer_s_experts_from_the_least_salient_on_with_their_scores(by: str, tmp_path: Path) -> None:
    captures = {name: make_capture(seed=seed, layers=(1, 4), record=NORMS) for name, seed in (("a", 1), ("b", 2))}
    expert = captures["b"]["expert"].values
    expert[expert == 6] = 5
    captures["b"] = captures["b"].assign(expert=(captures["b"]["expert"].dims, expert))
    found = {name: saliency(capture) for name, capture in captures.items()}
    write_saliency(tmp_path / "s.json", found, by=by)  # type: ignore[arg-type]
    read = json.loads((tmp_path / "s.json").read_text())
    assert (read["format"], read["by"]) == ("expert-atlas saliency 1", by)
    for name, each in found.items():
        own = read["data_sets"][name]
        assert own["n"] == each.attrs["n"]
        assert list(own["experts"]) == ["1", "4"]
        for layer, experts in own["experts"].items():
            assert sorted(experts) == list(range(8))
            cells = each.sel(layer=int(layer), expert=experts)
            for score in ("mean_saliency", "largest_norm", "mean_saliency_low", "tokens"):
                wanted = [None if np.isnan(value) else value for value in cells[score].values.tolist()]
                assert own[score][layer] == wanted
            scores = [value for value in own[by][layer] if value is not None]
            assert scores == sorted(scores)
    assert [own["experts"][layer][0] for layer in ("1", "4")] == [6, 6]
    assert own["mean_saliency"]["1"][0] is None


def test_a_file_of_nothing_or_by_no_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="by='low': choose from mean_saliency, total_saliency"):
        write_saliency(tmp_path / "s.json", {"a": saliency(make_capture(record=NORMS))}, by="low")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no data set"):
        write_saliency(tmp_path / "s.json", {})
