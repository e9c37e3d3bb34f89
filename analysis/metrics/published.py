"""Are these the routes of the real Mixtral? The distance of captured shares from the counts published by the authors of
OLMoE.

`mixtral_published.json` holds how often Mixtral-8x7B-v0.1 chose each expert at layers 0, 7 and 15, on 102 blocks of
2,048 tokens of C4 and of GitHub, by the first choice alone and by both. A distance says little by itself, so it is
reported with the distance between the published domains, and with the expected difference between two samples of one
domain.

Promises: exact counts, the same result in any order. Does not know where the texts come from, or how far quantization
may move a share: the distance shows that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.load import Load, share_of_experts
from analysis.scanning import scan
from analysis.statistics.jackknife import Jackknife, left_out
from analysis.statistics.overdispersion import Units, drawn, spread_of

BLOCK_TOKENS = 2048
"""Tokens of a published block: the concatenated text is cut into blocks."""
CHOICES = 2
"""Choices per token of Mixtral and of the published counts."""
FORMS = {"first": "expert_counts_top1", "first or second": "expert_counts_top2"}
"""Which choices are counted, and their key in the published file."""


def published_counts() -> xr.Dataset:
    """The published counts.

    Returns
    -------
    xr.Dataset
        `counts` int64 (choice, domain, layer, expert), in choices: for the first alone, and for the first or second.
        Attributes `n`, tokens of each domain, `model` and `source`.
    """
    held = json.loads((Path(__file__).parent / "mixtral_published.json").read_text(encoding="utf-8"))
    domains, layers = sorted(held[FORMS["first"]]), held["layers"]
    counts = np.array([[[held[key][d][str(layer)] for layer in layers] for d in domains] for key in FORMS.values()])
    coords = {"choice": list(FORMS), "domain": domains, "layer": layers, "expert": np.arange(counts.shape[-1])}
    return described(
        xr.Dataset({"counts": (("choice", "domain", "layer", "expert"), counts)}, coords),
        n=int(counts[0, 0, 0].sum()),
        counted="tokens of each domain",
        estimator="counts",
        null="even tables",
        definition="how often an expert is a token's first choice, or one of its two",
        source=held["source"],
        model=held["model"],
    )


def total_variation(count: xr.DataArray, other: xr.DataArray) -> xr.DataArray:
    """Half the sum of absolute differences of two shares over `expert`, from counts; NaN if nothing is counted."""
    return abs(share_of_experts(count) - share_of_experts(other)).sum("expert", skipna=False) / 2


def refuse_other_model(layers: Sequence[int], experts: int, choices: int) -> None:
    """Raise a ValueError when a model cannot be the one of the published counts."""
    known = published_counts()
    wanted, missing = known.sizes["expert"], sorted(set(known["layer"].values.tolist()) - set(layers))
    if missing or (experts, choices) != (wanted, CHOICES):
        raise ValueError(
            f"the published counts are for layers {known['layer'].values.tolist()}, {wanted} experts and {CHOICES}"
            f" choices, but this model has layers {list(layers)}, {experts} experts and {choices} choices: use"
            " Mixtral 8x7B"
        )


def validation(
    captures: Mapping[str, xr.Dataset],
    *,
    replicates: int = 200,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """The distance of captures of the published domains' texts from the published shares.

    Parameters
    ----------
    captures : mapping of str to xr.Dataset
        By the published name of the domain: each a capture of its text as one document, in rows of `BLOCK_TOKENS`. Only
        the first rows are counted, as many as were published; a beginning-of-sequence token, one of the published
        208,896, is not counted.
    replicates : int
        Number of sets of blocks drawn for `sampling`.
    threads, progress
        See `analysis.scan`; progress is reported for one capture after the other.

    Returns
    -------
    xr.Dataset
        float64: `distance` (choice, domain, published, layer), and over (choice, domain, layer) `own`, `scale` and
        `sampling`; `nearest` str, `confirmed` bool and `verdict` str (choice, domain, layer): see
        `analysis.metrics.published.compared`. `tokens` int64 (domain), the counted ones.

    Raises
    ------
    ValueError
        When a capture is from another model, or a domain has no published counts.
    """
    known = published_counts()
    counts, tokens = {}, []
    for name, capture in captures.items():
        refuse_other_model(capture["layer"].values.tolist(), int(capture.attrs["num_experts"]), capture.sizes["k"])
        blocks = capture.sel(layer=known["layer"].values).isel(doc=slice(known.attrs["n"] // BLOCK_TOKENS))
        # A text is one document, so its blocks are the units.
        blocks = blocks.assign(document_id=("doc", np.arange(blocks.sizes["doc"])))
        [load] = scan(blocks, [Jackknife(Load())], threads=threads, progress=progress)
        tokens.append(int(load["counts"].isel(replicate=0, k=0, layer=0).sum()))
        if not tokens[-1]:
            raise ValueError(f"no token of {name} is captured, so there is nothing to compare")
        counts[name] = _with_samples(load, replicates)
    return compared(counts, known).assign(tokens=("domain", tokens))


def _with_samples(load: xr.Dataset, samples: int) -> xr.DataArray:
    """Counts of choices, of the data and of drawn blocks: float64 (replicate, choice, layer, expert)."""
    by_rank, tokens = load["counts"].transpose("replicate", "layer", "k", "expert").values, left_out(load)
    found = []
    for choices in (1, CHOICES):
        count = by_rank[:, :, :choices].sum(2)
        own = np.empty((1 + samples, *count.shape[1:]))
        own[0] = count[0]
        for layer in range(count.shape[1]):
            units = Units(count=(count[0, layer] - count[1:, layer]).astype(float), tokens=tokens)
            spread, random = spread_of(units, choices), np.random.default_rng([layer, choices])
            shares, _ = drawn(tokens, units.share, spread, choices, samples, random)
            own[1:, layer] = shares * tokens.sum()
        found.append(own)
    coords = {"choice": list(FORMS), "layer": load["layer"].values, "expert": load["expert"].values}
    return xr.DataArray(np.stack(found, 1), coords, ("replicate", *coords))


def compared(counts: Mapping[str, xr.DataArray], known: xr.Dataset) -> xr.Dataset:
    """Distances and verdicts, from counts.

    Parameters
    ----------
    counts : mapping of str to xr.DataArray
        For each domain (replicate, choice, layer, expert), in choices; replicate 0 is the data, and the others are
        samples of the same size and kind.
    known : xr.Dataset
        From `published_counts`.

    Returns
    -------
    xr.Dataset
        float64: `distance` (choice, domain, published, layer), the total variation distance to each published domain;
        and over (choice, domain, layer) `own`, the distance to its own domain, `scale`, that of the published domain to
        the nearest other published one, `sampling`, the 95% quantile of the distance between two samples of this size
        and kind (NaN if a replicate is empty, as happens with one block; too small with few blocks); and `nearest`, the
        name of the nearest published domain, `confirmed`, bool, and `verdict` in words.

        A domain is confirmed at a layer if it is nearest to its own published shares, and nearer than the published
        domains are to each other. The second condition rejects a model that is far from all domains but happens to lie
        on one side. `sampling` is not used in the decision, because the published text itself involves no sampling.
    """
    if unknown := sorted(set(counts) - set(known["domain"].values.tolist())):
        raise ValueError(f"no counts are published for {unknown}: choose from {known['domain'].values.tolist()}")
    names = xr.DataArray(list(counts), dims="domain", name="domain")
    drawn = xr.concat(list(counts.values()), names)
    own, others = drawn.isel(replicate=0, drop=True), known["counts"].rename(domain="published")
    distance = total_variation(own, others)
    between = total_variation(known["counts"], others)
    between = between.where(between["domain"] != between["published"]).min("published").sel(domain=list(counts))
    # A sample differs from the data as the data differ from their population. Two samples differ by √2 times as much.
    spread = total_variation(drawn.isel(replicate=slice(1, None)), own) * np.sqrt(2)
    nearest = others["published"].isel(published=distance.argmin("published")).drop_vars("published")
    to_own = xr.concat([distance.sel(domain=name, published=name, drop=True) for name in counts], names)
    near, right = to_own < between, nearest == names
    tokens = own.isel(choice=0, layer=0).sum("expert").values.tolist()
    return described(
        xr.Dataset(
            {
                "distance": distance,
                "own": to_own,
                "scale": between,
                "sampling": spread.quantile(0.95, "replicate", skipna=False).drop_vars("quantile"),
                "nearest": nearest,
                "confirmed": near & right,
                "verdict": xr.apply_ufunc(_words, near, right, nearest, vectorize=True, output_dtypes=[object]),
            }
        ),
        n=dict(zip(counts, map(int, tokens), strict=True)),
        published_tokens=known.attrs["n"],
        estimator="plug-in; sampling: drawn blocks with the spread of the data's blocks",
        null="sampling",
        definition="total variation: half the sum over experts of the absolute differences of two shares of choices",
        source=known.attrs["source"],
    )


def _words(near: bool, right: bool, nearest: str) -> str:
    if near and right:
        return "its own"
    return f"nearer to {nearest}" if not right else "far from all"
