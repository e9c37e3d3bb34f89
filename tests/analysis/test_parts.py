"""Parts of the documents, and many tests at once: against plain Python."""

from functools import partial

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from synthetic import make_capture

from analysis.metrics.choices import Choices
from analysis.scanning import scan
from analysis.statistics.parts import Parts, halves, nested
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
