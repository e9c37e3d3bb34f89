"""How much work each expert has: its share of the choices and of the gate's weight, layer by layer.

Promises: exact counts, and weights summed exactly in any order. Does not know about tokens or neighbours.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.scan import Array, Block, Reducer, State, kernel, scan, sizes

WEIGHT_UNIT = 2.0**-24  # every finite float16 is a whole multiple of its smallest subnormal


class Load(Reducer):
    """Counts of choices and sums of weights, by layer, choice and expert."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` and `mass` (layer, k, expert)."""
        layers, choices, experts = sizes(dataset)
        return {name: np.zeros((layers, choices, experts), dtype=np.int64) for name in ("count", "mass")}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        bits = block["weight"].view(np.uint16)
        if not _add_choices(block["expert"], bits, block["counted"], state["count"], state["mass"]):
            raise ValueError("a weight is not a finite number: the shard is damaged")

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Shares of choices and of weight; NaN where nothing was counted."""
        layers, _, experts = sizes(dataset)
        dims = ("layer", "k", "expert")
        count = xr.DataArray(state["count"], dims=dims)
        mass = xr.DataArray(state["mass"].sum(axis=1) * WEIGHT_UNIT, dims=("layer", "expert"))
        tokens = int(state["count"][0, 0].sum()) if layers else 0
        per_expert = count.sum("k")
        result = xr.Dataset(
            {
                "count": count.assign_attrs(long_name="times chosen, by rank of the choice", units="tokens"),
                "share": _share(per_expert).assign_attrs(long_name="share of choices"),
                "mass_share": _share(mass).assign_attrs(long_name="share of gate weight"),
            },
            coords={"layer": dataset["layer"].values, "expert": np.arange(experts)},
        )
        return result.assign_attrs(
            n=tokens,
            null=1 / experts,
            definition="share = N_e / (k T): choices of expert e over all choices of T tokens at a layer; "
            "mass_share = sum of e's weights / sum of all weights",
            source="OLMoE (Muennighoff et al. 2024), section 5; Switch Transformers (Fedus et al. 2022)",
        )


def expert_load(dataset: xr.Dataset, *, threads: int | None = None) -> xr.Dataset:
    """Share of the choices, and of the gate's weight, that each expert takes at each layer.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture; `weight` is read too.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        `count` int64 (layer, k, expert) in tokens, `share` and `mass_share` float64 (layer, expert), both
        summing to 1 over experts and NaN when no token was counted. Attribute `n`: tokens counted; `null`:
        the even share 1/E.
    """
    return scan(dataset, [Load()], threads=threads)[0]


def _share(amount: xr.DataArray) -> xr.DataArray:
    total = amount.sum("expert")
    return amount / total.where(total > 0)


@kernel
def _add_choices(expert: Array, weight_bits: Array, counted: Array, count: Array, mass: Array) -> bool:
    """Add choices and weights (float16 bits, read as multiples of 2**-24); False at NaN or infinity."""
    rows, positions, layers, choices = expert.shape
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position]:
                continue
            for layer in range(layers):
                for k in range(choices):
                    bits = np.int64(weight_bits[row, position, layer, k])
                    exponent, fraction = (bits >> 10) & 31, bits & 1023
                    if exponent == 31:
                        return False
                    units = fraction if exponent == 0 else (fraction + 1024) << (exponent - 1)
                    chosen = expert[row, position, layer, k]
                    count[layer, k, chosen] += 1
                    mass[layer, k, chosen] += -units if bits >> 15 else units
    return True
