"""What chance gives where tokens of one document resemble each other: documents drawn, and statistics made of them.

A document's tokens go to experts by shares of its own, so that counts vary more from document to document than those of
independent tokens would. The model is the Dirichlet-multinomial one (Mosimann 1962, On the compound multinomial
distribution): shares of a document are drawn around those of all documents, with one `spread` for a layer and data
set, which is found from the documents' own counts. Documents have the lengths that they have.

What is drawn is not trusted for its variance, only for the shape of studentized statistics: a difference over its
standard error, which is found anew from each drawn set of documents. Such statistics hardly depend on the model
where there are many documents; where there are few, its skewness and discreteness are what a t table lacks.

Promises: the same numbers for the same seed. Does not know data sets, nor what is tested.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr

from analysis.scanning import Array, kernel
from analysis.statistics.jackknife import left_out

NORMAL_FROM = 25.0  # variance of a unit's count from which it is drawn as normal: skewness below 0.2 (arbitrary)
MOST_MEAN, MOST_COUNT = 50.5, 96  # of numbers of that variance whose share is at most a half; further ones never occur
STEP = 0.5  # between means in the table: three in four numbers are drawn without a logarithm
LEAST_CHANCE = 1e-20  # below which a probability is nothing beside the rounding of a sum of 1
LEAST_SPREAD = 1e-9  # below which documents are taken to be alike


@dataclass(frozen=True)
class Units:
    """Tokens that reach each expert at one layer, by unit of documents."""

    count: Array
    """float64 (unit, expert)."""
    tokens: Array
    """float64 (unit), none of them 0."""

    @property
    def share(self) -> Array:
        """Share of all tokens that reach each expert: float64 (expert)."""
        share: Array = self.count.sum(0) / self.tokens.sum()
        return share

    @property
    def variance(self) -> Array:
        """Of `share`, from how the units differ: float64 (expert).

        Linearized, each unit's residual made larger for its part in the share (Bell & McCaffrey 2002, CR2).
        """
        part = self.tokens / self.tokens.sum()
        residual = self.count - np.outer(self.tokens, self.share)
        variance: Array = (residual**2 / (1 - part)[:, None]).sum(0) / self.tokens.sum() ** 2
        return variance


def units_of(counts: xr.Dataset) -> list[Units]:
    """Each layer's units, from what `Jackknife(ExpertCounts())` counted."""
    count = counts["counts"].transpose("replicate", "layer", "expert").values.astype(float)
    tokens = left_out(counts)
    return [Units(count=count[0, layer] - count[1:, layer], tokens=tokens) for layer in range(count.shape[1])]


def spread_of(units: Units, choices: int) -> float:
    """How much units' shares differ beyond what their tokens do: 0 for independent tokens, below 1.

    By moments: E (N − q T)² is T q (1 − q) within a unit, and T² spread q (k − q) between units, summed over experts.
    """
    share, tokens, total = units.share, units.tokens, units.tokens.sum()
    within, between = float((share * (1 - share)).sum()), float((share * (choices - share)).sum())
    squares = ((units.count - np.outer(tokens, share)) ** 2).sum(1) / (1 - tokens / total)
    if between <= 0:
        return 0.0
    return float(np.clip((squares.sum() - within * total) / (between * (tokens**2).sum()), 0.0, 0.99))


def drawn(
    tokens: Array, share: Array, spread: float, choices: int, draws: int, random: np.random.Generator
) -> tuple[Array, Array]:
    """Shares of drawn sets of documents and their variances.

    Parameters
    ----------
    tokens : float64 array, shape (units,)
        How many each unit has.
    share : float64 array, shape (experts,)
        Of tokens that reach each expert, which documents are drawn around; sums to `choices`.
    spread : float
        As `spread_of` gives it.
    choices : int
        Experts of a token.
    draws : int
        Sets of documents.
    random : numpy.random.Generator

    Returns
    -------
    share, variance : float64 arrays, shape (draws, experts)
        As `Units` has them.
    """
    shape = draws, len(share)
    shares, variances = np.empty(shape), np.empty(shape)
    _draw(random, tokens.astype(float), share.astype(float), spread, choices, shares, variances)
    return shares, variances


@kernel
def _draw(
    random: np.random.Generator,
    tokens: Array,
    share: Array,
    spread: float,
    choices: int,
    shares: Array,
    variances: Array,
) -> None:
    """Fill in shares and variances, a unit of all drawn sets of documents at a time."""
    draws, experts = shares.shape
    total, lengths = tokens.sum(), 0.0
    alike = spread < LEAST_SPREAD
    shape = share * (0.0 if alike else (1 - spread) / spread / choices)
    centre = np.where(shape < 1, shape + 1, shape) - 1 / 3
    width = 1 / np.sqrt(9 * centre)
    own, number, normal, uniform = share.copy(), np.empty(experts), np.empty(experts), np.empty(experts)
    count, square, product = np.zeros((draws, experts)), shares, variances  # these two are in what is filled in
    square[:], product[:] = 0, 0
    for unit in range(tokens.size):
        larger = 1 / (1 - tokens[unit] / total)
        lengths += larger * tokens[unit] ** 2
        table = np.zeros((int(MOST_MEAN / STEP) + 1, MOST_COUNT))
        for draw in range(draws):
            if not alike:
                _draw_gammas(random, shape, centre, width, normal, uniform, own)
                whole = own.sum()
                for expert in range(experts):
                    own[expert] = min(choices * own[expert] / whole, 1.0) if whole > 0 else share[expert]
            _draw_numbers(random, tokens[unit], own, table, number)
            for expert in range(experts):
                n = number[expert]
                count[draw, expert] += n
                square[draw, expert] += larger * n * n
                product[draw, expert] += larger * n * tokens[unit]
    for draw in range(draws):
        for expert in range(experts):
            mean = count[draw, expert] / total
            residual = square[draw, expert] - 2 * mean * product[draw, expert] + mean * mean * lengths
            shares[draw, expert], variances[draw, expert] = mean, max(residual, 0.0) / total**2


