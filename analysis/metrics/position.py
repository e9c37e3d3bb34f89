"""Does an expert's load depend on the position in the row? Load by ranges of positions.

Promises exact counts. Positions are those in the row: for a document that was split into windows, they start again in
each.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.load import Bins, ExpertCounts, share_of_experts
from analysis.scanning import scan
from analysis.statistics.information import association


def position_load(dataset: xr.Dataset, *, bins: Bins = 32, threads: int | None = None) -> xr.Dataset:
    """Load by position in the row.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    bins : int or "doubling"
        See `analysis.ExpertCounts`.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        See `position_load_of`.
    """
    return position_load_of(scan(dataset, [ExpertCounts(bins)], threads=threads)[0])


def position_load_of(counts: xr.Dataset) -> xr.Dataset:
    """Load by position, and how much the position says about the expert, from the counts of `ExpertCounts`.

    Parameters
    ----------
    counts : xr.Dataset
        From `analysis.ExpertCounts` with ranges of positions.

    Returns
    -------
    xr.Dataset
        `counts` int64 and `share` float64 (start, layer, expert), where `start` is a range's first position;
        `mutual_information` float64 (layer) in bits, minus the value expected by chance, null 0; `by_chance_high`
        float64 (layer), the value that it exceeds one time in 20 if tokens are independent of each other and of their
        positions. NaN if nothing was counted. Different words occur at different positions:
        `analysis.position_information` removes that effect.
    """
    count, experts, choices = counts["counts"], counts.sizes["expert"], counts.attrs["experts_per_token"]
    found = association(count, "start", "expert", bias=(experts - choices) / (experts - 1))
    return described(
        xr.Dataset(
            {
                "counts": count,
                "share": share_of_experts(count).assign_attrs(null=1 / experts),
                "mutual_information": found["corrected"],
                "by_chance_high": found["null_information_high"] - found["null_information"],
            }
        ),
        n=counts.attrs["n"],
        estimator="maximum likelihood; mutual information minus its null (see analysis.association)",
        null=1 / experts,
        ranges=counts.attrs["ranges"],
        definition="share of the choices of tokens in a range of positions; mutual information of range and expert",
        source="OpenMoE (Xue et al. 2024)",
    )


def dependent_experts(load: xr.Dataset, top: int = 6) -> xr.Dataset:
    """The experts whose load depends on the position most.

    Parameters
    ----------
    load : xr.Dataset
        From `position_load`.
    top : int
        Number of experts to list, over all layers.

    Returns
    -------
    xr.Dataset
        Over (place): `layer` and `expert` int64; `information` float64, their contribution to their layer's mutual
        information, in bits. Over (place, start): `times` float64, the expert's share of the choices at these positions
        over its overall share, null 1; `tokens` int64 (place, start), the tokens there. NaN if nothing was counted.
    """
    count = load["counts"].transpose("layer", "expert", "start")
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
    return described(
        xr.Dataset(
            {
                "layer": ("place", load["layer"].values[layer]),
                "expert": ("place", load["expert"].values[expert]),
                "information": ("place", flat[order], {"units": "bits"}),
                "times": (("place", "start"), times.values[layer, expert], {"null": 1.0}),
                "tokens": (("place", "start"), np.rint(choices.values[layer] / max(1.0, float(k))).astype(np.int64)),
            },
            coords={"place": np.arange(1, len(order) + 1), "start": load["start"].values},
        ),
        n=load.attrs["n"],
        estimator="maximum likelihood",
        null=1.0,
        definition="times = P(expert | range of positions) / P(expert); information = Σ over ranges of P(range, expert)"
        " · log2(times), over chosen experts",
        source="OpenMoE (Xue et al. 2024)",
    )
