"""How data sets differ in their use of experts: where, by how much, and whether it is more than chance.

The compared quantity is the share of a data set's tokens that choose an expert. Documents are the units, because tokens
of one document resemble each other. Data sets may have documents of different lengths, in different numbers, and with
different variability, so labels of documents cannot be shuffled: they are not exchangeable, even if the shares are
equal. Instead, each difference is divided by its own standard error over documents, and the largest of these statistics
is compared with that of drawn documents, which have each data set's own lengths and spread around one common share
(`analysis.statistics.overdispersion`). That largest statistic also gives simultaneous intervals for all true
differences, which remain valid for a difference that was selected for its size (Westfall & Young 1993).

Promises: constant memory, the same result in any order. Does not know which tokens contribute to a difference. See
`docs/design/0010-inference.md` for simulations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.load import ExpertCounts, share_of_experts
from analysis.scanning import EVERYTHING, Array, Selection, scan
from analysis.statistics.differences import (
    Differences,
    by_chance,
    p_adjusted,
    p_by_layer,
    quantile_of_largest,
)
from analysis.statistics.jackknife import MIN_EFFECTIVE_DOCUMENTS, Jackknife, effective_documents, left_out
from analysis.statistics.overdispersion import Units, units_of
from store import attributes, model_differences

REPLICATES = 999  # drawn sets of documents; raised if needed for a single layer to be significant after adjustment
REPLICATES_A_LAYER = 20


def contrast(
    captures: Mapping[str, xr.Dataset],
    *,
    replicates: int = REPLICATES,
    level: float = 0.95,
    block_tokens: int | None = None,
    only: Selection = EVERYTHING,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How data sets differ, layer by layer and expert by expert.

    Parameters
    ----------
    captures : mapping of str to xr.Dataset
        Two or more captures of one model, by name. A text that is one document can only be tested in blocks.
    replicates : int
        Number of drawn sets of documents, at least 20 per layer.
    level : float
        Level of the intervals.
    block_tokens : int, optional
        Use blocks of so many tokens instead of documents: see `Jackknife`.
    only, threads, progress
        See `analysis.scan`; progress is reported for one capture after the other.

    Returns
    -------
    xr.Dataset
        float64. Over (layer): `divergence`, the Jensen–Shannon divergence in bits of the data sets' shares of choices
        (Lin 1991; data sets have equal weights), which is about `divergence_by_chance` if all have the same shares;
        `divergence_corrected`, corrected for bias, with the interval `divergence_low` to `divergence_high`, all at
        least 0; and `p`, the p-value of the largest studentized difference of two data sets at the layer. Over
        (data_set, layer, expert): `share` of the data set's tokens that choose the expert; `difference` from the mean
        of the other data sets, with the interval `difference_low` to `difference_high`, and `difference_p`. Over
        (data_set, other_data_set, layer, expert): `pairwise_difference` of two data sets, with `pairwise_low` and
        `pairwise_high`. Over (data_set, other_data_set, layer): `total_variation`, half the sum of absolute differences
        of the shares of choices.

        Intervals of differences hold simultaneously over data sets, layers and experts, and `difference_p` is adjusted
        for all of them (single-step max-T, Westfall & Young 1993), so the largest of many may be selected. NaN if a
        data set has no counted token. A data set with fewer than `MIN_EFFECTIVE_DOCUMENTS` effective documents (Kish
        1965) has shares and differences, but is excluded from tests, intervals, and the mean of the others; attribute
        `untested` names it with the reason. Attribute `models_differ` says how the captures' models differ, for example
        in quantization: then differences are not only due to the texts. Attributes `n`: each data set's tokens;
        `documents` and `effective_documents` of each.

    Raises
    ------
    ValueError
        When there are fewer than two captures, or they have different layers or experts.
    """
    refuse_incomparable(captures)
    asked = [Jackknife(ExpertCounts(), block_tokens=block_tokens)]
    counts = {
        name: scan(capture, asked, only=only, threads=threads, progress=progress)[0]
        for name, capture in captures.items()
    }
    return contrast_of(counts, replicates=replicates, level=level, threads=threads).assign_attrs(
        models_differ=models_differ(captures)
    )


