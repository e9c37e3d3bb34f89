"""The null distribution if tokens of one document resemble each other: drawn documents, and statistics computed from
them.

Each document has its own shares of experts, so counts vary more from document to document than those of independent
tokens would. The model is the Dirichlet-multinomial one (Mosimann 1962, On the compound multinomial distribution):
shares of a document are drawn around those of all documents, with one `spread` per layer and data set, which is
estimated from the documents' counts. Documents keep their lengths.

The draws are not used for their variance, only for the shape of studentized statistics: a difference over its standard
error, which is estimated again from each drawn set of documents. With many documents, such statistics hardly depend on
the model; with few, they have the skewness and discreteness that a t table lacks.

Promises: the same numbers for the same seed. Does not know data sets, or what is tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from analysis.scanning import Array, kernel
from analysis.statistics.jackknife import left_out

NORMAL_FROM = 25.0  # variance of a unit's count above which it is drawn as normal: skewness below 0.2 (arbitrary)
LEAST_SPREAD = 1e-9  # below it, documents count as identical


@dataclass(frozen=True)
class Units:
    """Tokens that choose each expert at one layer, by unit of documents."""

    count: Array
    """float64 (unit, expert)."""
    tokens: Array
    """float64 (unit), none of them 0."""

    @property
    def share(self) -> Array:
        """Share of all tokens that choose each expert: float64 (expert)."""
        share: Array = self.count.sum(0) / self.tokens.sum()
        return share

    @property
    def variance(self) -> Array:
        """Variance of `share`, from the differences between units: float64 (expert).

        Linearized, with each unit's residual inflated for its part in the share (Bell & McCaffrey 2002, CR2).
        """
        part = self.tokens / self.tokens.sum()
        residual = self.count - np.outer(self.tokens, self.share)
        variance: Array = (residual**2 / (1 - part)[:, None]).sum(0) / self.tokens.sum() ** 2
        return variance


def units_of(counts: xr.Dataset) -> list[Units]:
    """Each layer's units, from the counts of `Jackknife(ExpertCounts())`."""
    count = counts["counts"].transpose("replicate", "layer", "expert").values.astype(float)
    tokens = left_out(counts)
    return [Units(count=count[0, layer] - count[1:, layer], tokens=tokens) for layer in range(count.shape[1])]


def spread_of(units: Units, choices: int) -> float:
    """How much the shares of units vary beyond sampling of their tokens: 0 for independent tokens, below 1.

    By the method of moments: E (N − q T)² is T q (1 − q) within a unit, and T² spread q (k − q) between units, summed
    over experts.
    """
    share, tokens, total = units.share, units.tokens, units.tokens.sum()
    within, between = float((share * (1 - share)).sum()), float((share * (choices - share)).sum())
    squares = ((units.count - np.outer(tokens, share)) ** 2).sum(1) / (1 - tokens / total)
    if between <= 0:
        return 0.0
    return float(np.clip((squares.sum() - within * total) / (between * (tokens**2).sum()), 0.0, 0.99))


def drawn(
    tokens: Array,
    share: Array,
    spread: float,
    choices: int,
    draws: int,
    random: np.random.Generator,
    *,
    whole: bool = False,
) -> tuple[Array, Array]:
    """Shares of drawn sets of documents and their variances.

    Parameters
    ----------
    tokens : float64 array, shape (units,)
        Tokens of each unit.
    share : float64 array, shape (experts,)
        Share of tokens that choose each expert, around which documents are drawn; sums to `choices`.
    spread : float
        From `spread_of`.
    choices : int
        Experts per token.
    draws : int
        Number of sets of documents.
    random : numpy.random.Generator
    whole : bool
        Whether a unit's counts add up to its choices, as real ones do. This matters for measures over all experts, and
        hardly for statistics of one expert at a time.

    Returns
    -------
    share, variance : float64 arrays, shape (draws, experts)
        As in `Units`.
    """
    shape = draws, len(share)
    shares, variances = np.empty(shape), np.empty(shape)
    _draw(random, tokens.astype(float), share.astype(float), spread, choices, whole, shares, variances)
    return shares, variances


@kernel
def _draw(
    random: np.random.Generator,
    tokens: Array,
    share: Array,
    spread: float,
    choices: int,
    whole: bool,
    shares: Array,
    variances: Array,
) -> None:
    """Fill in shares and variances, one drawn set of documents at a time."""
    draws, experts = shares.shape
    total = tokens.sum()
    alike = spread < LEAST_SPREAD
    concentration = 0.0 if alike else (1 - spread) / spread
    own, count, square, product = share.copy(), np.empty(experts), np.empty(experts), np.empty(experts)
    number, spare = np.empty(experts), np.empty(experts)
    lengths = 0.0
    for unit in range(tokens.size):
        lengths += tokens[unit] ** 2 / (1 - tokens[unit] / total)
    for draw in range(draws):
        count[:], square[:], product[:] = 0, 0, 0
        for unit in range(tokens.size):
            larger = 1 / (1 - tokens[unit] / total)
            if not alike:
                sum_of_own = 0.0
                for expert in range(experts):
                    own[expert] = random.standard_gamma(concentration * share[expert] / choices)
                    sum_of_own += own[expert]
                for expert in range(experts):
                    own[expert] = min(choices * own[expert] / sum_of_own, 1.0) if sum_of_own > 0 else share[expert]
            for expert in range(experts):
                mean = tokens[unit] * own[expert]
                variance = mean * (1 - own[expert])
                spare[expert] = variance
                if variance > NORMAL_FROM:
                    number[expert] = mean + np.sqrt(variance) * random.standard_normal()
                else:
                    number[expert] = float(random.binomial(np.int64(tokens[unit]), own[expert]))
            if whole:
                _made_whole(number, tokens[unit] * own, spare)
            for expert in range(experts):
                n = number[expert]
                count[expert] += n
                square[expert] += larger * n * n
                product[expert] += larger * n * tokens[unit]
        for expert in range(experts):
            mean = count[expert] / total
            residual = square[expert] - 2 * mean * product[expert] + mean * mean * lengths
            shares[draw, expert], variances[draw, expert] = mean, max(residual, 0.0) / total**2


@kernel
def _made_whole(number: Array, mean: Array, variance: Array) -> None:
    """Subtract the total excess of the numbers over their means from each in proportion to its variance, keeping each
    variance."""
    total, excess = variance.sum(), (number - mean).sum()
    if total <= 0:
        return
    for expert in range(len(number)):
        part = variance[expert] / total
        if part < 1:
            number[expert] = mean[expert] + (number[expert] - mean[expert] - part * excess) / np.sqrt(1 - part)
