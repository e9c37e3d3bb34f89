"""Sampled rows: which ones are used, that nothing else is counted, and that a result and its chart say so."""

import numpy as np
import pytest
import xarray as xr
from synthetic import make_capture, state_of

from analysis.metrics.caching import CacheCounts, cache_hits, cache_hits_of
from analysis.metrics.choices import Choices
from analysis.metrics.load import Load
from analysis.report.section import Answers, Asked
from analysis.report.sections import caching
from analysis.scanning import Reducer, scan
from analysis.statistics.sampling import SampledRows, chosen_rows


@pytest.mark.parametrize("one_in", [1, 2, 3, 7])
def test_one_row_of_every_so_many_is_chosen_and_not_always_the_same_place(one_in: int) -> None:
    chosen = chosen_rows(np.arange(40 * one_in), one_in).reshape(40, one_in)
    assert (chosen.sum(axis=1) == 1).all()
    assert chosen.any(axis=0).all()
    backwards = chosen_rows(np.arange(40 * one_in)[::-1], one_in)[::-1]
    assert (backwards == chosen.ravel()).all()


@pytest.mark.parametrize(
    "reducer", [Load(), Choices(), CacheCounts([2, 3])], ids=lambda reducer: type(reducer).__name__
)
def test_what_is_counted_is_what_the_chosen_rows_hold_in_any_chunks(reducer: Reducer) -> None:
    capture = make_capture(documents=60, missing=[2], chunked=False)
    sampled = scan(capture.chunk({"doc": 4}), [SampledRows(reducer, 3)])[0]
    chosen = chosen_rows(np.arange(capture.sizes["doc"]), 3)
    alone = scan(capture.isel(doc=chosen), [reducer])[0]
    counts = (capture["expert"].values[:, :, 0, 0] != 255) & ~np.isin(capture["token"].values, [-1, 1])
    rows = {"rows_sampled": int(counts[chosen].any(1).sum()), "rows_counted": int(counts.any(1).sum())}
    xr.testing.assert_identical(sampled, alone.assign_attrs(rows))
    for chunk, threads in ((1, 3), (7, 2)):
        again = scan(capture.chunk({"doc": chunk}), [SampledRows(reducer, 3)], threads=threads)[0]
        xr.testing.assert_identical(again, sampled)


def test_a_group_of_less_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="one_in=0: must be at least 1"):
        SampledRows(Load(), 0)


def drawn(capture: xr.Dataset) -> tuple[xr.Dataset, str, str]:
    """The report's counts of caches, and the text of the chart and below it."""
    asked = Asked(data=capture, state=state_of(capture), label="a")
    counted = scan(capture, list(caching.ask(asked).values()))
    found = caching.answer({"caches": counted[0]}, asked)
    figure, _ = caching.draw(
        [Answers(label="a", state=asked.state, attrs=capture.attrs, documents=1, found=found)], None
    )
    return found["caches"], " ".join(figure.spec["title"]["subtitle"]), figure.about


def test_one_document_of_more_than_the_sample_is_drawn_and_what_was_sampled_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    capture = make_capture(documents=40, seed=3, special_token_ids=())
    capture = capture.assign(document_id=0 * capture["document_id"]).isel(document=[0])
    tokens = int(capture["length"].sum())
    monkeypatch.setattr(caching, "CACHED_TOKENS", tokens // 8)
    found, subtitle, about = drawn(capture)
    sampled, rows = found.attrs["rows_sampled"], found.attrs["rows_counted"]
    assert 0 < 6 * sampled < rows == int((capture["length"] > 0).sum())
    assert 0 < found.attrs["n"] < tokens / 4
    assert not found["hit_rate"].isnull().any()
    assert f"a: {sampled} of {rows} rows, as a sample" in subtitle
    assert f"(a: {sampled} of {rows} rows, selected by a hash)" in about


def test_where_all_rows_are_simulated_no_sample_is_named() -> None:
    capture = make_capture(documents=10, seed=3)
    found, subtitle, about = drawn(capture)
    wanted = cache_hits_of(scan(capture, [CacheCounts(policies=("lru", "belady"))])[0])
    assert found["hits"].equals(wanted["hits"])
    assert found["hits"].equals(cache_hits(capture, policies=("lru", "belady"))["hits"])
    assert " of " not in subtitle + about.partition("Interval: ")[2]


def test_a_capture_of_one_long_row_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = make_capture(documents=40).isel(doc=[0], document=[0]).chunk({"doc": 1})
    monkeypatch.setattr(caching, "CACHED_TOKENS", 1)
    assert drawn(capture)[0].attrs["n"] > 0
