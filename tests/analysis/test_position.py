"""Doubling ranges of positions, and the experts that depend on position."""

from collections import Counter

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from synthetic import captures, make_capture
from test_scan import few

from analysis.metrics.position import dependent_experts, position_load


@few
@given(captures())
def test_ranges_that_double_equal_a_loop_over_positions(capture: xr.Dataset) -> None:
    data, fill = capture.compute(), np.iinfo(capture["expert"].dtype).max
    wanted: Counter[tuple[int, int, int]] = Counter()
    for row in range(data.sizes["doc"]):
        for p in range(int(data["length"][row])):
            routes = data["expert"].values[row, p]
            if routes[0, 0] != fill and int(data["token"][row, p]) not in capture.attrs["special_token_ids"]:
                start = 0 if p == 0 else 2 ** (p.bit_length() - 1)
                wanted.update((start, layer, int(e)) for layer, chosen in enumerate(routes) for e in chosen)
    found = position_load(capture, bins="doubling")
    assert found["start"].values.tolist() == [0, 1, 2, 4]  # of rows of eight positions
    count = found["counts"].transpose("start", "layer", "expert").values
    starts = found["start"].values
    got = {(int(starts[s]), int(la), int(e)): int(count[s, la, e]) for s, la, e in np.argwhere(count)}
    assert got == dict(wanted)


def test_the_experts_that_mind_the_position_most_are_those_that_a_loop_finds() -> None:
    capture = make_capture(documents=200, layers=(2, 3, 7), special_token_ids=(), strength=0)
    routes = capture["expert"].compute().copy()
    routes.values[:, 0, 1] = np.where(np.arange(len(routes))[:, None] % 4, [5, 1], [5, 2])  # a row's first token
    routes = routes.where(capture["token"] >= 0, 255).astype("uint8").chunk(capture["expert"].chunksizes)
    load = position_load(capture.assign(expert=routes), bins="doubling")
    found = dependent_experts(load, top=5)
    assert (int(found["layer"][0]), int(found["expert"][0])) == (3, 5)
    share = load["counts"].transpose("layer", "start", "expert").values.astype(float)
    share /= share.sum((1, 2), keepdims=True)
    information = {}
    for layer in range(3):
        for e in range(8):
            total = 0.0
            for s in range(share.shape[1]):
                p, place, expert = share[layer, s, e], share[layer, s].sum(), share[layer, :, e].sum()
                total += p * np.log2(p / place / expert) if p else 0.0
            information[int(load["layer"][layer]), e] = total
    order = sorted(information, key=lambda cell: -information[cell])[:5]
    assert list(zip(found["layer"].values.tolist(), found["expert"].values.tolist(), strict=True)) == order
    np.testing.assert_allclose(found["information"], [information[cell] for cell in order], atol=1e-12)
    plain = dict.fromkeys(load["layer"].values.tolist(), 0.0)
    for (layer, _), bits in information.items():
        plain[layer] += bits  # over all experts: the layer's mutual information before correction
    assert plain[3] > load["mutual_information"].sel(layer=3) > 0
    at_first = share[1, 0, 5] / share[1, 0].sum() / share[1, :, 5].sum()
    assert float(found["times"].isel(place=0, start=0)) == pytest.approx(at_first)
    assert at_first > 2
    rows = int((capture["length"] > 0).sum())
    assert int(found["tokens"].isel(place=0, start=0)) == rows
    assert int(found["tokens"].isel(place=0).sum()) == load.attrs["n"]


def test_nothing_captured_minds_no_position() -> None:
    found = dependent_experts(position_load(make_capture(missing=range(100)), bins="doubling"))
    assert bool(found["times"].isnull().all())
    assert int(found["tokens"].sum()) == found.attrs["n"] == 0
