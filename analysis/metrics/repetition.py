"""Do neighbouring tokens choose the same experts? Repetition at any distance, layer by layer.

"Consecutive" refers to positions of one row: the attributes count the pairs that are lost because a document is split
into windows. Promises exact counts. Does not know the order of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.choices import overlap_summary, random_overlap
from analysis.metrics.load import share_of_experts
from analysis.scanning import Array, Block, Reducer, State, kernel, labelled, room_to_turn, scan, sizes, turn

MOST_RANKS = 63  # per token, so that the overlap of two tokens fits in less than half a byte
APART = np.uint8(128)


class Repetition(Reducer):
    """The overlap of the choices of two tokens at some distance in a row.

    Parameters
    ----------
    lags : sequence of int
        Distances, in positions.
    """

    stacks = True

    def __init__(self, lags: Sequence[int] = (1,)) -> None:
        self.lags = tuple(sorted(set(lags)))
        if not self.lags or self.lags[0] < 1:
            raise ValueError(f"lags {tuple(lags)}: must be one or more distances of at least 1 position")

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` (lag, layer, shared experts, same first); `pairs` (lag); `tokens`."""
        layers, choices, _ = sizes(dataset)
        return {
            "count": np.zeros((len(self.lags), layers, choices + 1, 2), dtype=np.int64),
            "pairs": np.zeros(len(self.lags), dtype=np.int64),
            "tokens": np.zeros(1, dtype=np.int64),
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        expert, counted = block["expert"], block["counted"]
        state["tokens"] += np.count_nonzero(counted)
        add = _add_ranks if expert.dtype == np.uint8 and expert.shape[-1] <= MOST_RANKS else _add_sets
        add(expert, counted, np.array(self.lags), state["pairs"], state["count"])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Shares of the pairs; NaN if there is no pair."""
        _, choices, experts = sizes(dataset)
        count = labelled(
            state["count"],
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
        result = summary.assign(counts=count, first_repeated=first)
        for name, value in null.items():
            result[name].attrs.update(null=value, units="share of pairs")
        return described(
            result,
            n=int(own_pairs[0]),
            counted=f"pairs of tokens at lag {self.lags[0]}",
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
    """How often tokens at a given distance choose the same experts.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    lags : sequence of int
        Distances in positions; 1 is the next token.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        Over (lag, layer), float64: `first_repeated`, `any_shared`, `same_set`, `jaccard`, each with its `null`, and
        `counts` int64 (lag, layer, shared_experts, same_first). For k = 2 of 8 experts the nulls are 1/8, 13/28, 1/28
        and 5/28. NaN if there is no pair. A model may lie on either side of the nulls.

    Raises
    ------
    ValueError
        When there is no lag, or one is below 1.
    """
    return scan(dataset, [Repetition(lags)], threads=threads)[0]


def first_repeated_by_load(load: xr.Dataset) -> xr.DataArray:
    """How often two unrelated tokens have the same first choice, given the load.

    Parameters
    ----------
    load : xr.Dataset
        From `analysis.metrics.load.expert_load`.

    Returns
    -------
    xr.DataArray
        float64 (layer): Σ over experts of the squared share of first choices, the value for two independent draws; at
        least 1/E, which is the null of an even load. NaN if nothing was counted. The load does not determine the
        corresponding value for whole sets of experts.
    """
    share = share_of_experts(load["counts"].isel(k=0, drop=True))
    return described(
        (share**2).sum("expert", skipna=False),
        n=load.attrs["n"],
        estimator="plug-in",
        null=1 / load.sizes["expert"],
        definition="sum over experts of the squared share of first choices",
        source="the probability that two independent draws are equal (Simpson 1949)",
    )


def _lost(dataset: xr.Dataset, lags: Sequence[int]) -> list[int]:
    """Pairs that a document would have but its rows do not, by lag; special tokens and selections are ignored."""
    document, length = dataset["document_id"].values, dataset["length"].values.astype(np.int64)
    if "captured" in dataset:
        document, length = document[dataset["captured"].values], length[dataset["captured"].values]
    _, inverse = np.unique(document, return_inverse=True)
    whole = np.bincount(inverse, weights=length).astype(np.int64)
    return [int(np.maximum(whole - lag, 0).sum() - np.maximum(length - lag, 0).sum()) for lag in lags]


@kernel
def _add_ranks(expert: Array, counted: Array, lags: Array, pairs: Array, count: Array) -> None:
    """Count pairs if an expert is a byte: each rank of one token with each of the other, a row's tokens at once.

    For k = 2 of 8 this takes a quarter of the time of sets, and also less for k = 8 of 128 (measured).
    """
    rows, positions, layers, choices = expert.shape
    ranks = room_to_turn(positions, layers * choices)
    apart, alike = np.empty(positions, np.uint8), np.empty(positions, np.uint8)
    nothing = np.full(positions, 255, np.uint8)
    for row in range(rows):
        filled = positions
        while filled and not counted[row, filled - 1]:
            filled -= 1
        turn(expert[row].reshape(positions, layers * choices)[:filled], ranks)
        for index in range(len(lags)):
            lag, size = lags[index], filled - lags[index]
            if size <= 0:
                continue
            number = _apart(counted[row], counted[row][lag:], size, apart)
            pairs[index] += number
            for layer in range(layers):
                own = ranks[choices * layer : choices * (layer + 1)]
                _begin(own[0], own[0][lag:], apart, size, alike)
                for one in range(choices):
                    for other in range(0, choices, 2):
                        after = own[other + 1][lag:] if other + 1 < choices else nothing
                        _compare(own[one], own[other][lag:], after, size, alike)
                _tally(alike, size, number, count[index, layer])


@kernel
def _apart(here: Array, there: Array, size: int, apart: Array) -> int:
    """Write 0 for pairs of counted tokens and APART for others; returns the number of counted pairs."""
    number = 0
    for place in range(size):
        both = here[place] and there[place]
        apart[place] = 0 if both else APART
        number += both
    return number


@kernel
def _begin(here: Array, there: Array, apart: Array, size: int, alike: Array) -> None:
    """Write 1 for pairs of tokens with the same choice, plus what marks uncounted pairs."""
    for place in range(size):
        alike[place] = np.uint8(apart[place] + np.uint8(here[place] == there[place]))


@kernel
def _compare(here: Array, there: Array, after: Array, size: int, alike: Array) -> None:
    """Add 2 for each of two choices of the other token that equals this choice of a token."""
    for place in range(size):
        same = np.uint8(here[place] == there[place]) + np.uint8(here[place] == after[place])
        alike[place] = np.uint8(alike[place] + 2 * same)


@kernel
def _tally(alike: Array, size: int, pairs: int, count: Array) -> None:
    """Tally pairs by twice the number of shared experts, plus one for the same first choice; the rest share none."""
    left: Any = pairs
    for value in range(2, 2 * len(count)):
        wanted, number = np.uint8(value), np.uint32(0)
        for place in range(size):
            number = np.uint32(number + np.uint32(alike[place] == wanted))
        count[value >> 1, value & 1] += number
        left -= number
    count[0, 0] += left


@kernel
def _add_sets(expert: Array, counted: Array, lags: Array, pairs: Array, count: Array) -> None:
    """Count pairs if there are more experts, with each token's experts as a set of bits.

    64 experts and several layers are compared at once, in less than a tenth of the time of single comparisons
    (measured).
    """
    (rows, positions, layers, _), bins = expert.shape, 2 * count.shape[2]
    flat = count.reshape(len(lags), layers * bins)  # a view
    members = np.zeros((positions, _largest(expert, counted) // 64 + 1, layers), np.uint64)
    first, at = np.zeros((positions, layers), expert.dtype), np.empty(layers, np.int64)
    for row in range(rows):
        _set_members(expert[row], counted[row], members, first)
        for index in range(len(lags)):
            for position in range(lags[index], positions):
                before = position - lags[index]
                if not (counted[row, position] and counted[row, before]):
                    continue
                pairs[index] += 1
                one, other = first[before], first[position]
                for layer in range(layers):
                    at[layer] = bins * layer + (1 if one[layer] == other[layer] else 0)
                for word in range(members.shape[1]):
                    mine, others = members[before, word], members[position, word]
                    for layer in range(layers):
                        at[layer] += 2 * _bits(mine[layer] & others[layer])
                for layer in range(layers):
                    flat[index, at[layer]] += 1


@kernel
def _largest(expert: Array, counted: Array) -> int:
    """The largest expert of counted tokens; 0 if there is none."""
    rows, positions, layers, choices = expert.shape
    largest = 0
    for row in range(rows):
        for position in range(positions):
            if counted[row, position]:
                for layer in range(layers):
                    for k in range(choices):
                        largest = max(largest, expert[row, position, layer, k])
    return largest


@kernel
def _set_members(expert: Array, counted: Array, members: Array, first: Array) -> None:
    """A row's experts as bits (position, word, layer), and its first choices; no bit for tokens that are not
    counted."""
    positions, layers, choices = expert.shape
    for position in range(positions):
        members[position] = 0
        if counted[position]:
            for layer in range(layers):
                first[position, layer] = expert[position, layer, 0]
                for k in range(choices):
                    chosen = np.uint64(expert[position, layer, k])
                    members[position, chosen >> np.uint64(6), layer] |= np.uint64(1) << (chosen & np.uint64(63))


@kernel
def _bits(word: Any) -> Any:
    """How many of 64 bits are set (Warren, Hacker's Delight, section 5-1)."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))
