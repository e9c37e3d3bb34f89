"""How data sets differ in which experts they use: where, by how much, and whether it is more than chance.

Two questions with two answers. How large is the difference? An interval from resampled documents. Could it be nothing?
A p-value from shuffling: if the label of a document meant nothing, how often would the difference be as large? The
shuffle keeps documents whole, for tokens of one document resemble each other.

Promises: constant memory, the same result in any order. Does not know which tokens carry a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.load import ExpertCounts, share_of_experts
from analysis.scanning import Array, scan
from analysis.statistics.resampling import Resampled, false_discovery, interval, p_value, poisson_weights, split_weights


def contrast(
    captures: Mapping[str, xr.Dataset],
    *,
    replicates: int = 500,
    level: float = 0.95,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How data sets differ, layer by layer and expert by expert.

    Parameters
    ----------
    captures : mapping of str to xr.Dataset
        Two or more captures of one model, by name.
    replicates : int
        Of the bootstrap, and of the shuffle.
    level : float
        Of the intervals.
    threads, progress
        See `analysis.scan`; progress is that of one capture after the other.

    Returns
    -------
    xr.Dataset
        float64. Over (layer): `divergence`, the Jensen–Shannon divergence in bits of the data sets' shares (Lin 1991;
        data sets weigh equally), which is too large by about `divergence_by_chance`, its mean after shuffling;
        `divergence_corrected`, without its bias, with the interval `divergence_low` to `divergence_high`, none below
        0; and `p`. Over (data_set, layer, expert): `share` of the data set's tokens that reach the expert,
        `difference` to the mean of the other data sets, with `difference_low`, `difference_high`, `difference_p`
        (two-sided) and `difference_q`, which is adjusted for all cells together (Benjamini–Hochberg). Over (data_set,
        other_data_set, layer): `total_variation`, half the sum of absolute differences of the shares of choices. NaN
        where a data set has no token that counts. Attribute `n`: each data set's tokens.

    Raises
    ------
    ValueError
        When there are fewer than two captures, or they have other layers or experts.
    """
    refuse_incomparable(captures)
    documents = {name: count_documents(capture) for name, capture in captures.items()}
    counts = {
        name: scan(capture, [contrast_counts(documents, name, replicates)], threads=threads, progress=progress)[0]
        for name, capture in captures.items()
    }
    return contrast_of(counts, documents, level=level)


def count_documents(capture: xr.Dataset) -> int:
    """Documents that have a row."""
    return int(np.unique(capture["document_id"].values).size)


def contrast_counts(documents: Mapping[str, int], name: str, replicates: int = 500) -> Resampled:
    """What is to be counted of one data set of a contrast; `documents` of each, in the contrast's order."""
    edges = np.concatenate([[0.0], np.cumsum(list(documents.values())) / max(1, sum(documents.values()))])
    # Another seed for each data set: its documents have the same numbers as the others'.
    weights = partial(_weights, edges=edges.tolist(), seed=list(documents).index(name) + 1)
    return Resampled(ExpertCounts(), replicates * (1 + len(documents)), weights)