@kernel
def _draw_gammas(
    random: np.random.Generator,
    shape: Array,
    centre: Array,
    width: Array,
    normal: Array,
    uniform: Array,
    gamma: Array,
) -> None:
    """Gamma numbers, mostly cubes of normal ones around a centre (Marsaglia & Tsang 2000).

    Of a shape below 1 it is that of one more, times the 1/shape-th power of a uniform number. All numbers of a kind are
    drawn in a loop of their own, without a call: a third of the time of one gamma number after the other (measured).
    """
    for index in range(len(shape)):
        normal[index] = random.standard_normal()
    for index in range(len(shape)):
        uniform[index] = random.random()
    _cube(centre, width, normal, uniform, gamma)
    for index in range(len(shape)):
        one, chance = normal[index], uniform[index]
        while gamma[index] < 0:
            root = 1 + width[index] * one
            cube, least = root * root * root, math.log(max(chance, LEAST_CHANCE))
            if root > 0 and least < 0.5 * one * one + centre[index] * (1 - cube + math.log(cube)):
                gamma[index] = centre[index] * cube
            else:
                one, chance = random.standard_normal(), random.random()
    for index in range(len(shape)):
        if shape[index] < 1:
            power = math.exp(-random.standard_exponential() / shape[index]) if shape[index] > 0 else 0.0
            gamma[index] *= power


@kernel
def _cube(centre: Array, width: Array, normal: Array, uniform: Array, gamma: Array) -> None:
    """Gamma numbers that can be taken at once, and -1 for others; the compiler makes vector instructions of it."""
    for index in range(len(centre)):
        root, square = 1 + width[index] * normal[index], normal[index] * normal[index]
        at_once = (root > 0) & (uniform[index] < 1 - 0.0331 * square * square)
        gamma[index] = centre[index] * root * root * root if at_once else -1.0


@kernel
def _draw_numbers(random: np.random.Generator, tokens: float, share: Array, table: Array, number: Array) -> None:
    """How many of so many tokens, each with these chances: binomial, or normal where that is nearly the same.

    Tokens are drawn with the next smaller chance that the table has, and then those left with what that chance lacks:
    mostly none.
    """
    for expert in range(len(share)):
        mean = tokens * share[expert]
        variance = mean * (1 - share[expert])
        if variance > NORMAL_FROM:
            number[expert] = mean + math.sqrt(variance) * random.standard_normal()
            continue
        fewer = min(share[expert], 1 - share[expert])
        row, n = int(tokens * fewer / STEP), 0
        smaller = row * STEP / tokens
        if row:
            if table[row, -1] == 0:
                _add_up(tokens, smaller, table[row])
            n = _place(table[row], random.random())
        n += _few(random.random(), tokens - n, max(fewer - smaller, 0.0) / (1 - smaller))
        number[expert] = n if share[expert] <= 0.5 else tokens - n


@kernel
def _add_up(tokens: float, share: float, cumulated: Array) -> None:
    """The probabilities of a binomial number of at most 0, 1, and so on; 1 from where all that follow are nothing."""
    odds, chance, total = share / (1 - share), math.exp(tokens * math.log1p(-share)), 0.0
    cumulated[:] = 1.0
    for n in range(len(cumulated) - 1):
        total += chance
        if n >= tokens or (n > tokens * share and chance < LEAST_CHANCE):
            break
        cumulated[n] = min(total, 1.0)
        chance *= odds * (tokens - n) / (n + 1)


@kernel
def _place(cumulated: Array, uniform: float) -> int:
    """How many probabilities are at most so large; they rise."""
    place = 0
    for n in range(len(cumulated)):
        place += cumulated[n] <= uniform
    return place


@kernel
def _few(uniform: float, tokens: float, share: float) -> int:
    """A binomial number of a mean well below 1: probabilities are added up from 0 on."""
    n = 0
    if uniform < 1 - tokens * share:
        return n  # for that is less than the probability of 0
    chance = math.exp(tokens * math.log1p(-share))
    while uniform >= chance and n < tokens:
        uniform -= chance
        n += 1
        chance *= share / (1 - share) * (tokens + 1 - n) / n
        if chance < LEAST_CHANCE:
            break
    return n
