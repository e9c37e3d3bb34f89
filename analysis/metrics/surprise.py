"""How well the model predicts along a row, and whether it is surprised where its routers are uncertain.

Needs a capture with `--record logprob`, and for the second question `--record logits`. Surprise is the negative
log-probability of the next token, in nats: its mean is the usual loss, and the exponential of the mean is the
perplexity. Only counted tokens are used: what follows a special token, such as the first token of a text, is left out.

Promises: sums of integers, so the result does not depend on order. Does not know experts.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.load import Bins, range_starts
from analysis.metrics.same_token import grouped, usable
from analysis.metrics.scores import Scores, entropy_ends, scores_of
from analysis.scanning import Array, Block, Reducer, State, kernel, labelled, scan
from analysis.statistics.jackknife import Jackknife, interval, with_intervals

UNIT = 2.0**-20  # surprises, in nats, are rounded to multiples of it, so that sums are exact
SQUARE = 2.0**-24  # the same for products of a surprise and an entropy
MOMENTS = ("surprise", "entropy", "surprise_squared", "entropy_squared", "product")
WITHIN = ("within_surprise", "within_entropy", "within_product")


class Surprise(Reducer):
    """Sums of surprises by position in the row.

    Parameters
    ----------
    bins : int or "doubling"
        Ranges of positions; see `analysis.ExpertCounts`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logprob"})
    stacks = True

    def __init__(self, bins: Bins = "doubling") -> None:
        if isinstance(bins, int) and bins < 1:
            raise ValueError(f"bins={bins}: must be at least 1")
        self.bins = bins

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros (start): `surprise` in units of 2**-20, and `tokens`."""
        ranges = len(range_starts(self.bins, dataset.sizes["position"]))
        return {name: np.zeros(ranges, np.int64) for name in ("surprise", "tokens")}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        logprob = block["logprob"]
        row, position = np.nonzero(block["counted"] & ~np.isnan(logprob))
        units = np.rint(logprob[row, position].astype(np.float64) / -UNIT).astype(np.int64)
        at = np.searchsorted(range_starts(self.bins, logprob.shape[1]), position, side="right") - 1
        np.add.at(state["surprise"], at, units)
        np.add.at(state["tokens"], at, 1)

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Means by range, and over all positions; NaN if nothing was counted."""
        tokens, total = labelled(state["tokens"], "start"), labelled(state["surprise"] * UNIT, "start")
        everything = tokens.sum("start")
        found = {
            "mean_surprise": (total / tokens.where(tokens > 0)).assign_attrs(units="nat", amount="tokens"),
            "surprise_of_all": (total.sum("start") / everything.where(everything > 0)).assign_attrs(
                units="nat", amount="tokens_of_all"
            ),
            "tokens": tokens.assign_attrs(units="tokens"),
            "tokens_of_all": everything.assign_attrs(units="tokens"),
        }
        return described(
            xr.Dataset(found, {"start": range_starts(self.bins, dataset.sizes["position"])}),
            n=int(np.atleast_2d(state["tokens"])[0].sum()),
            estimator="mean over tokens",
            null="none; a model without knowledge has the logarithm of the vocabulary size",
            definition="surprise = -log-probability of the next token, in nats, by the position in the row of the token"
            " that predicts it; exp(mean) is the perplexity",
            source="-",
        )


