"""Placements compared with plain Python, and files read back as by the servers."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import make_capture

from analysis.exports.placement import PLACEMENTS, gpu_load, load_matrix, write_sglang_load
from analysis.metrics.load import expert_load

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def loads(draw: st.DrawFn) -> xr.Dataset:
    num_experts = draw(st.integers(2, 64))
    capture = make_capture(
        seed=draw(st.integers(0, 2**31)),
        documents=draw(st.integers(1, 7)),
        layers=draw(st.sampled_from([(0,), (0, 1, 2), (3, 4)])),
        num_experts=num_experts,
        experts_per_token=draw(st.integers(1, min(8, num_experts))),
        sequence_length=8,
        rows_per_shard=draw(st.integers(1, 4)),
        vocabulary=12,
        missing=draw(st.lists(st.integers(0, 5), max_size=3)),
        chunked=False,
    )
    chunk = draw(st.none() | st.integers(1, 9))
    return expert_load(capture if chunk is None else capture.chunk({"doc": chunk, "position": 3, "layer": 1}))


def counts(load: xr.Dataset) -> list[list[int]]:
    """Choices of each expert, by layer."""
    return [
        [int(load["counts"].isel(layer=layer, expert=expert).sum()) for expert in range(load.sizes["expert"])]
        for layer in range(load.sizes["layer"])
    ]


def placed(count: list[int], gpus: int, placement: str) -> list[int]:
    """The GPU of each expert of one layer."""
    experts = len(count)
    room = [experts // gpus + (gpu < experts % gpus) for gpu in range(gpus)]
    if placement == "contiguous":
        return [gpu for gpu in range(gpus) for _ in range(room[gpu])]
    if placement == "round_robin":
        return [expert % gpus for expert in range(experts)]
    where, work = [-1] * experts, [0] * gpus
    for expert in sorted(range(experts), key=lambda expert: (-count[expert], expert)):
        free = [gpu for gpu in range(gpus) if where.count(gpu) < room[gpu]]
        gpu = min(free, key=lambda gpu: (work[gpu], gpu))
        where[expert] = gpu
        work[gpu] += count[expert]
    return where


@few
@given(loads(), st.data())
def test_placements_and_their_imbalance_equal_a_loop_over_experts(load: xr.Dataset, data: st.DataObject) -> None:
    experts = load.sizes["expert"]
    gpus = data.draw(st.integers(1, min(experts, 9)))
    result = gpu_load(load, gpus)
    assert result["placement"].values.tolist() == list(PLACEMENTS)
    assert result["gpu_load"].dims == ("placement", "layer", "gpu")
    assert result.attrs["n"] == load.attrs["n"]
    for layer, count in enumerate(counts(load)):
        for placement in PLACEMENTS:
            cell = result.sel(placement=placement).isel(layer=layer)
            where = placed(count, gpus, placement)
            work = [sum(c for c, at in zip(count, where, strict=True) if at == gpu) for gpu in range(gpus)]
            assert cell["gpu_of_expert"].values.tolist() == where
            assert cell["gpu_load"].values.tolist() == work
            mean = sum(work) / gpus
            np.testing.assert_allclose(cell["imbalance"], max(work) / mean if mean else np.nan)
            np.testing.assert_allclose(cell["balancedness"], mean / max(work) if mean else np.nan)
    assert result["layer"].values.tolist() == load["layer"].values.tolist()


def test_an_even_load_is_as_even_as_the_null_says_and_the_balanced_placement_mends_an_uneven_one() -> None:
    capture = make_capture(documents=60, num_experts=6, experts_per_token=2)
    load = expert_load(capture)
    even = load.assign(counts=xr.full_like(load["counts"], 5))
    for gpus, null in ((1, 1), (2, 1), (3, 1), (6, 1), (4, 4 / 3), (5, 5 / 3)):
        result = gpu_load(even, gpus)
        np.testing.assert_allclose(result["imbalance"], null)
        np.testing.assert_allclose(result["balancedness"], 1 / null)
        assert result.attrs["null"] == result["imbalance"].attrs["null"] == pytest.approx(null)
    skewed = even.assign(counts=load["counts"] * 0 + xr.DataArray([9, 8, 7, 3, 2, 1], dims="expert"))
    assert gpu_load(skewed, 3)["imbalance"].isel(layer=0).values.tolist() == [17 / 10, 12 / 10, 1]


def test_no_gpu_or_more_than_experts_or_an_unknown_placement_is_refused() -> None:
    load = expert_load(make_capture())
    for gpus in (0, 9):
        with pytest.raises(ValueError, match=f"{gpus} GPUs for 8 experts: num_gpus must be 1 to 8"):
            gpu_load(load, gpus)
    with pytest.raises(
        ValueError, match=r"unknown placements \['random'\]: choose from contiguous, round_robin, balanced"
    ):
        gpu_load(load, 2, ["random"])  # type: ignore[list-item]


# --- For balancers --------------------------------------------------------------------------------------------


@few
@given(loads())
def test_the_load_matrix_counts_every_choice_by_layer_and_expert(load: xr.Dataset) -> None:
    matrix = load_matrix(load)
    assert (matrix.dtype, matrix.flags.c_contiguous) == (np.int64, True)  # torch.from_numpy accepts it unchanged
    assert matrix.tolist() == counts(load)
    assert matrix.sum() == load.attrs["n"] * load.sizes["layer"] * load.sizes["k"]


@few
@given(load=loads(), more=st.integers(0, 2))
def test_a_file_for_sglang_reads_back_as_counts_by_step_layer_of_the_model_and_expert(
    tmp_path_factory: pytest.TempPathFactory, load: xr.Dataset, more: int
) -> None:
    path = tmp_path_factory.mktemp("load") / "load.json"
    layers = load["layer"].values.tolist()
    slots = layers[-1] + 1 + more
    write_sglang_load(path, load, slots)
    # as sglang/srt/eplb/expert_location.py: torch.tensor of a list, then summed over its first axis
    count = np.array(json.loads(path.read_text())["logical_count"])
    assert count.shape == (1, slots, load.sizes["expert"])
    by_layer = dict(zip(layers, counts(load), strict=True))
    nothing = [0] * load.sizes["expert"]
    assert count.sum(0).tolist() == [by_layer.get(layer, nothing) for layer in range(slots)]


def test_a_file_for_sglang_needs_its_ending_and_the_models_layers(tmp_path: Path) -> None:
    load = expert_load(make_capture(layers=(3, 4)))
    with pytest.raises(ValueError, match=r"load\.pt: the name must end in \.json"):
        write_sglang_load(tmp_path / "load.pt", load, 5)
    with pytest.raises(ValueError, match=r"layers \[3, 4\] were captured: pass num_hidden_layers"):
        write_sglang_load(tmp_path / "load.json", load)
    with pytest.raises(ValueError, match="num_hidden_layers=4, but layer 4 was captured"):
        write_sglang_load(tmp_path / "load.json", load, 4)
    assert list(tmp_path.iterdir()) == []
    write_sglang_load(tmp_path / "load.json", expert_load(make_capture()))
    assert np.shape(json.loads((tmp_path / "load.json").read_text())["logical_count"]) == (1, 3, 8)
