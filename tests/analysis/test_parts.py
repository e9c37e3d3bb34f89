"""Parts of the documents, and many tests at once: against plain Python."""

from functools import partial

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_capture

from analysis.metrics.choices import Choices
from analysis.metrics.load import Load
from analysis.scanning import scan
from analysis.statistics.parts import Parts, Thinned, halves, nested
from analysis.statistics.testing import false_discovery


@pytest.mark.parametrize("joint", [True, False])
def test_parts_are_what_their_documents_give_alone(joint: bool) -> None:
    capture = make_capture(documents=30, seed=2)
    document = capture["document_id"].values
    for belongs, number in ((partial(nested, halvings=3), 3), (halves, 1)):
        found = scan(capture, [Parts(Choices(joint=joint), number, belongs)])[0]
        for part, rows in enumerate([np.full(len(document), True), *belongs(document)]):
            alone = scan(capture.isel(doc=rows), [Choices()])[0]
            np.testing.assert_array_equal(found["followed_all"].sel(replicate=part), alone["followed_all"])


@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=30))
def test_false_discovery_is_the_step_up_of_benjamini_and_hochberg(p: list[float | None]) -> None:
    values = xr.DataArray([np.nan if one is None else one for one in p], dims="cell")
    adjusted = false_discovery(values).values
    tested = sorted(one for one in p if one is not None)
    for q in (0.01, 0.05, 0.2, 0.5):
        passing = [rank for rank, one in enumerate(tested, 1) if one <= q * rank / len(tested)]
        limit = tested[passing[-1] - 1] if passing else -1.0
        for one, found in zip(p, adjusted, strict=True):
            if one is None:
                assert np.isnan(found)
            elif abs(found - q) > 1e-9:
                assert (found < q) == (one <= limit), (one, found, q)


def test_a_thinned_count_is_that_of_some_documents_whole_and_the_same_in_any_order() -> None:
    capture = make_capture(documents=400, seed=4)
    thinned = scan(capture, [Thinned(Load(), 0.25)])[0]
    documents = np.unique(capture["document_id"].values)
    alone = {
        number: scan(capture.isel(doc=capture["document_id"].values == number), [Thinned(Load(), 0.25)])[0]
        for number in documents[:40].tolist()
    }
    whole = {number: int((capture["document_id"].values == number).sum()) for number in alone}
    assert {found.attrs["n"] > 0 for found in alone.values()} == {True, False}, whole
    assert 0.15 < thinned.attrs["n"] / scan(capture, [Load()])[0].attrs["n"] < 0.35
    for number, found in alone.items():  # all of a document, or nothing
        own = capture.isel(doc=capture["document_id"].values == number)
        assert found.attrs["n"] in (0, scan(own, [Load()])[0].attrs["n"])
    backwards = capture.isel(doc=slice(None, None, -1)).chunk({"doc": 3})
    assert scan(backwards, [Thinned(Load(), 0.25)])[0]["count"].equals(thinned["count"])
    assert scan(capture, [Thinned(Load(), 1.0)])[0]["count"].equals(scan(capture, [Load()])[0]["count"])


def test_what_cannot_be_thinned_is_refused() -> None:
    with pytest.raises(ValueError, match="share=0: above 0, and at most 1"):
        Thinned(Load(), 0)
