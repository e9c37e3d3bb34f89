"""Metrics by number of tokens: each part alone gives the values of the curve, and the curve says how many do."""

from itertools import pairwise

import numpy as np
import pytest
import xarray as xr
from synthetic import make_capture

from analysis.metrics.choices import Choices, coactivation_of
from analysis.metrics.load import Load, balance_of
from analysis.scanning import Selection, scan
from analysis.statistics.growth import enough, growth
from analysis.statistics.parts import nested


def test_parts_are_nested_halves_of_the_documents() -> None:
    parts = nested(np.arange(20_000), 6)
    for larger, smaller in pairwise([np.full(20_000, True), *parts]):
        assert (smaller <= larger).all()
        assert abs(smaller.sum() / larger.sum() - 0.5) < 5 * np.sqrt(0.25 / larger.sum())


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_a_part_is_what_its_documents_give_alone(chunk: int | None) -> None:
    capture = make_capture(seed=4, documents=30, chunked=False)
    capture = capture if chunk is None else capture.chunk({"doc": chunk})
    inside = [np.full(30, True), *nested(np.arange(30), 3)]
    curve = growth(capture, Choices(joint=False), halvings=3)
    loads = growth(capture, Load(), halvings=3)
    for part in range(4):
        only = Selection(documents=tuple(np.flatnonzero(inside[part]).tolist()))
        alone, load = scan(capture, [Choices(), Load()], only=only)
        assert int(curve["tokens"][part]) == alone.attrs["n"]
        for name in alone:
            np.testing.assert_array_equal(curve[name].isel(part=part), alone[name])
        np.testing.assert_array_equal(balance_of(loads)["entropy"].isel(part=part), balance_of(load)["entropy"])
    assert coactivation_of(curve)["probability"].sizes["part"] == 4


def test_enough_is_the_smallest_part_from_which_on_all_larger_ones_are_near() -> None:
    tokens = ("part", [800, 400, 200, 100])
    values = xr.DataArray(
        [[1.0, 1.0, 1.0, np.nan], [1.05, 1.5, 1.09, np.nan], [0.95, 1.0, 1.0, np.nan], [1.5, 1.0, 1.05, np.nan]],
        dims=("part", "case"),
        coords={"tokens": tokens},
    )
    assert enough(values, 0.1)[:3].values.tolist() == [200, 800, 100]
    assert bool(enough(values, 0.1)[3].isnull())


def test_a_load_needs_fewer_tokens_for_a_wider_tolerance() -> None:
    curve = balance_of(growth(make_capture(seed=1, documents=400), Load(), halvings=7))["entropy"]
    needs = [enough(curve, tolerance) for tolerance in (0.001, 0.01, 0.5)]
    assert bool((needs[0] >= needs[1]).all())
    assert bool((needs[1] > needs[2]).all())


def test_no_part_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="halvings=0: must be at least 1"):
        growth(make_capture(), Load(), halvings=0)
