"""Which experts are chosen together, and which follow each other through the layers, from one set of counts.

`Choices` counts, in one pass, everything that load, co-activation and transitions need. If a token's choices at a layer
fit in one byte (`analysis.scanning.coded`; Mixtral's do), a joint histogram of the choices at two neighbouring layers
holds everything, with one increment per token and layer; for other models the same tables are counted one by one. Both
ways are exact and give equal results (tested).

"Neighbouring" layers are neighbours among the captured ones: some models have dense layers between them. The
conventions of the field are supported and named: **all** pairs of a token's choices, or pairs of neighbouring ranks, in
one direction or as OLMoE's code counts them (co-activation); **all** pairs of choices at two layers, the **first**
choices, or choices of equal **rank** (flow). Flow between any two layers is counted by `analysis.metrics.layer_pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import ClassVar, Literal

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.choice_kernels import add_joint, add_of_two, add_one_by_one
from analysis.metrics.layer_pairs import LayerPairs
from analysis.scanning import Array, Block, Reducer, State, coded, labelled, scan, sizes

Together = Literal["all", "adjacent", "olmoe"]
Followed = Literal["all", "first", "rank"]


class Choices(Reducer):
    """Counts of choices, of pairs at a layer, and of pairs at neighbouring layers.

    Parameters
    ----------
    joint : bool
        Count in a joint histogram if choices fit in one byte: faster, but 1 MB instead of 85 kB for Mixtral.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"code"})

    def __init__(self, *, joint: bool = True) -> None:
        self.joint = joint

    @property
    def stacks(self) -> bool:  # type: ignore[override]
        """True for tables, False for histograms."""
        return not self.joint

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: the tables named in `finish`, or the joint histogram from which it makes them."""
        layers, choices, experts = sizes(dataset)
        codes = experts**choices + 1
        if self.joint and coded(dataset) and layers > 1:
            shapes: dict[str, tuple[int, ...]] = {"joint": (layers - 1, codes, codes)}
        else:
            shapes = _shapes(layers, choices, experts)
        return {name: np.zeros(shape, dtype=np.int64) for name, shape in {"tokens": (1,), **shapes}.items()}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        state["tokens"] += np.count_nonzero(block["counted"])
        if "joint" in state:
            add_joint(block["code"], block["length"], state["joint"])
        else:
            arrays = (state[name] for name in state if name != "tokens")
            add = add_of_two if block["expert"].shape[-1] == 2 else add_one_by_one
            add(block["expert"], block["counted"], *arrays)

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The counts, labelled."""
        layer, (layers, choices, num_experts) = dataset["layer"].values, sizes(dataset)
        experts = np.arange(num_experts)
        tables = state
        if "joint" in state:
            tables = {name: np.zeros(shape, np.int64) for name, shape in _shapes(layers, choices, num_experts).items()}
            _unfold(state["joint"][:, :-1, :-1], num_experts, choices, tables)
        pair, step = ("layer", "expert", "other_expert"), ("lower_layer", "expert", "next_expert")
        dims = {
            "chosen": ("layer", "k", "expert"),
            "together_all": pair,
            "together_adjacent": pair,
            "followed_all": step,
            "followed_first": step,
            "followed_rank": step,
            "shared": ("lower_layer", "shared_experts"),
        }
        result = xr.Dataset(
            {name: labelled(tables[name], *dims[name]).assign_attrs(units="tokens") for name in dims},
            coords={
                "layer": layer,
                "lower_layer": layer[:-1],
                "upper_layer": ("lower_layer", layer[1:]),
                "expert": experts,
                "other_expert": experts,
                "next_expert": experts,
                "shared_experts": np.arange(choices + 1),
            },
        )
        return described(
            result,
            n=int(state["tokens"].flat[0]),
            estimator="counts",
            null="even tables",
            definition="counts over tokens: choices by rank; pairs of one token's choices, all ordered ones and those"
            " of neighbouring ranks (rank r, rank r + 1); pairs of choices at neighbouring layers, all, first, and of"
            " equal rank; experts that a token chose at both layers",
            source="OLMoE (Muennighoff et al. 2024), equations 6 and following",
        )


def coactivation(dataset: xr.Dataset, *, by: Together = "all", threads: int | None = None) -> xr.Dataset:
    """How often an expert is chosen together with another.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    by : {"all", "adjacent", "olmoe"}
        See `coactivation_of`.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        See `coactivation_of`.
    """
    return coactivation_of(scan(dataset, [Choices()], threads=threads)[0], by=by)


