"""The mean weight of the first choice, and its margin over the second: sums so small that they can be resampled.

The same means as those of `analysis.confidence`, whose histograms a single count is better for. Promises sums of whole
numbers, exact in any order.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.load import WEIGHT_UNIT
from analysis.scan import Array, Block, Reducer, State, kernel, labelled

_HALF = np.nan_to_num(np.arange(2**16, dtype=np.uint16).view(np.float16), nan=0, posinf=0, neginf=0)
_UNITS = (_HALF.astype(np.float64) / WEIGHT_UNIT).astype(np.int64)  # of each float16, by its bits


class MeanWeights(Reducer):
    """Sums of first weights and margins, by layer."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})
    stacks = True

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `first` and `margin` (layer), in units of 2**-24, and `tokens`."""
        return {name: np.zeros(dataset.sizes["layer"], np.int64) for name in ("first", "margin")} | {
            "tokens": np.zeros(1, np.int64)
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard; that weights are finite is for `analysis.load.Load` to say."""
        state["tokens"] += np.count_nonzero(block["counted"])
        _add_weights(block["weight"].view(np.uint16), block["counted"], _UNITS, state["first"], state["margin"])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Means; NaN where nothing was counted, and of the margin where k is 1."""
        tokens = labelled(state["tokens"][..., 0].astype(float))
        tokens = tokens.where(tokens > 0)
        found = {f"mean_{name}": labelled(state[name] * WEIGHT_UNIT, "layer") / tokens for name in ("first", "margin")}
        if dataset.sizes["k"] == 1:
            found["mean_margin"] = found["mean_margin"] * np.nan
        return xr.Dataset(found, coords={"layer": dataset["layer"].values}).assign_attrs(
            n=int(state["tokens"].flat[0]),
            estimator="mean over tokens",
            null="none: a model is as sure as it is",
            definition="mean_first = mean of w1; mean_margin = mean of w1 - w2",
            source="-",
        )


@kernel
def _add_weights(bits: Array, counted: Array, units: Array, first: Array, margin: Array) -> None:
    rows, positions, layers, choices = bits.shape
    for row in range(rows):
        for position in range(positions):
            if counted[row, position]:
                for layer in range(layers):
                    largest = units[bits[row, position, layer, 0]]
                    first[layer] += largest
                    if choices > 1:
                        margin[layer] += largest - units[bits[row, position, layer, 1]]
