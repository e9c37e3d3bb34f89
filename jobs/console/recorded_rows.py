"""The questions of `jobs/query.py` that need what `--record` adds: router entropy, saliency and log-probability.

Promises: the table and the JSON output have the same rows. Does not know about the command line.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from jobs.console.query_rows import Listed
from jobs.console.tables import Facts

if TYPE_CHECKING:
    import xarray as xr

    from analysis.scanning import Reducer

Recorded = tuple[Sequence["Reducer"], Callable[..., Listed]]
"""What to count, and the function that makes the answer from the layers and the counts."""


ENTROPY = {
    "entropy": "mean_entropy",
    "effective_experts": "mean_effective_experts",
    "mass": "mean_mass",
    "margin": "mean_margin",
}
"""Keys of a row, and variables; with only the largest logits, all but the margin are replaced by bounds."""


def recorded_question(name: str, capture: "xr.Dataset") -> Recorded:
    """What to count for "entropy", "saliency" or "logprob", and the function that makes the answer.

    Raises
    ------
    ValueError
        When the capture has no logits, or it is not known how they become weights.
    """
    from analysis.metrics.distribution import RouterDistribution
    from analysis.metrics.logprob import LogProbability
    from analysis.metrics.saliency import LargestSaliency, Saliency
    from analysis.metrics.scores import scores_of
    from analysis.statistics.jackknife import Jackknife

    if name == "entropy":
        return [Jackknife(RouterDistribution(scores_of(capture)))], entropy_answer
    if name == "saliency":
        return [Jackknife(Saliency()), LargestSaliency()], saliency_answer
    return [Jackknife(LogProbability())], logprob_answer


def entropy_answer(capture: "xr.Dataset", layers: list[int], counts: "xr.Dataset") -> Listed:
    """How spread out the router distributions are, layer by layer."""
    from analysis.statistics.jackknife import with_intervals

    found = with_intervals(counts, share=("mean_mass",)).sel(layer=layers)
    known = {
        f"{key}{bound}": f"{name}{bound}"
        for key, name in ENTROPY.items()
        for bound in ("", "_at_least", "_at_most")
        if f"{name}{bound}" in found
    }
    keys = {f"{key}{end}": f"{name}{end}" for key, name in known.items() for end in ("", "_low", "_high")}
    facts = {**found.attrs, "null_by_key": {key: found[name].attrs["null"] for key, name in known.items()}}
    title = (
        f"routers of {capture.attrs['dataset']}, {found.attrs['n']:,} tokens: entropy in bits, effective experts, mass"
        " of the chosen ones, margin in logits; from and to: 95% interval"
    )
    return Listed(title=title, kind="entropy", facts=facts, rows=_rows(found, keys, ["layer"]))


def saliency_answer(capture: "xr.Dataset", layers: list[int], sums: "xr.Dataset", largest: "xr.Dataset") -> Listed:
    """What each expert contributes, layer by layer, the least salient first."""
    from analysis.metrics.saliency import saliency_of

    found = saliency_of(sums, largest).sel(layer=layers)
    rows = _rows(found, {str(name): str(name) for name in found.data_vars}, ["layer", "expert"])
    least = {layer: place for place, layer in enumerate(layers)}
    rows.sort(key=lambda row: (least[row["layer"]], -math.inf if row["tokens"] == 0 else row["mean_saliency"]))
    title = (
        f"saliency in {capture.attrs['dataset']}, {found.attrs['n']:,} tokens: mean of weight × output norm, least"
        f" first; from and to: 95% interval; an even share is {1 / found.sizes['expert']:.4f}"
    )
    return Listed(title=title, kind="saliency", facts=dict(found.attrs), rows=rows, section="layer")


def logprob_answer(capture: "xr.Dataset", layers: list[int], counts: "xr.Dataset") -> Listed:
    """The log-probability of the next token by expert, layer by layer."""
    from analysis.metrics.logprob import logprob_by_expert_of

    found = logprob_by_expert_of(counts).sel(layer=layers)
    rows = _rows(found, {str(name): str(name) for name in found.data_vars}, ["layer", "expert"])
    title = (
        f"log-probability of the next token in {capture.attrs['dataset']}, {found.attrs['n']:,} tokens, in nats;"
        " within: compared with the same token in the row that does not choose the expert; from and to: simultaneous"
        " interval"
    )
    return Listed(title=title, kind="logprob", facts=dict(found.attrs), rows=rows, section="layer")


def _rows(found: "xr.Dataset", keys: Mapping[str, str], dims: Sequence[str]) -> list[Facts]:
    """One row for each cell, with the coordinates first."""
    ordered = found.transpose(*dims)
    flat = {key: ordered[name].values.ravel().tolist() for key, name in keys.items()}
    places = itertools.product(*(found[dim].values.tolist() for dim in dims))
    return [
        {**dict(zip(dims, place, strict=True)), **{key: values[at] for key, values in flat.items()}}
        for at, place in enumerate(places)
    ]
