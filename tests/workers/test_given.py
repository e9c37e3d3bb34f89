"""Routes of another capture are given only for the same tokens; the first difference is named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_model import TEXTS, fake_capture

import store
from workers.given import GivenRoutes
from workers.shard import RoutingError


@pytest.fixture
def given(tmp_path: Path) -> GivenRoutes:
    """A complete capture of five shards of four rows."""
    assert fake_capture(tmp_path / "s.zarr", TEXTS).complete
    return GivenRoutes(str(tmp_path / "s.zarr"), "fake", weights=True)


def test_they_are_those_of_the_shard(given: GivenRoutes) -> None:
    group, whole = store.CaptureGroup(given.path, "fake"), store.open_capture(given.path, "fake").load()
    for shard in (0, 2, 4):
        span = slice(*group.span(shard, group.plan))
        found = given.of(shard, group.read_rows(shard))
        assert list(found) == ["expert", "weight"]
        for name, values in found.items():
            np.testing.assert_array_equal(values, whole[name].values[span])
    assert list(replace(given, weights=False).of(0, group.read_rows(0))) == ["expert"]


def test_other_tokens_are_refused_and_the_first_is_named(given: GivenRoutes) -> None:
    rows = store.CaptureGroup(given.path, "fake").read_rows(2)
    there = int(rows.token[1, 3])
    rows.token[1, 3] += 1
    rows.token[2, 0] += 1
    wanted = f"row 1 of shard 2 has {there} at position 3, but {there + 1} is needed"
    with pytest.raises(RoutingError, match=f"fake has other tokens: {wanted}"):
        given.of(2, rows)
    fewer = replace(rows, token=rows.token[:3], length=rows.length[:3])
    with pytest.raises(RoutingError, match="fake has 4 rows in shard 2, but 3 are needed"):
        given.of(2, fewer)


def test_a_capture_that_is_not_whole_or_not_of_this_text_is_refused(given: GivenRoutes) -> None:
    group = store.CaptureGroup(given.path, "fake")
    given.refuse_unfit(group.identity | {"quantization": "nf4", "batch_tokens": 1})
    for field, other in (("sequence_length", 16), ("bos", "row"), ("text_data", "more"), ("model", "another")):
        with pytest.raises(ValueError, match=f"of other tokens, or of another model:\n  {field}: the store has "):
            given.refuse_unfit(group.identity | {field: other})
    group.discard(1)
    with pytest.raises(ValueError, match=r"is not complete: .*Finish that capture first"):
        given.refuse_unfit(group.identity)
