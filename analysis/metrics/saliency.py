"""How much each expert contributes: its weight times the norm of its output, over the tokens that choose it.

Needs a capture with `--record output_norm`, and weights. The mean is the criterion by which REAP prunes experts. The
maximum is similar to the criterion for Super Experts, which is the largest single element of an output, not its norm.
Both papers use one calibration text; here every data set has its own numbers, and intervals over its documents show
which part of the order of experts would hold for another text.

Promises: sums of integers, so the result does not depend on order. Does not know which experts can be removed.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import Array, Block, Reducer, State, kernel, labelled, scan, sizes
from analysis.statistics.jackknife import Jackknife, with_intervals

UNIT = 2.0**-20  # norms and products are multiples of it, so that sums are exact up to 8.8e12
SOURCE = "REAP: Lasby et al. 2025, arXiv 2510.13999; Super Experts: Su et al. 2025, arXiv 2507.23279"
DEFINITION = (
    "saliency of an expert at a token = its weight × L2 norm of its output before weighting; over the tokens that"
    " choose the expert"
)


CELL = ("layer", "expert")
NOT_FINITE = "a weight or an output's norm is not a finite number: the shard is damaged"


class Saliency(Reducer):
    """Sums of saliencies and norms, and tokens, by layer and expert."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "output_norm"})
    stacks = True

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros (layer, expert): `saliency` and `norm` in units of 2**-20, and `tokens`."""
        layers, _, experts = sizes(dataset)
        return {name: np.zeros((layers, experts), np.int64) for name in ("saliency", "norm", "tokens")}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        if not _add(*_arrays(block), *state.values()):
            raise ValueError(NOT_FINITE)

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Means, NaN if no token chose the expert; totals; shares of a layer's total."""
        tokens, total, norm = (labelled(state[name], *CELL) for name in ("tokens", "saliency", "norm"))
        reached, of_layer = tokens.where(tokens > 0), total.sum("expert")
        found = {
            "mean_saliency": (total * UNIT / reached).assign_attrs(amount="tokens"),
            "mean_norm": (norm * UNIT / reached).assign_attrs(amount="tokens"),
            "total_saliency": total * UNIT,
            "share": (total / of_layer.where(of_layer > 0)).assign_attrs(null=1 / tokens.sizes["expert"]),
            "tokens": tokens.assign_attrs(units="tokens"),
        }
        coords = {"layer": dataset["layer"].values, "expert": np.arange(tokens.sizes["expert"])}
        return described(
            xr.Dataset(found, coords),
            n=int(state["tokens"].reshape(-1, *tokens.shape[-2:])[0, :1].sum()) // dataset.sizes["k"],
            estimator="mean over tokens",
            null="none for contributions; for the share an even one, 1/E",
            definition=f"{DEFINITION}; share = an expert's total over its layer's",
            source=SOURCE,
        )


