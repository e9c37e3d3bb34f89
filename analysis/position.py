"""Does an expert's load depend on where in its row a token stands? Load by position, in bins.

Promises exact counts. Position is that in the row: a document that was cut into windows begins again in each.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.information import association
from analysis.scan import Array, Block, Reducer, State, kernel, scan, sizes


class PositionLoad(Reducer):
    """Counts of choices by position.

    Parameters
    ----------
    bins : int
        Ranges of positions of equal length; the last may be shorter.
    """

    def __init__(self, bins: int = 32) -> None:
        if bins < 1:
            raise ValueError(f"bins={bins}: at least 1")
        self.bins = bins

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` (bin, layer, expert)."""
        layers, _, experts = sizes(dataset)
        width = self._width(dataset)
        return {"count": np.zeros((-(-dataset.sizes["position"] // width), layers, experts), dtype=np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        width = -(-block["counted"].shape[1] // self.bins)
        add_by_position(block["expert"], block["counted"], width, state["count"])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Load by range of positions, and what the position tells of the expert."""
        _, choices, experts = sizes(dataset)
        width, bias = self._width(dataset), (experts - choices) / (experts - 1)
        count = xr.DataArray(
            state["count"],
            dims=("start", "layer", "expert"),
            coords={
                "start": width * np.arange(len(state["count"])),
                "layer": dataset["layer"].values,
                "expert": np.arange(experts),
            },
        )
        total = count.sum("expert")
        return xr.Dataset(
            {
                "count": count.assign_attrs(units="choices"),
                "share": (count / total.where(total > 0)).assign_attrs(null=1 / experts),
                "mutual_information": association(count, "start", "expert", bias=bias)["corrected"],
            }
        ).assign_attrs(
            n=int(state["count"][:, :1].sum()) // choices,
            estimator="maximum likelihood; mutual information by Miller–Madow",
            null=1 / experts,
            positions_a_bin=width,
            definition="share of the choices of tokens in a range of positions; mutual information of range and expert",
            source="OpenMoE (Xue et al. 2024)",
        )

    def _width(self, dataset: xr.Dataset) -> int:
        return int(-(-dataset.sizes["position"] // self.bins))


def position_load(dataset: xr.Dataset, *, bins: int = 32, threads: int | None = None) -> xr.Dataset:
    """Load by position in the row.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    bins : int
        Ranges of positions of equal length.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        `count` int64 and `share` float64 (start, layer, expert), where `start` is a range's first position;
        `mutual_information` (layer) in bits, corrected, null 0. NaN where nothing was counted.
    """
    return scan(dataset, [PositionLoad(bins)], threads=threads)[0]


@kernel
def add_by_position(expert: Array, counted: Array, width: int, count: Array) -> None:
    """Count choices by expert, layer, and range of so many positions."""
    rows, positions, layers, choices = expert.shape
    for row in range(rows):
        for position in range(positions):
            if counted[row, position]:
                here = count[position // width]
                for layer in range(layers):
                    for k in range(choices):
                        here[layer, expert[row, position, layer, k]] += 1