def coactivation_of(counts: xr.Dataset, *, by: Together = "all") -> xr.Dataset:
    """Co-activation from the counts of `Choices`.

    Parameters
    ----------
    counts : xr.Dataset
        From `Choices`.
    by : {"all", "adjacent", "olmoe"}
        "all": the share of expert i's tokens that also chose j, whatever the ranks: equation 6 of OLMoE's paper.
        "olmoe": the share of them that have j at a neighbouring rank, before or after i, as in OLMoE's published code
        and so in the paper's figures. For k = 2 the two are the same. "adjacent" (specific to this project): of the
        tokens with i at any rank except the last, the share whose next rank is j. For k = 2 that is P(second choice j
        given first choice i).

    Returns
    -------
    xr.Dataset
        `counts` int64 in tokens, `probability` float64, over (layer, expert, other_expert); NaN if an expert was never
        chosen. Null of `probability` for j ≠ i: (k − 1)/(E − 1) for "all", 2(k − 1)/(k(E − 1)) for "olmoe", 1/(E − 1)
        for "adjacent". For "all" and "olmoe" `counts` is symmetric.

    Raises
    ------
    ValueError
        When there is no such convention.
    """
    if by not in _TOGETHER:
        raise ValueError(f"unknown by={by!r}: choose from {', '.join(map(repr, _TOGETHER))}")
    choices, experts = counts.sizes["k"], counts.sizes["expert"]
    count, chosen = counts["together_all" if by == "all" else "together_adjacent"], counts["chosen"].sum("k")
    if by == "adjacent":
        chosen = count.sum("other_expert")
    elif by == "olmoe":
        count = count + count.transpose("layer", "other_expert", "expert").values
    neighbours = {"all": choices - 1, "olmoe": 2 * (choices - 1) / choices, "adjacent": 1}[by]
    definition, source = _TOGETHER[by]
    return described(
        xr.Dataset({"counts": count, "probability": count / chosen.where(chosen > 0)}),
        n=counts.attrs["n"],
        estimator="maximum likelihood",
        null=neighbours / (experts - 1) if choices > 1 else np.nan,
        definition=definition,
        source=source,
    )


_TOGETHER: dict[str, tuple[str, str]] = {
    "all": (
        "P(j given i) = N_ij / N_i over all pairs of one token's choices",
        "OLMoE (Muennighoff et al. 2024), equation 6",
    ),
    "adjacent": ("P(j at rank r + 1 given i at rank r), ranks pooled", "-"),
    "olmoe": (
        "(A_ij + A_ji) / N_i, where A_ij counts i at rank r and j at rank r + 1, and N_i all tokens that chose i",
        "OLMoE's code, run_moe_analysis.py, do_correlation_analysis",
    ),
}
"""Definition and source of each way of pairing a token's choices."""


def transitions(
    dataset: xr.Dataset,
    *,
    by: Followed = "first",
    layers: Sequence[tuple[int, int]] | None = None,
    threads: int | None = None,
) -> xr.Dataset:
    """How tokens move from layer to layer: between neighbouring layers, or any given ones.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    by : {"first", "all", "rank"}
        See `transitions_of`.
    layers : sequence of pair of int, optional
        Pairs of layers (from, to), by the model's own numbers, such as [(0, 15), (7, 31)]; default each captured layer
        to the next one.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        See `transitions_of`.

    Raises
    ------
    ValueError
        When a layer was not captured, or `layers` holds no pairs.
    """
    reducer = Choices() if layers is None else LayerPairs(layers)
    return transitions_of(scan(dataset, [reducer], threads=threads)[0], by=by)


def transitions_of(counts: xr.Dataset, *, by: Followed = "first") -> xr.Dataset:
    """Transitions from the counts of `Choices` or `LayerPairs`.

    Parameters
    ----------
    counts : xr.Dataset
        From `Choices`, or for any two layers from `LayerPairs`.
    by : {"first", "all", "rank"}
        Which pairs of choices are counted: "first" choices at both layers, "all" k² pairs, or pairs of equal "rank".

    Returns
    -------
    xr.Dataset
        `counts` int64, `probability` P(e' given e) and `lift` P(e' given e)/P(e') float64, over (layer, expert,
        next_expert), where `layer` is the lower one; coordinate `next_layer` (layer). From `LayerPairs` they are over
        (pair, expert, next_expert), with the coordinates `layer` and `next_layer` (pair). NaN if an expert was never
        chosen. Null of `probability`: 1/E, of `lift`: 1. For a capture of one layer, `layer` is empty.
    """
    count = counts[f"followed_{by}"]
    if "lower_layer" in count.dims:
        count = count.rename(lower_layer="layer", upper_layer="next_layer")
    leaving, arriving = count.sum("next_expert"), count.sum("expert")
    probability = count / leaving.where(leaving > 0)
    pairs = count.sum(("expert", "next_expert"))
    lift = probability * pairs / arriving.where(arriving > 0)
    to = "next_layer" if "pair" in count.dims else "the next captured layer"
    over = {
        "first": f"first choice e' at {to} given first choice e",
        "all": f"a choice e' at {to} given a choice e, over all pairs of choices",
        "rank": f"e' at {to} given e at the same rank, ranks pooled",
    }
    arrive = "probability over the share of all tokens that arrive at next_expert"
    return described(
        xr.Dataset(
            {
                "counts": count.assign_attrs(
                    long_name="tokens" if by == "first" else "pairs of choices", units="tokens"
                ),
                "probability": probability.assign_attrs(long_name="share of the expert's tokens"),
                "lift": lift.assign_attrs(long_name=arrive),
            }
        ),
        n=counts.attrs["n"],
        estimator="maximum likelihood",
        null=1 / counts.sizes["expert"],
        null_lift=1.0,
        definition=f"probability = P({over[by]}); lift = probability / P(e')",
        source="OLMoE (Muennighoff et al. 2024), cross-layer flow; its run_routing_analysis.py pairs equal ranks",
    )


