"""How evenly experts would spread over GPUs: published placements compared, and the load for expert balancers.

Everything is computed from the small Dataset of `analysis.expert_load`. Each layer is placed separately, because GPUs
wait for each other at every layer. Does not know about replicas of experts, or which tokens are in a batch together: a
batch is less even than the whole text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import Array
from store.files import whole_file

Placement = Literal["contiguous", "round_robin", "balanced"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


def gpu_load(load: xr.Dataset, num_gpus: int, placements: Sequence[Placement] = PLACEMENTS) -> xr.Dataset:
    """The load of each GPU, and its imbalance, if the experts were spread over `num_gpus`.

    Parameters
    ----------
    load : xr.Dataset
        From `analysis.expert_load`.
    num_gpus : int
        1 to E. If it does not divide E, the first E mod `num_gpus` GPUs hold one more expert.
    placements : sequence of {"contiguous", "round_robin", "balanced"}
        "contiguous": expert ids in blocks; "round_robin": expert e on GPU e mod `num_gpus`; these are vLLM's
        `expert_placement_strategy` "linear" and "round_robin" (vllm/model_executor/layers/fused_moe,
        `determine_expert_map`). "balanced": layer by layer, experts from the most to the least loaded (ties: the lower
        id), each to the GPU with the least load so far that has room (ties: the lower number). If `num_gpus` divides E,
        this is the greedy packing of DeepSeek's EPLB without replicas (deepseek-ai/EPLB, eplb.py, `balanced_packing`),
        applied to this load.

    Returns
    -------
    xr.Dataset
        `gpu_of_expert` int64 (placement, layer, expert); `gpu_load` int64 (placement, layer, gpu), in choices; float64
        (placement, layer): `imbalance`, maximum over mean of the GPUs' load, and `balancedness`, mean over maximum, NaN
        if nothing was counted. Their `null` is the value for an even load of all experts: 1 if `num_gpus` divides E.

    Raises
    ------
    ValueError
        When `num_gpus` is less than 1 or more than the number of experts, or a placement is unknown.
    """
    matrix = load_matrix(load)
    layers, experts = matrix.shape
    if not 1 <= num_gpus <= experts:
        raise ValueError(f"{num_gpus} GPUs for {experts} experts: num_gpus must be 1 to {experts}")
    if unknown := set(placements) - set(PLACEMENTS):
        raise ValueError(f"unknown placements {sorted(unknown)}: choose from {', '.join(PLACEMENTS)}")
    where = np.stack([_place(matrix, num_gpus, placement) for placement in placements])
    of_gpu = np.zeros((len(placements), layers, num_gpus), dtype=np.int64)
    placement, layer, _ = np.indices(where.shape)
    np.add.at(of_gpu, (placement, layer, where), matrix)
    loads = xr.DataArray(of_gpu, dims=("placement", "layer", "gpu"), attrs={"units": "choices"})
    most, mean = loads.max("gpu"), loads.mean("gpu")
    null = -(-experts // num_gpus) * num_gpus / experts
    return described(
        xr.Dataset(
            {
                "gpu_of_expert": (("placement", "layer", "expert"), where),
                "gpu_load": loads,
                "imbalance": (most / mean.where(mean > 0)).assign_attrs(null=null),
                "balancedness": (mean / most.where(most > 0)).assign_attrs(null=1 / null),
            },
            coords={
                "placement": list(placements),
                "layer": load["layer"].values,
                "expert": np.arange(experts),
                "gpu": np.arange(num_gpus),
            },
        ),
        n=load.attrs["n"],
        estimator="from the counted choices",
        null=null,
        definition="imbalance = max / mean over GPUs of the choices that go to their experts;"
        " balancedness = mean / max",
        source="vLLM, determine_expert_map; deepseek-ai/EPLB, balanced_packing; SGLang's balancedness,"
        " compute_utilization_rate in srt/eplb/expert_distribution.py",
    )


def load_matrix(load: xr.Dataset) -> Array:
    """The load in the shape expected by DeepSeek's and vLLM's balancers: int64 (layer, expert), in choices.

    `torch.from_numpy` of it is the `weight`, [layers, num_logical_experts], of `rebalance_experts` in deepseek-ai/EPLB
    (eplb.py) and of vLLM's `DefaultEplbPolicy.rebalance_experts` (vllm/distributed/eplb/policy/default.py), where
    layers are those with experts. vLLM measures this while serving; released versions do not read it from a file.

    Parameters
    ----------
    load : xr.Dataset
        From `analysis.expert_load`. It excludes special tokens, which a server would count.

    Returns
    -------
    int64 array, shape (layers, experts)
        In choices.
    """
    return load["counts"].sum("k").transpose("layer", "expert").values.astype(np.int64)


def write_sglang_load(path: Path | str, load: xr.Dataset, num_hidden_layers: int | None = None) -> None:
    """Write the load as a file for SGLang's `--init-expert-location FILE.json`, which then places experts accordingly.

    One JSON object, {"logical_count": [steps][layers][experts]}, as read by `compute_initial_expert_location_metadata`
    in sgl-project/sglang, python/sglang/srt/eplb/expert_location.py; SGLang's own recorder writes the same key into a
    torch file (expert_distribution.py). There is one step here, because the balancers add up steps. SGLang indexes by
    the model's own layer numbers, so layers without experts hold zeros.

    Parameters
    ----------
    path : Path or str
        A name that ends in .json, by which SGLang recognizes the format.
    load : xr.Dataset
        From `analysis.expert_load`.
    num_hidden_layers : int, optional
        All layers of the model, including dense ones; default the number of captured layers, if these are 0, 1, 2 and
        so on.

    Raises
    ------
    ValueError
        When the name does not end in .json, or the layers do not fit into `num_hidden_layers`.
    """
    if not str(path).endswith(".json"):
        raise ValueError(f"{path}: the name must end in .json, by which SGLang recognizes the format")
    slots = layer_slots(load["layer"].values, num_hidden_layers)
    counts = np.zeros((1, slots, load.sizes["expert"]), dtype=np.int64)
    counts[0, load["layer"].values] = load_matrix(load)
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps({"logical_count": counts.tolist()}), encoding="utf-8")


def layer_slots(layers: Array, num_hidden_layers: int | None) -> int:
    """The number of layers of an array that is indexed by the model's own layer numbers.

    Raises
    ------
    ValueError
        When it is not given and cannot be derived, or is too small.
    """
    if num_hidden_layers is None and layers.tolist() != list(range(layers.size)):
        raise ValueError(
            f"layers {layers.tolist()} were captured: pass num_hidden_layers, the model's number of layers"
        )
    slots = layers.size if num_hidden_layers is None else num_hidden_layers
    if layers.size and slots <= layers.max():
        raise ValueError(f"num_hidden_layers={slots}, but layer {layers.max()} was captured")
    return slots


def _place(matrix: Array, num_gpus: int, placement: Placement) -> Array:
    """The GPU of each expert, int64 (layer, expert)."""
    layers, experts = matrix.shape
    room = np.full(num_gpus, experts // num_gpus) + (np.arange(num_gpus) < experts % num_gpus)
    if placement == "contiguous":
        return np.tile(np.repeat(np.arange(num_gpus), room), (layers, 1))
    if placement == "round_robin":
        return np.tile(np.arange(experts) % num_gpus, (layers, 1))
    gpu = np.empty((layers, experts), dtype=np.int64)
    for layer, load in enumerate(matrix):
        left, carried = room.copy(), np.zeros(num_gpus, dtype=np.int64)
        for expert in np.argsort(-load, kind="stable"):
            lightest = np.where(left > 0, carried, np.iinfo(np.int64).max).argmin()
            gpu[layer, expert] = lightest
            left[lightest] -= 1
            carried[lightest] += load[expert]
    return gpu