def contrast_of(
    counts: Mapping[str, xr.Dataset], *, replicates: int = REPLICATES, level: float = 0.95, threads: int | None = None
) -> xr.Dataset:
    """`contrast` from the counts of `Jackknife(ExpertCounts())` for each data set."""
    if not 0 < level < 1 or replicates < 1:
        raise ValueError(f"level={level}, replicates={replicates}: must be between 0 and 1, and at least 1")
    names, first = list(counts), next(iter(counts.values()))
    choices, layers = int(first.attrs["experts_per_token"]), first.sizes["layer"]
    replicates = max(replicates, REPLICATES_A_LAYER * layers)
    untested = {name: reason for name, found in counts.items() if (reason := why_untested(found))}
    tested = [index for index, name in enumerate(names) if name not in untested]
    units = {index: units_of(counts[names[index]]) for index in tested}
    share = np.stack([_shares(found)[0] for found in counts.values()]) * choices  # (data_set, layer, expert)
    variance = np.full(share.shape, np.nan)
    for index, own in units.items():
        variance[index] = [layer.variance for layer in own]
    others = other_sets(len(names), tested)
    apart, pairs = Differences(others, share, variance), Differences(_pairs(len(names)), share, variance)
    of_tested = others[tested][:, tested]
    pairwise, from_others, divergence = _chance(list(units.values()), of_tested, choices, layers, replicates, threads)
    labels = {"data_set": names, "layer": first["layer"].values, "expert": first["expert"].values}
    cell, pair = ("data_set", "layer", "expert"), ("data_set", "other_data_set", "layer", "expert")
    low, high = apart.ends(quantile_of_largest(from_others, level))
    pairwise_low, pairwise_high = pairs.ends(quantile_of_largest(pairwise, level))
    part = xr.DataArray(share / choices, dims=cell)
    total_variation = abs(part - part.rename(data_set="other_data_set")).sum("expert", skipna=False) / 2
    result = xr.Dataset(
        {
            **_divergences(counts, tested, level),
            "divergence_by_chance": ("layer", divergence),
            "p": ("layer", p_by_layer(abs(pairs.statistic), pairwise)),
            "share": (cell, share, {"long_name": "share of the data set's tokens that choose the expert"}),
            "difference": (cell, apart.estimate),
            "difference_low": (cell, low),
            "difference_high": (cell, high),
            "difference_p": (cell, p_adjusted(abs(apart.statistic), from_others)),
            "pairwise_difference": (pair, pairs.estimate),
            "pairwise_low": (pair, pairwise_low),
            "pairwise_high": (pair, pairwise_high),
            "total_variation": total_variation,
        },
        {**labels, "other_data_set": names},
    )
    return described(
        result,
        n={name: int(found.attrs["n"]) for name, found in counts.items()},
        documents={name: int(found.attrs["documents"]) for name, found in counts.items()},
        effective_documents={name: round(effective_documents(left_out(found)), 1) for name, found in counts.items()},
        untested=untested,
        replicates=replicates,
        level=level,
        null=0.0,
        estimator="plug-in; differences: simultaneous intervals and max-T p-values over documents, from drawn documents"
        " of each data set's lengths and spread; divergence: jackknife over documents",
        definition="divergence = H(mean of the data sets' shares) - mean of their H; difference = share of the data"
        " set's tokens that choose the expert - mean of the others'",
        source="Lin 1991 (Jensen–Shannon); Westfall & Young 1993 (max-T); SteerMoE (risk difference)",
    )


def why_untested(found: xr.Dataset) -> str:
    """Why a data set is excluded from tests and intervals, in words; empty if it is not."""
    tokens = left_out(found)
    if not tokens.size:
        return "it has no counted token"
    if found.attrs["documents"] == 1 or len(tokens) == 1:
        return "it is one document, which cannot be tested unless block_tokens divides it into blocks"
    effective = effective_documents(tokens)
    if effective < MIN_EFFECTIVE_DOCUMENTS:
        return (
            f"{found.attrs['documents']} documents of unequal length, worth {effective:.1f} equal ones: a test needs"
            f" at least {MIN_EFFECTIVE_DOCUMENTS:.0f}"
        )
    return ""


def models_differ(captures: Mapping[str, xr.Dataset]) -> dict[str, str]:
    """How captures differ from the first one apart from the texts, by name; empty if all are of one model."""
    provenance = {name: attributes(capture) for name, capture in captures.items()}
    first = next(iter(provenance.values()))
    return {name: differ for name, other in provenance.items() if (differ := differences_in_words(first, other))}


