"""Repetition with many experts, and compared with the value expected from the load alone."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from synthetic import captures, make_capture
from test_scan import few, routed_tokens

from analysis.metrics.load import expert_load
from analysis.metrics.repetition import Repetition, first_repeated_by_load
from analysis.scanning import scan


@pytest.mark.parametrize(("experts", "choices"), [(8, 1), (8, 2), (64, 3), (65, 8), (130, 8), (300, 4), (200, 64)])
def test_sets_of_experts_are_compared_as_python_compares_them(experts: int, choices: int) -> None:
    capture = make_capture(
        num_experts=experts, experts_per_token=choices, documents=5, special_token_ids=(), strength=3
    )
    found = scan(capture, [Repetition((1, 3))])[0]
    expert, length = capture["expert"].values, capture["length"].values
    for index, lag in enumerate((1, 3)):
        pairs = [(row, p) for row in range(len(length)) for p in range(length[row] - lag)]
        wanted = np.zeros((capture.sizes["layer"], choices + 1, 2), int)
        for row, p in pairs:
            for layer in range(capture.sizes["layer"]):
                one, other = expert[row, p, layer].tolist(), expert[row, p + lag, layer].tolist()
                wanted[layer, len({*one} & {*other}), int(one[0] == other[0])] += 1
        got = found["counts"].isel(lag=index).transpose("layer", "shared_experts", "same_first").values
        np.testing.assert_array_equal(got, wanted)


@few
@given(captures())
def test_what_the_load_gives_is_the_mean_over_all_pairs_of_tokens(capture: xr.Dataset) -> None:
    found = first_repeated_by_load(expert_load(capture))
    first = np.array([expert[:, 0] for _, expert, _ in routed_tokens(capture)]).reshape(-1, capture.sizes["layer"])
    for layer in range(capture.sizes["layer"]):
        chosen = first[:, layer]
        wanted = np.mean([one == other for one in chosen for other in chosen]) if len(chosen) else np.nan
        np.testing.assert_allclose(float(found[layer]), wanted)


def test_tokens_that_choose_independently_repeat_as_the_load_says() -> None:
    capture = make_capture(documents=300, sequence_length=64, rows_per_shard=64, strength=0, special_token_ids=())
    routes = capture["expert"].compute().copy()
    random = np.random.default_rng(3)
    routes.values[..., 0] = random.choice(8, routes.shape[:-1], p=[0.5, 0.3, *[0.2 / 6] * 6])
    routes.values[..., 1] = (routes.values[..., 0] + 1) % 8
    routes = routes.where(capture["token"] >= 0, 255).astype("uint8").chunk(capture["expert"].chunksizes)
    capture = capture.assign(expert=routes)
    found = scan(capture, [Repetition((1, 2, 8))])[0]
    by_load = first_repeated_by_load(expert_load(capture))
    assert float(by_load.mean()) > 2 / 8
    spread = 5 * np.sqrt(0.35 * 0.65 / found.attrs["n"]) * 2
    assert float(abs(found["first_repeated"] - by_load).max()) < spread
