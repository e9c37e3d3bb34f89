"""Choices at any two layers, not only at neighbouring ones: the counts of `transitions` for given layers.

OLMoE's code can pair any two layers and publishes 0 with 7 and 7 with 15. Promises exact counts for all pairs in one
scan.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import Array, Block, Reducer, State, kernel, sizes

CONVENTIONS = ("all", "first", "rank")


class LayerPairs(Reducer):
    """Counts of pairs of one token's choices at two layers: the input of `transitions_of`.

    Parameters
    ----------
    layers : sequence of pair of int
        Pairs of layers (from, to), by the model's own numbers; also backwards.

    Raises
    ------
    ValueError
        When there is no pair, or an entry is not a pair; in a scan also when a layer was not captured.
    """

    def __init__(self, layers: Sequence[tuple[int, int]]) -> None:
        if not len(layers) or any(len(pair) != 2 for pair in layers):
            raise ValueError(f"layers={layers!r:.80}: must be pairs of layers, such as [(0, 15), (7, 31)]")
        self.layers = tuple((int(layer), int(next_layer)) for layer, next_layer in layers)

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: a table (pair, expert, next_expert) for each convention, and `tokens`; and the layers' `places`."""
        captured, experts = dataset["layer"].values.tolist(), sizes(dataset)[2]
        if unknown := sorted({layer for pair in self.layers for layer in pair} - set(captured)):
            raise ValueError(f"layers {unknown} were not captured; the capture has {captured}")
        shape = (len(self.layers), experts, experts)
        return {
            "tokens": np.zeros(1, np.int64),
            **{f"followed_{by}": np.zeros(shape, np.int64) for by in CONVENTIONS},
            "places": np.array([[captured.index(layer) for layer in pair] for pair in self.layers], np.int64),
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        state["tokens"] += np.count_nonzero(block["counted"])
        _add_pairs(block["expert"], block["counted"], state["places"], *(state[f"followed_{by}"] for by in CONVENTIONS))

    def merge(self, state: State, other: State) -> State:
        """Sums, except for the places, which are the same in both."""
        return super().merge(state, other) | {"places": state["places"]}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The counts, labelled: `followed_all`, `followed_first` and `followed_rank` int64."""
        experts, numbers = np.arange(sizes(dataset)[2]), np.array(self.layers)
        dims, names = ("pair", "expert", "next_expert"), [f"followed_{by}" for by in CONVENTIONS]
        return described(
            xr.Dataset(
                {name: (dims, state[name], {"units": "pairs of choices"}) for name in names},
                coords={
                    "pair": np.arange(len(numbers)),
                    "layer": ("pair", numbers[:, 0]),
                    "next_layer": ("pair", numbers[:, 1]),
                    "expert": experts,
                    "next_expert": experts,
                },
            ),
            n=int(state["tokens"][0]),
            estimator="counts",
            null="even tables",
            definition="pairs of one token's choices at layer and next_layer: all, the first ones, and those of equal"
            " rank",
            source="OLMoE's code, run_routing_analysis.py, which pairs equal ranks of any two layers",
        )


@kernel
def _add_pairs(expert: Array, counted: Array, places: Array, every: Array, first: Array, rank: Array) -> None:
    rows, positions, _, choices = expert.shape
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position]:
                continue
            for pair in range(len(places)):
                here, there = expert[row, position, places[pair, 0]], expert[row, position, places[pair, 1]]
                first[pair, here[0], there[0]] += 1
                for i in range(choices):
                    rank[pair, here[i], there[i]] += 1
                    for j in range(choices):
                        every[pair, here[i], there[j]] += 1
