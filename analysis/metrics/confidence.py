"""The confidence of the routers: the first choice's weight, its margin over the second, and the entropy of the weights.

Promises: histograms and sums of integers, so the result does not depend on order. Weights are those in the store, as
the model used them: if the model does not renormalize, they do not add up to 1, and the first weight is a share over
all experts, chosen or not.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.load import WEIGHT_UNIT
from analysis.scanning import Array, Block, Reducer, State, kernel, labelled, scan, sizes

MEASURES = ("first", "margin", "entropy")
_HALF = np.nan_to_num(np.arange(2**16, dtype=np.uint16).view(np.float16), nan=0, posinf=0, neginf=0)
_UNITS = (_HALF.astype(np.float64) / WEIGHT_UNIT).astype(np.int64)  # for each float16, by its bits


class Confidence(Reducer):
    """Histograms by layer.

    Parameters
    ----------
    bins : int
        Number of bins of equal width: from 0 to 1 for weights and margins, from 0 to log2(k) bits for entropies.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(self, bins: int = 64) -> None:
        if bins < 1:
            raise ValueError(f"bins={bins}: must be at least 1")
        self.bins = bins

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: for each measure `…_count` (layer, bin), and `…_sum` (layer) in units of 2**-24."""
        layers = dataset.sizes["layer"]
        counts = {f"{name}_count": np.zeros((layers, self.bins), np.int64) for name in MEASURES}
        return {**counts, **{f"{name}_sum": np.zeros(layers, np.int64) for name in MEASURES}}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        value = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
        surprise = np.zeros_like(value)
        np.multiply(value, np.log2(value, where=value > 0, out=np.zeros_like(value)), out=surprise, where=value > 0)
        bits = block["weight"].view(np.uint16)
        if not _add(bits, block["counted"], value, surprise, self.bins, *state.values()):
            raise ValueError("a weight is not a finite number: the shard is damaged")

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Counts, and means; NaN if nothing was counted, and for the margin if k is 1."""
        choices, edges = sizes(dataset)[1], np.arange(self.bins) / self.bins
        found: dict[str, Any] = {}
        for name in MEASURES:
            count = xr.DataArray(state[f"{name}_count"], dims=("layer", "bin"))
            n = count.sum("bin")
            mean = xr.DataArray(state[f"{name}_sum"] * WEIGHT_UNIT, dims="layer") / n.where(n > 0)
            units = "bits" if name == "entropy" else "1"
            found[name] = count.assign_attrs(units="tokens")
            found[f"mean_{name}"] = mean.assign_attrs(units=units)
        coords = {
            "layer": dataset["layer"].values,
            "weight_from": ("bin", edges, {"long_name": "lower edge of the bins of `first` and `margin`"}),
            "entropy_from": ("bin", edges * np.log2(choices), {"units": "bits"}),
        }
        return described(
            xr.Dataset(found, coords),
            n=int(state["first_count"][:1].sum()),
            estimator="counts",
            null="none: there is no reference value for confidence",
            definition="first = w1; margin = w1 - w2; entropy of w / sum(w) in bits; values at or beyond the upper end"
            " are in the last bin",
            source="-",
        )


class MeanWeights(Reducer):
    """Sums of first weights and margins, by layer: two means of `Confidence`, small and fast enough for resampling.

    They take a tenth of its time, and a thirtieth when resampled 199 times (measured; integers, and no logarithm).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})
    stacks = True

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `first` and `margin` (layer), in units of 2**-24, and `tokens`."""
        return {name: np.zeros(dataset.sizes["layer"], np.int64) for name in ("first", "margin")} | {
            "tokens": np.zeros(1, np.int64)
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard; `analysis.metrics.load.Load` checks that weights are finite."""
        state["tokens"] += np.count_nonzero(block["counted"])
        _add_weights(block["weight"].view(np.uint16), block["counted"], _UNITS, state["first"], state["margin"])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Means; NaN if nothing was counted, and for the margin if k is 1."""
        tokens = labelled(state["tokens"][..., 0].astype(float))
        tokens = tokens.where(tokens > 0)
        found = {f"mean_{name}": labelled(state[name] * WEIGHT_UNIT, "layer") / tokens for name in ("first", "margin")}
        if dataset.sizes["k"] == 1:
            found["mean_margin"] = found["mean_margin"] * np.nan
        return described(
            xr.Dataset(found, coords={"layer": dataset["layer"].values}),
            n=int(state["tokens"].flat[0]),
            estimator="mean over tokens",
            null="none: there is no reference value for confidence",
            definition="mean_first = mean of w1; mean_margin = mean of w1 - w2",
            source="-",
        )


def router_confidence(dataset: xr.Dataset, *, bins: int = 64, threads: int | None = None) -> xr.Dataset:
    """Histograms of the confidence of each layer's router.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    bins : int
        Number of bins of equal width.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        `first`, `margin`, `entropy` int64 (layer, bin) in tokens, whose bins begin at `weight_from` and `entropy_from`;
        `mean_first`, `mean_margin`, `mean_entropy` float64 (layer). Nothing is counted for the margin if k is 1, or for
        the entropy of a token whose weights have a sum of 0 or less or include a negative one.

    Raises
    ------
    ValueError
        When a weight is not finite.
    """
    return scan(dataset, [Confidence(bins)], threads=threads)[0]


@kernel
def _add(
    bits: Array,
    counted: Array,
    value: Array,
    surprise: Array,
    bins: int,
    first: Array,
    margin: Array,
    entropy: Array,
    first_sum: Array,
    margin_sum: Array,
    entropy_sum: Array,
) -> bool:
    """Add tokens, given the value of each float16 and its w log2(w); False if a weight is not finite."""
    rows, positions, layers, choices = bits.shape
    units, most = 1 / WEIGHT_UNIT, np.log2(max(choices, 2))
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position]:
                continue
            for layer in range(layers):
                weights = bits[row, position, layer]
                total, spread, smallest = 0.0, 0.0, 0.0
                for k in range(choices):
                    weight = value[weights[k]]
                    total += weight
                    spread += surprise[weights[k]]
                    smallest = min(smallest, weight)
                if not np.isfinite(total):
                    return False
                largest = value[weights[0]]
                first[layer, _bin(largest, bins)] += 1
                first_sum[layer] += np.int64(largest * units)
                if choices > 1:
                    apart = largest - value[weights[1]]
                    margin[layer, _bin(apart, bins)] += 1
                    margin_sum[layer] += np.int64(apart * units)
                if total > 0 and smallest >= 0:
                    unsure = max(np.log2(total) - spread / total, 0.0) if choices > 1 else 0.0
                    entropy[layer, _bin(unsure / most, bins)] += 1
                    entropy_sum[layer] += np.int64(np.rint(unsure * units))
    return True


@kernel
def _bin(share: float, bins: int) -> int:
    return min(int(min(max(share, 0.0), 1.0) * bins), bins - 1)


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
