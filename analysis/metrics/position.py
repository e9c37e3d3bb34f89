"""Does an expert's load depend on where in its row a token stands? Load by position, in ranges.

Promises exact counts. Position is that in the row: a document that was cut into windows begins again in each.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import xarray as xr

from analysis.metrics.load import count_experts
from analysis.scan import Block, Reducer, State, scan, sizes
from analysis.statistics.information import association

Bins = int | Literal["doubling"]


class PositionLoad(Reducer):
    """Counts of choices by position.

    Parameters
    ----------
    bins : int or "doubling"
        How many ranges of positions of equal length, the last of which may be shorter; or ranges that double, 0, 1,
        2–3, 4–7 and so on, which show what is special about a row's first tokens.
    """

    def __init__(self, bins: Bins = 32) -> None:
        if bins != "doubling" and bins < 1:
            raise ValueError(f"bins={bins}: at least 1")
        self.bins = bins

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` (range, layer, expert)."""
        layers, _, experts = sizes(dataset)
        return {"count": np.zeros((len(self._starts(dataset.sizes["position"])), layers, experts), dtype=np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        expert, counted = block["expert"], block["counted"]
        starts = self._starts(counted.shape[1])
        for index, (start, stop) in enumerate(pairwise([*starts, counted.shape[1]])):
            count_experts(expert[:, start:stop], counted[:, start:stop], state["count"][index])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Load by range of positions, and what the position tells of the expert."""
        _, choices, experts = sizes(dataset)
        starts, bias = self._starts(dataset.sizes["position"]), (experts - choices) / (experts - 1)
        count = xr.DataArray(
            state["count"],
            dims=("start", "layer", "expert"),
            coords={
                "start": starts,
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
            ranges="of doubling length" if self.bins == "doubling" else "of equal length",
            definition="share of the choices of tokens in a range of positions; mutual information of range and expert",
            source="OpenMoE (Xue et al. 2024)",
        )

    def _starts(self, positions: int) -> list[int]:
        """The first position of each range."""
        if self.bins == "doubling":
            return [start for start in (0, *(2**power for power in range(32))) if start < positions]
        return list(range(0, positions, -(-positions // self.bins)))


def position_load(dataset: xr.Dataset, *, bins: Bins = 32, threads: int | None = None) -> xr.Dataset:
    """Load by position in the row.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    bins : int or "doubling"
        See `PositionLoad`.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        `count` int64 and `share` float64 (start, layer, expert), where `start` is a range's first position;
        `mutual_information` (layer) in bits, corrected, null 0. NaN where nothing was counted.
    """
    return scan(dataset, [PositionLoad(bins)], threads=threads)[0]


def dependent_experts(load: xr.Dataset, top: int = 6) -> xr.Dataset:
    """The experts whose load depends on the position most.

    Parameters
    ----------
    load : xr.Dataset
        From `position_load`.
    top : int
        Experts listed, of all layers together.

    Returns
    -------
    xr.Dataset
        Over `rank`: `layer` and `expert`; `information` float64, what they contribute to their layer's mutual
        information, in bits. Over (rank, start): `times` float64, the expert's share of the choices at these positions
        over its share at all, null 1; `tokens` int64 (rank, start), the tokens there. NaN where nothing was counted.
    """
    count = load["count"].transpose("layer", "expert", "start")
    choices = count.sum("expert")
    of_expert = count.sum("start")
    share = of_expert / of_expert.sum("expert").where(choices.sum("start") > 0)
    times = count / choices.where(choices > 0) / share.where(share > 0)
    surprise = np.log2(times.where(times > 0))
    information = (count * surprise).sum("start") / choices.sum("start").where(choices.sum("start") > 0)
    flat = information.fillna(0.0).values.ravel()
    order = np.argsort(-flat, kind="stable")[:top]
    layer, expert = np.unravel_index(order, information.shape)
    k = count.sum() / max(1, load.attrs["n"]) / load.sizes["layer"]
    return xr.Dataset(
        {
            "layer": ("rank", load["layer"].values[layer]),
            "expert": ("rank", load["expert"].values[expert]),
            "information": ("rank", flat[order], {"units": "bits"}),
            "times": (("rank", "start"), times.values[layer, expert], {"null": 1.0}),
            "tokens": (("rank", "start"), np.rint(choices.values[layer] / max(1.0, float(k))).astype(np.int64)),
        },
        coords={"rank": np.arange(1, len(order) + 1), "start": load["start"].values},
    ).assign_attrs(
        n=load.attrs["n"],
        estimator="maximum likelihood",
        null=1.0,
        definition="times = P(expert | range of positions) / P(expert); information = Σ over ranges of P(range, expert)"
        " · log2(times), by which experts are chosen",
        source="OpenMoE (Xue et al. 2024)",
    )
