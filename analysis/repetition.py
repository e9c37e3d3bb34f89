"""Do neighbouring tokens choose the same experts? Repetition at any distance, layer by layer.

"Consecutive" means positions of one row: pairs that are lost where a document is cut into windows are counted in the
attributes. Promises exact counts. Does not know the layers' order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.choices import add_joint, in_common, overlap_summary, random_overlap, shared_experts
from analysis.scan import Array, Block, Reducer, State, coded, kernel, labelled, scan, sizes


class Repetition(Reducer):
    """What the choices of two tokens at some distance in a row have in common.

    Parameters
    ----------
    lags : sequence of int
        Distances, in positions.
    joint : bool
        See `analysis.choices.Choices`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"code"})

    def __init__(self, lags: Sequence[int] = (1,), *, joint: bool = True) -> None:
        self.joint = joint
        self.lags = tuple(sorted(set(lags)))
        if not self.lags or self.lags[0] < 1:
            raise ValueError(f"lags {tuple(lags)}: one or more distances of at least 1 position")

    @property
    def stacks(self) -> bool:  # type: ignore[override]
        """Tables do, histograms not."""
        return not self.joint

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` (lag, layer, shared experts, same first), or the joint histogram (lag, layer, code, code)
        that it is made of; `pairs` (lag); `tokens`.
        """
        layers, choices, experts = sizes(dataset)
        codes = experts**choices + 1
        shape = ("joint", (codes, codes)) if self.joint and coded(dataset) else ("count", (choices + 1, 2))
        return {
            shape[0]: np.zeros((len(self.lags), layers, *shape[1]), dtype=np.int64),
            "pairs": np.zeros(len(self.lags), dtype=np.int64),
            "tokens": np.zeros(1, dtype=np.int64),
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        counted = block["counted"]
        state["tokens"] += np.count_nonzero(counted)
        for index, lag in enumerate(self.lags):
            state["pairs"][index] += np.count_nonzero(counted[:, lag:] & counted[:, :-lag])
            if "joint" in state:
                add_joint(block["code"], block["code"], block["length"], lag, state["joint"][index])
            else:
                _add_one_by_one(block["expert"], counted, lag, state["count"][index])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Shares of the pairs; NaN where there is no pair."""
        _, choices, experts = sizes(dataset)
        count = labelled(
            _unfold(state["joint"], experts, choices) if "joint" in state else state["count"],
            *("lag", "layer", "shared_experts", "same_first"),
            lag=list(self.lags),
            layer=dataset["layer"].values,
            shared_experts=np.arange(choices + 1),
            same_first=[False, True],
        )
        own_pairs = state["pairs"].reshape(-1, len(self.lags))[0]
        pairs = count.sum(("shared_experts", "same_first"))
        first = count.sel(same_first=True, drop=True).sum("shared_experts") / pairs.where(pairs > 0)
        summary = overlap_summary(count.sum("same_first"))
        null = {"first_repeated": 1 / experts, **random_overlap(choices, experts)}
        result = summary.assign(count=count, first_repeated=first)
        for name, value in null.items():
            result[name].attrs.update(null=value, units="share of pairs")
        return result.assign_attrs(
            n=int(own_pairs[0]),
            tokens=int(state["tokens"].flat[0]),
            pairs_by_lag=own_pairs.tolist(),
            pairs_lost_by_lag=_lost(dataset, self.lags),
            estimator="mean over pairs of tokens in one row",
            null=1 / experts,
            definition="first_repeated: share of pairs (t, t + lag) with the same first choice; any_shared: with any"
            " expert in common; same_set: with the same experts; jaccard: mean of |S ∩ S'| / |S ∪ S'|",
            source="Mixtral of Experts (Jiang et al. 2024), table 5",
        )


def repetition(dataset: xr.Dataset, *, lags: Sequence[int] = (1,), threads: int | None = None) -> xr.Dataset:
    """How often tokens at a distance choose the same experts.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    lags : sequence of int
        Distances in positions; 1 is the next token.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        Over (lag, layer), float64: `first_repeated`, `any_shared`, `same_set`, `jaccard`, each with its `null`, and
        `count` int64 (lag, layer, shared_experts, same_first). For k = 2 of 8 experts the nulls are 1/8, 13/28, 1/28
        and 5/28. Nothing says on which side of them a model lies.
    """
    return scan(dataset, [Repetition(lags)], threads=threads)[0]


def _unfold(joint: Array, experts: int, choices: int) -> Array:
    """Pairs by shared experts and same first choice, from pairs by codes (lag, layer, code, code)."""
    code, counted = np.arange(experts**choices), joint[..., :-1, :-1]
    shared, first = shared_experts(experts, choices), code // experts ** (choices - 1)
    same_first = first[:, None] == first
    count = [
        [counted[..., (shared == size) & (same_first == same)].sum(-1) for same in (False, True)]
        for size in range(choices + 1)
    ]
    return np.moveaxis(np.array(count), (0, 1), (-2, -1))


def _lost(dataset: xr.Dataset, lags: Sequence[int]) -> list[int]:
    """Pairs that a document would have and its rows do not, by lag; special tokens and selections are not looked at."""
    document, length = dataset["document_id"].values, dataset["length"].values.astype(np.int64)
    if "captured" in dataset:
        document, length = document[dataset["captured"].values], length[dataset["captured"].values]
    _, inverse = np.unique(document, return_inverse=True)
    whole = np.bincount(inverse, weights=length).astype(np.int64)
    return [int(np.maximum(whole - lag, 0).sum() - np.maximum(length - lag, 0).sum()) for lag in lags]


@kernel
def _add_one_by_one(expert: Array, counted: Array, lag: int, count: Array) -> None:
    rows, positions, layers, _ = expert.shape
    for row in range(rows):
        for position in range(lag, positions):
            if not (counted[row, position] and counted[row, position - lag]):
                continue
            for layer in range(layers):
                before, here = expert[row, position - lag, layer], expert[row, position, layer]
                count[layer, in_common(before, here), 1 if before[0] == here[0] else 0] += 1