def differences_in_words(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """How the models of two captures differ, from their attributes, with both values; empty if they do not."""
    differ = model_differences(one, other)
    return "; ".join(f"{field} is {_plain(here)} and {_plain(there)}" for field, (here, there) in differ.items())


def _plain(value: Any) -> Any:
    """A value as written in a sentence: lists of experts separated by commas."""
    return (", ".join(map(str, value)) or "nothing") if isinstance(value, list | tuple) else value


def refuse_incomparable(captures: Mapping[str, xr.Dataset]) -> None:
    """Raise for fewer than two captures, or for different layers, experts or choices."""
    if len(captures) < 2:
        raise ValueError(f"{len(captures)} captures: a contrast needs at least two")
    [first, one], *others = captures.items()
    for name, other in others:
        here, there = (
            (each["layer"].values.tolist(), int(each.attrs["num_experts"]), each.sizes["k"]) for each in (one, other)
        )
        if here != there:
            raise ValueError(f"{first} and {name} are from different models: (layers, E, k) = {here} and {there}")


def _chance(
    units: Sequence[Sequence[Units]], others: Array, choices: int, layers: int, replicates: int, threads: int | None
) -> tuple[Array, Array, Array]:
    """The results of drawn documents: the largest statistics (layer, replicate), for pairs, and for one data set and
    the mean of the others, which are empty if fewer than two data sets are tested; and the mean divergence (layer)."""
    if len(units) < 2:
        return np.zeros((0, 0)), np.zeros((0, 0)), np.full(layers, np.nan)

    def of_layer(layer: int) -> tuple[Array, Array, float]:
        chance = by_chance([own[layer] for own in units], others, choices, replicates, layer)
        divergence = _divergence(chance.share / chance.share.sum(-1, keepdims=True))
        return chance.pairwise, chance.from_others, float(divergence.mean())

    with ThreadPoolExecutor(max(1, threads or os.cpu_count() or 1)) as pool:
        pairwise, from_others, divergence = zip(*pool.map(of_layer, range(layers)), strict=True)
    return np.array(pairwise), np.array(from_others), np.array(divergence)


def other_sets(sets: int, tested: list[int]) -> Array:
    """Weights of each data set minus the mean of the other tested ones, or of all others if none is tested."""
    weights = np.eye(sets)
    for own in range(sets):
        others = [index for index in tested if index != own] or [index for index in range(sets) if index != own]
        weights[own, others] = -1 / len(others)
    return weights


def _pairs(sets: int) -> Array:
    """Weights of each data set minus each other one: (data_set, data_set, data_set)."""
    one = np.eye(sets)
    return one[:, None] - one[None, :]


def _shares(found: xr.Dataset) -> Array:
    """Shares of choices, float64 (replicate, layer, expert)."""
    return share_of_experts(found["counts"]).transpose("replicate", "layer", "expert").values


def _divergences(counts: Mapping[str, xr.Dataset], tested: list[int], level: float) -> dict[str, Any]:
    """The divergence, corrected for bias, and its interval: each data set's units are left out in turn."""
    from scipy.special import stdtrit

    shares = [_shares(found) for found in counts.values()]
    whole = _divergence(np.stack([each[0] for each in shares]))
    bias, variance, of_degrees = (np.zeros(whole.shape) for _ in range(3))
    for own, found in enumerate(counts.values()):
        if own not in tested:
            bias, variance = bias * np.nan, variance * np.nan
            continue
        units = found.sizes["replicate"] - 1
        replicates = np.stack(
            [np.broadcast_to(each[0], shares[own][1:].shape) if n != own else each[1:] for n, each in enumerate(shares)]
        )
        left = _divergence(replicates)  # (unit, layer)
        bias += (units - 1) * (left.mean(0) - whole)
        found_here = ((left - whole) ** 2).sum(0) * (units - 1) / units
        variance += found_here
        of_degrees += found_here**2 / (effective_documents(left_out(found)) - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        degrees = np.where(of_degrees > 0, variance**2 / of_degrees, 1.0)  # Welch (1947)
    reach = stdtrit(degrees, (1 + level) / 2) * np.sqrt(variance)
    return {
        "divergence": ("layer", whole, {"units": "bits"}),
        "divergence_corrected": ("layer", np.maximum(whole - bias, 0)),
        "divergence_low": ("layer", np.maximum(whole - bias - reach, 0)),
        "divergence_high": ("layer", np.maximum(whole - bias + reach, 0)),
    }


def _divergence(share: Array) -> Array:
    """Jensen–Shannon in bits, of shares of choices (data_set, ..., expert)."""

    def bits(share: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = np.where(share == 0, 0.0, share * np.log2(share))
        return np.asarray(-parts.sum(-1))

    apart: Array = bits(share.mean(0)) - bits(share).mean(0)
    return apart
