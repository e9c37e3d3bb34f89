"""Does it matter which expert a token chooses? The log-probability of the next token, by expert.

Needs a capture with `--record logprob`. An expert for easy words has a high mean whatever it does, so the means are
also compared within the same token id of the same row (`analysis.metrics.same_token`): occurrences that choose an
expert against those that do not. This is a comparison, not an effect: the reason for a different choice may also be
what made the next token easier.

Promises: sums of integers, so the result does not depend on order. Does not know which token came next.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.same_token import grouped, usable
from analysis.scanning import Array, Block, Reducer, State, kernel, labelled, scan, sizes
from analysis.statistics.jackknife import Jackknife, with_intervals
from analysis.statistics.resampled import together, totals_of

UNIT = 2.0**-20  # log-probabilities, in nats, are rounded to multiples of it, so that sums are exact


class LogProbability(Reducer):
    """Sums of log-probabilities by layer and expert, over all tokens, and of deviations within the same token and
    row."""

    needs: ClassVar[frozenset[str]] = frozenset({"logprob"})
    stacks = True

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros (layer, expert), sums in units of 2**-20, and for all tokens `total` and `all_tokens` (1)."""
        layers, _, experts = sizes(dataset)
        names = ("logprob", "tokens", "deviation", "contrasted", "compared")
        state = {name: np.zeros((layers, experts), np.int64) for name in names}
        return state | {name: np.zeros(1, np.int64) for name in ("total", "all_tokens")}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        _add(block["expert"], block["token"], block["logprob"], block["counted"], *state.values())

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Means and differences, NaN if there is nothing to compare."""
        own = {
            name: labelled(state[name], "layer", "expert") for name in ("logprob", "tokens", "deviation", "compared")
        }
        total, everything = (labelled(state[name][..., 0]) for name in ("total", "all_tokens"))
        tokens, others = own["tokens"], everything - own["tokens"]
        contrasted = labelled(state["contrasted"] * UNIT, "layer", "expert")
        mean = own["logprob"] * UNIT / tokens.where(tokens > 0)
        mean_other = (total - own["logprob"]) * UNIT / others.where(others > 0)
        found = {
            "mean_logprob": mean.assign_attrs(units="nat", amount="tokens"),
            "mean_other": mean_other.assign_attrs(units="nat"),
            "difference": (mean - mean_other).assign_attrs(units="nat", null=0.0, amount="tokens"),
            "within": (own["deviation"] * UNIT / contrasted.where(contrasted > 0)).assign_attrs(
                units="nat", null=0.0, amount="contrasted"
            ),
            "tokens": tokens.assign_attrs(units="tokens"),
            "compared": own["compared"].assign_attrs(units="tokens"),
            "contrasted": contrasted,
        }
        return described(
            xr.Dataset(found, {"layer": dataset["layer"].values, "expert": np.arange(tokens.sizes["expert"])}),
            n=int(state["all_tokens"].flat[0]),
            estimator="mean over tokens; within: least squares with an effect for each token id and row",
            null="0 for difference and within",
            definition="log-probability of the next token, at counted tokens that have a next one; difference = mean"
            " over the tokens that choose the expert - mean over the others; within = the same for one token id in one"
            " row: sum of (y - mean y) over those that choose it / sum of n1 n0 / n, for n1 that choose it and n0 that"
            " do not",
            source="Mundlak 1978 (fixed effects)",
        )


def logprob_by_expert(dataset: xr.Dataset, *, level: float = 0.95, threads: int | None = None) -> xr.Dataset:
    """The log-probability of the next token, by the expert that a token chooses.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture with log-probabilities.
    level : float
                Level of the intervals.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        See `logprob_by_expert_of`.

    Raises
    ------
    ValueError
        When the capture has no log-probabilities.
    """
    return logprob_by_expert_of(scan(dataset, [Jackknife(LogProbability())], threads=threads)[0], level=level)


def logprob_by_expert_of(counts: xr.Dataset, *, level: float = 0.95) -> xr.Dataset:
    """The log-probability of the next token, by the expert that a token chooses, from counts.

    Parameters
    ----------
    counts : xr.Dataset
        From `analysis.Jackknife` of `analysis.LogProbability`.
    level : float
        Level of the intervals.

    Returns
    -------
    xr.Dataset
        Over (layer, expert), float64, in nats, NaN if there is nothing to compare: `mean_logprob` over the tokens that
        choose the expert and `mean_other` over those that do not; `difference` of the two, which may be explained by
        frequent tokens; and `within`, the difference within the same token id in the same row, null 0. `mean_logprob`
        and `difference` have ends `_low` and `_high` of intervals for each separately. Those of `within` hold
        simultaneously, and `within_p` is adjusted for all cells (Westfall & Young 1993), so the largest may be
        selected; both are NaN if a cell's tokens come from fewer than 10 effective documents. int64: `tokens` that
        choose the expert, and `compared`, those of token ids of which some occurrences in the row choose it and some do
        not. `contrasted` float64 is their weight in `within`.
    """
    found = with_intervals(counts, level=level)
    ends = together([totals_of(counts, "within")], np.ones((1, 1)), level=level)
    shape = found["within"].shape
    for name in ("low", "high", "p"):
        found[f"within_{name}"] = found["within"].dims, getattr(ends, name).reshape(shape)
    return found.assign_attrs(tests=ends.tests)


@kernel
def _add(
    expert: Array,
    token: Array,
    logprob: Array,
    counted: Array,
    total_of: Array,
    tokens: Array,
    deviation: Array,
    contrasted: Array,
    compared: Array,
    total: Array,
    all_tokens: Array,
) -> None:
    rows, _, layers, choices = expert.shape
    number, apart = np.zeros(tokens.shape[1], np.int64), np.zeros(tokens.shape[1])
    for row in range(rows):
        place = usable(counted[row], logprob[row])
        for position in place:
            units = np.int64(np.rint(np.float64(logprob[row, position]) / UNIT))
            total[0] += units
            all_tokens[0] += 1
            for layer in range(layers):
                for k in range(choices):
                    chosen = expert[row, position, layer, k]
                    total_of[layer, chosen] += units
                    tokens[layer, chosen] += 1
        order, starts = grouped(place, token[row])
        for group in range(starts.size - 1):
            same = order[starts[group] : starts[group + 1]]
            if same.size == 1:
                continue
            mean = 0.0
            for position in same:
                mean += logprob[row, position] / same.size
            for layer in range(layers):
                for position in same:
                    for k in range(choices):
                        chosen = expert[row, position, layer, k]
                        number[chosen] += 1
                        apart[chosen] += logprob[row, position] - mean
                for position in same:
                    for k in range(choices):
                        chosen = expert[row, position, layer, k]
                        own = number[chosen]
                        if 0 < own < same.size:
                            deviation[layer, chosen] += np.int64(np.rint(apart[chosen] / UNIT))
                            contrasted[layer, chosen] += np.int64(np.rint(own * (same.size - own) / same.size / UNIT))
                            compared[layer, chosen] += same.size
                        number[chosen], apart[chosen] = 0, 0.0