class LargestSaliency(Reducer):
    """The largest saliency and the largest norm by layer and expert."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight", "output_norm"})

    def init(self, dataset: xr.Dataset) -> State:
        """The bits of −1 (layer, expert), which is below every norm: `saliency` and `norm`; and `tokens` (1)."""
        layers, _, experts = sizes(dataset)
        none = np.full((layers, experts), -1.0).view(np.int64)
        return {"saliency": none, "norm": none.copy(), "tokens": np.zeros(1, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Compare with one shard."""
        state["tokens"] += np.count_nonzero(block["counted"])
        largest = state["saliency"].view(np.float64), state["norm"].view(np.float64)
        if not _keep_largest(*_arrays(block), *largest):
            raise ValueError(NOT_FINITE)

    def merge(self, state: State, other: State) -> State:
        """The larger values of both."""
        found: State = {"tokens": state["tokens"] + other["tokens"]}
        for name in ("saliency", "norm"):
            both = (each[name].view(np.float64) for each in (state, other))
            found[name] = np.maximum(*both).view(np.int64)
        return found

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The largest values, NaN if no token chose the expert."""
        found = {
            f"largest_{name}": labelled(np.where((value := state[name].view(np.float64)) < 0, np.nan, value), *CELL)
            for name in ("saliency", "norm")
        }
        coords = {"layer": dataset["layer"].values, "expert": np.arange(sizes(dataset)[2])}
        return described(
            xr.Dataset(found, coords),
            n=int(state["tokens"][0]),
            estimator="maximum",
            null="none: it grows with the number of tokens",
            definition=f"{DEFINITION}: the largest, and the largest norm",
            source=SOURCE,
        )


def saliency(dataset: xr.Dataset, *, level: float = 0.95, threads: int | None = None) -> xr.Dataset:
    """How much each expert contributes at each layer: weight × output norm, over the tokens that choose it.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture with weights and the norms of the experts' outputs.
    level : float
                Level of the intervals.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        See `saliency_of`.

    Raises
    ------
    ValueError
        When the capture has no norms or weights, or one of them is not finite.
    """
    found = scan(dataset, [Jackknife(Saliency()), LargestSaliency()], threads=threads)
    return saliency_of(*found, level=level)


def saliency_of(sums: xr.Dataset, largest: xr.Dataset, *, level: float = 0.95) -> xr.Dataset:
    """How much each expert contributes, from the counts of `Jackknife(Saliency())` and `LargestSaliency()`.

    Parameters
    ----------
    sums : xr.Dataset
        From `analysis.Jackknife` of `analysis.Saliency`.
    largest : xr.Dataset
        From `analysis.LargestSaliency`, for the same tokens.
    level : float
        Level of the intervals.

    Returns
    -------
    xr.Dataset
        Over (layer, expert), float64, NaN if no token chose the expert: `mean_saliency`, of weight × norm, with the
        ends `mean_saliency_low` and `mean_saliency_high` of its interval over documents; `total_saliency`, the sum;
        `largest_saliency`, the maximum; `share` of the layer's total, null 1/E; `mean_norm`, with `_low` and `_high`,
        and `largest_norm`, of the norms alone. `tokens` int64 that chose the expert. An interval is NaN if these come
        from fewer than `MIN_EFFECTIVE_DOCUMENTS` effective documents.
    """
    found = with_intervals(sums, level=level)
    return found.assign(largest.data_vars)


def _arrays(block: Block) -> tuple[Array, Array, Array, Array]:
    """Experts, weights and norms of a block, and its counted tokens; kernels have no float16."""
    return block["expert"], block["weight"].astype(np.float32), block["output_norm"], block["counted"]


@kernel
def _add(
    expert: Array, weight: Array, norm: Array, counted: Array, saliency: Array, norms: Array, tokens: Array
) -> bool:
    """Add tokens; False if a number is not finite."""
    rows, positions, layers, choices = expert.shape
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position]:
                continue
            for layer in range(layers):
                for k in range(choices):
                    own = np.float64(norm[row, position, layer, k])
                    product = own * weight[row, position, layer, k]
                    if not np.isfinite(product):
                        return False
                    chosen = expert[row, position, layer, k]
                    saliency[layer, chosen] += np.int64(np.rint(product / UNIT))
                    norms[layer, chosen] += np.int64(np.rint(own / UNIT))
                    tokens[layer, chosen] += 1
    return True


@kernel
def _keep_largest(expert: Array, weight: Array, norm: Array, counted: Array, saliency: Array, norms: Array) -> bool:
    """Keep the larger values; False if a number is not finite."""
    rows, positions, layers, choices = expert.shape
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position]:
                continue
            for layer in range(layers):
                for k in range(choices):
                    own = np.float64(norm[row, position, layer, k])
                    product = own * weight[row, position, layer, k]
                    if not np.isfinite(product):
                        return False
                    chosen = expert[row, position, layer, k]
                    saliency[layer, chosen] = max(saliency[layer, chosen], product)
                    norms[layer, chosen] = max(norms[layer, chosen], own)
    return True