def contrast_of(counts: Mapping[str, xr.Dataset], documents: Mapping[str, int], *, level: float = 0.95) -> xr.Dataset:
    """`contrast` from what was counted of each data set."""
    names, choices = list(counts), next(iter(counts.values())).attrs["experts_per_token"]
    by_name = xr.DataArray(names, dims="data_set", name="data_set")
    each = xr.concat([found["count"] for found in counts.values()], by_name)
    replicates = (each.sizes["replicate"] - 1) // (1 + len(names))
    resampled = each.isel(replicate=slice(0, replicates + 1))
    # Replicate 0 are the data sets as they are; then what falls on each side, from all of them.
    sides = [each.isel(replicate=slice(n * replicates + 1, (n + 1) * replicates + 1)) for n in range(1, 1 + len(names))]
    alike = {"replicate": np.arange(1, replicates + 1)}
    relabelled = xr.concat([side.sum("data_set").assign_coords(alike) for side in sides], by_name)
    own = resampled.isel(replicate=slice(0, 1))
    by_chance = xr.concat([own, relabelled], "replicate")

    # A divergence of samples is too large by what sampling adds, and one of resampled samples by that once more.
    of_resampled = _divergence(resampled)
    bias = of_resampled.isel(replicate=slice(1, None)).mean("replicate") - of_resampled.isel(replicate=0, drop=True)
    divergence = interval(of_resampled, level)
    reach = interval(_difference(resampled) * choices, level)
    p = p_value(abs(_difference(by_chance)))
    share = share_of_experts(own.isel(replicate=0, drop=True))
    apart = abs(share - share.rename(data_set="other_data_set")).sum("expert", skipna=False) / 2
    return described(
        xr.Dataset(
            {
                "divergence": divergence["estimate"].assign_attrs(units="bits"),
                "divergence_corrected": (divergence["estimate"] - bias).clip(0),
                "divergence_low": (divergence["low"] - 2 * bias).clip(0),
                "divergence_high": (divergence["high"] - 2 * bias).clip(0),
                "divergence_by_chance": _divergence(by_chance).isel(replicate=slice(1, None)).mean("replicate"),
                "p": p_value(_divergence(by_chance)),
                "share": (share * choices).assign_attrs(
                    long_name="share of the data set's tokens that reach the expert"
                ),
                "difference": reach["estimate"],
                "difference_low": reach["low"],
                "difference_high": reach["high"],
                "difference_p": p,
                "difference_q": false_discovery(p),
                "total_variation": apart,
            }
        ),
        n={name: found.attrs["n"] for name, found in counts.items()},
        documents=dict(documents),
        replicates=replicates,
        level=level,
        null=0.0,
        estimator="plug-in; intervals: Poisson bootstrap over documents; p: documents shuffled between data sets",
        definition="divergence = H(mean of the data sets' shares) - mean of their H; difference = share of the data"
        " set's tokens that reach the expert - mean of the others'",
        source="Lin 1991 (Jensen–Shannon); SteerMoE (risk difference)",
    )


def _weights(document: Array, replicates: int, *, edges: Sequence[float], seed: int) -> Array:
    """The bootstrap's weights, then for each side whether a document falls on it."""
    each = replicates // len(edges)
    sides = [split_weights(document, each, low, high, seed)[1:] for low, high in pairwise(edges)]
    return np.concatenate([poisson_weights(document, each), *sides])


def refuse_incomparable(captures: Mapping[str, xr.Dataset]) -> None:
    """Refuse fewer than two captures, and those of other layers, experts or choices."""
    if len(captures) < 2:
        raise ValueError(f"{len(captures)} captures: a contrast needs two or more")
    [first, one], *others = captures.items()
    for name, other in others:
        here, there = (
            (each["layer"].values.tolist(), int(each.attrs["num_experts"]), each.sizes["k"]) for each in (one, other)
        )
        if here != there:
            raise ValueError(f"{first} and {name} are not of one model: (layers, E, k) = {here} and {there}")


def _divergence(count: xr.DataArray) -> xr.DataArray:
    """Jensen–Shannon, in bits, over `data_set`."""

    def bits(share: xr.DataArray) -> xr.DataArray:
        return -(share * np.log2(share.where(share > 0))).sum("expert").where(share.notnull().all("expert"))

    share = share_of_experts(count)
    mean = share.mean("data_set", skipna=False)
    return bits(mean) - bits(share).mean("data_set", skipna=False)


def _difference(count: xr.DataArray) -> xr.DataArray:
    """Of each data set's shares of choices from the mean of the others'."""
    share = share_of_experts(count)
    sets = share.sizes["data_set"]
    return (share - share.mean("data_set")) * (sets / (sets - 1))