def layer_overlap_of(counts: xr.Dataset) -> xr.Dataset:
    """How similar a token's sets of experts are at neighbouring layers, from the counts of `Choices`.

    Parameters
    ----------
    counts : xr.Dataset
        From `Choices`.

    Returns
    -------
    xr.Dataset
        `jaccard` float64 (layer): the mean over tokens of `|S ∩ S'| / |S ∪ S'|`; coordinate `next_layer`. NaN if
        nothing was counted. Experts of two layers have nothing in common except their number, so this is a check of
        the null.
    """
    shared = counts["shared"].rename(lower_layer="layer", upper_layer="next_layer")
    return described(
        overlap_summary(shared).drop_vars(("any_shared", "same_set")),
        n=counts.attrs["n"],
        estimator="mean over tokens",
        null=random_overlap(counts.sizes["k"], counts.sizes["expert"])["jaccard"],
        definition="mean Jaccard index of the sets S_l and S_l+1 of a token",
        source="Megatron-LM and OLMoE study transitions; this is the overlap of the sets",
    )


def overlap_summary(shared: xr.DataArray) -> xr.Dataset:
    """Means over tokens of the overlap of two sets of k experts, from counts by `shared_experts`."""
    size = shared["shared_experts"]
    choices = int(size[-1])
    total = shared.sum("shared_experts")
    share = shared / total.where(total > 0)
    return xr.Dataset(
        {
            "any_shared": share.where(size > 0, 0).sum("shared_experts", skipna=False),
            "same_set": share.sel(shared_experts=choices, drop=True),
            "jaccard": (share * (size / (2 * choices - size))).sum("shared_experts", skipna=False),
        }
    )


def random_overlap(choices: int, experts: int) -> dict[str, float]:
    """`overlap_summary` of two independent uniform sets: hypergeometric; for k = 2 of 8: 13/28, 1/28, 5/28."""
    share = [
        comb(choices, m) * comb(experts - choices, choices - m) / comb(experts, choices) for m in range(choices + 1)
    ]
    return {
        "any_shared": 1 - share[0],
        "same_set": share[choices],
        "jaccard": sum(p * m / (2 * choices - m) for m, p in enumerate(share)),
    }


def shared_experts(experts: int, choices: int) -> Array:
    """How many experts two codes have in common, int64 (code, code)."""
    number = np.arange(experts**choices)
    digits = number[:, None] // experts ** np.arange(choices - 1, -1, -1) % experts
    member = (digits[:, :, None] == np.arange(experts)).any(1).astype(np.int64)
    return np.asarray(member @ member.T)


def _shapes(layers: int, choices: int, experts: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tables, in the order in which they are counted."""
    steps, table = max(layers - 1, 0), (experts, experts)
    return {
        "chosen": (layers, choices, experts),
        "together_all": (layers, *table),
        "together_adjacent": (layers, *table),
        "followed_all": (steps, *table),
        "followed_first": (steps, *table),
        "followed_rank": (steps, *table),
        "shared": (steps, choices + 1),
    }


def _unfold(joint: Array, experts: int, choices: int, state: State) -> None:
    """Add the counts of a joint histogram of codes (lower_layer, code, next_code) to the tables."""
    steps, ranks = len(joint), range(choices)
    axes = joint.reshape(steps, *[experts] * (2 * choices))
    single = np.concatenate([joint.sum(2), joint[-1:].sum(1)]).reshape(steps + 1, *[experts] * choices)

    def table(counts: Array, one: int, other: int) -> Array:
        """Counts by two of the axes after the first, in that order."""
        rest = tuple(axis for axis in range(1, counts.ndim) if axis not in (one, other))
        summed: Array = counts.sum(rest)
        return summed if one < other else summed.swapaxes(1, 2)

    for i in ranks:
        state["chosen"][:, i] += single.sum(tuple(axis for axis in range(1, choices + 1) if axis != i + 1))
        for j in ranks:
            followed = table(axes, i + 1, choices + j + 1)
            state["followed_all"] += followed
            if i == j:
                state["followed_rank"] += followed
            else:
                state["together_all"] += table(single, i + 1, j + 1)
            if i == j == 0:
                state["followed_first"] += followed
            if j == i + 1:
                state["together_adjacent"] += table(single, i + 1, j + 1)
    shared = shared_experts(experts, choices)
    for size in range(choices + 1):
        state["shared"][:, size] += joint[:, shared == size].sum(1)