class SurpriseEntropy(Reducer):
    """Sums, by layer, for correlations of surprise and router entropy.

    Parameters
    ----------
    scores : Scores
        How the capture's logits become scores, from `analysis.scores_of`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logprob", "logit"})
    stacks = True

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros (layer), in units of 2**-24, and `tokens` (1)."""
        state = {name: np.zeros(dataset.sizes["layer"], np.int64) for name in (*MOMENTS, *WITHIN)}
        return state | {"tokens": np.zeros(1, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        arrays = block["token"], block["logprob"], block["logit"], block["counted"]
        moments, within = (np.zeros((len(names), len(state["entropy"])), np.int64) for names in (MOMENTS, WITHIN))
        tokens = _add_moments(*arrays, self.scores.experts, self.scores.sigmoid, moments, within)
        if tokens < 0:
            raise ValueError("a logit is not a finite number: the shard is damaged")
        state["tokens"] += tokens
        for names, sums in ((MOMENTS, moments), (WITHIN, within)):
            for name, own in zip(names, sums, strict=True):
                state[name] += own

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Correlations; NaN if one of the two does not vary."""
        own = {name: labelled(state[name] * SQUARE, "layer") for name in (*MOMENTS, *WITHIN)}
        tokens = labelled(state["tokens"][..., 0].astype(float))
        x, y = (own[name] / tokens.where(tokens > 0) for name in ("surprise", "entropy"))
        xx, yy, xy = (own[name] / tokens.where(tokens > 0) for name in MOMENTS[2:])
        found = {
            "correlation": _correlation(xx - x * x, yy - y * y, xy - x * y),
            "within": _correlation(*(own[name] for name in WITHIN)),
        }
        return described(
            xr.Dataset(found, {"layer": dataset["layer"].values}),
            n=int(state["tokens"].flat[0]),
            estimator="product-moment",
            null=0.0,
            definition="correlation over tokens of surprise, -log-probability of the next token, and the entropy of the"
            " router's distribution at the layer; within = correlation of their deviations from the means of the same"
            f" token id in the same row{', with the entropy of the largest logits only' * self.scores.truncated}",
            source="Pearson 1895",
        )


def surprise(
    dataset: xr.Dataset, *, bins: Bins = "doubling", level: float = 0.95, threads: int | None = None
) -> xr.Dataset:
    """How well the model predicts the next token along a row.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture with log-probabilities.
    bins : int or "doubling"
        Ranges of positions; see `analysis.ExpertCounts`.
    level : float
                        Level of the intervals.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        float64 over (start), a range's first position in the row: `mean_surprise` in nats, with the ends `_low` and
        `_high` of its interval over documents; `surprise_of_all`, over all positions, with its own ends. int64:
        `tokens` and `tokens_of_all`. NaN if nothing was counted. Later positions exist only in longer documents.

    Raises
    ------
    ValueError
        When the capture has no log-probabilities.
    """
    return with_intervals(scan(dataset, [Jackknife(Surprise(bins))], threads=threads)[0], level=level)


def surprise_and_entropy(dataset: xr.Dataset, *, level: float = 0.95, threads: int | None = None) -> xr.Dataset:
    """Whether the model is surprised by what follows where a layer's router is uncertain.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture with log-probabilities and logits.
    level : float
                Level of the intervals.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        See `surprise_and_entropy_of`.

    Raises
    ------
    ValueError
        When the capture has no log-probabilities or logits.
    """
    found = scan(dataset, [Jackknife(SurpriseEntropy(scores_of(dataset)))], threads=threads)[0]
    return surprise_and_entropy_of(found, level=level)


def surprise_and_entropy_of(counts: xr.Dataset, *, level: float = 0.95) -> xr.Dataset:
    """Correlations with their intervals, from the counts of `Jackknife(SurpriseEntropy(...))`.

    Parameters
    ----------
    counts : xr.Dataset
        From `analysis.Jackknife` of `analysis.SurpriseEntropy`.
    level : float
        Level of the intervals.

    Returns
    -------
    xr.Dataset
        float64 over (layer), null 0: `correlation` of surprise and router entropy over tokens, which may be explained
        by frequent tokens, and `within`, that of their deviations within the same token id and row. Each with the ends
        `_low` and `_high` of its interval over documents, symmetric in Fisher's z. NaN if one of the two does not vary.
    """
    found = counts.isel(replicate=0).drop_vars(["replicate", "left_out", "unit"])
    for name in ("correlation", "within"):
        ends = interval((counts[name] + 1) / 2, level, scale="share")  # its log odds are twice Fisher's z
        found = found.assign({f"{name}_{end}": 2 * ends[end] - 1 for end in ("low", "high")})
    return found.assign_attrs(level=level, estimator=f"product-moment; {ends.attrs['estimator']}, on Fisher's z")


def _correlation(xx: xr.DataArray, yy: xr.DataArray, xy: xr.DataArray) -> xr.DataArray:
    square = xx * yy
    return (xy / square.where((xx > 0) & (yy > 0)) ** 0.5).clip(-1, 1).assign_attrs(null=0.0)


@kernel
def _add_moments(
    token: Array,
    logprob: Array,
    logit: Array,
    counted: Array,
    experts: int,
    sigmoid: bool,
    moments: Array,
    within: Array,
) -> int:
    """Add tokens, and return their number; −1 if a logit is not finite."""
    rows, positions, layers, _ = logit.shape
    entropy, tokens = np.zeros((positions, layers)), 0
    for row in range(rows):
        place = usable(counted[row], logprob[row])
        tokens += place.size
        for position in place:
            x = -np.float64(logprob[row, position])
            for layer in range(layers):
                own = logit[row, position, layer]
                if not np.isfinite(own).all():
                    return -1
                y = entropy_ends(own, experts, sigmoid)[0]
                entropy[position, layer] = y
                for index, value in enumerate((x, y, x * x, y * y, x * y)):
                    moments[index, layer] += np.int64(np.rint(value / SQUARE))
        order, starts = grouped(place, token[row])
        for group in range(starts.size - 1):
            same = order[starts[group] : starts[group + 1]]
            if same.size == 1:
                continue
            for layer in range(layers):
                x_mean, y_mean = 0.0, 0.0
                for position in same:
                    x_mean -= logprob[row, position] / same.size
                    y_mean += entropy[position, layer] / same.size
                for position in same:
                    x, y = -logprob[row, position] - x_mean, entropy[position, layer] - y_mean
                    for index, value in enumerate((x * x, y * y, x * y)):
                        within[index, layer] += np.int64(np.rint(value / SQUARE))
    return tokens
