"""Documents drawn for simulations of tests and intervals: their choices, counted by unit as in a jackknife."""

from functools import cache

import numpy as np
import xarray as xr

from analysis.statistics.jackknife import UNITS, unit_of, without_each

CHOICES = 2


def lengths(random: np.random.Generator, kind: str, number: int) -> np.ndarray:
    """Tokens of documents: "200", all of them, or "200 ± 1", lognormal with that median and deviation, 5 at least."""
    median, _, deviation = kind.partition(" ± ")
    if not deviation:
        return np.full(number, int(median))
    return np.maximum(random.lognormal(np.log(int(median)), float(deviation), number), 5).astype(np.int64)


class Documents:
    """Documents of one data set, at any number of layers.

    `spread` is the sum of the parameters of the Dirichlet distribution from which each document's shares of first
    choices are drawn; None if all documents have the same shares. `planted` moves that part of expert 1's share to
    expert 0.
    """

    def __init__(
        self,
        random: np.random.Generator,
        tokens: np.ndarray,
        spread: float | None,
        *,
        experts: int,
        planted: float = 0.0,
        skewed: bool = False,
    ) -> None:
        self.random, self.tokens, self.spread = random, tokens, spread
        first = 1.0 / np.arange(1, experts + 1) ** 0.7 if skewed else np.ones(experts)
        self.first = first / first.sum()
        self.first[[0, 1]] += self.first[1] * planted * np.array([1, -1])
        self.reach = _reach(spread, tuple(self.first))

    def counts(self, layers: int) -> np.ndarray:
        """Tokens that reach each expert, int64 (document, layer, expert); layers are independent."""
        shape = len(self.tokens), layers
        tokens = np.broadcast_to(self.tokens[:, None], shape)
        shares = self._shares(shape)
        one = self.random.multinomial(tokens, shares)
        count = one.copy()
        for expert in range(shares.shape[-1]):
            count += self.random.multinomial(one[..., expert], without(shares, expert))
        return count

    def _shares(self, shape: tuple[int, ...]) -> np.ndarray:
        if self.spread is None:
            return np.broadcast_to(self.first, (*shape, len(self.first)))
        drawn = np.maximum(self.random.dirichlet(self.spread * self.first, shape), 1e-12)
        return drawn / drawn.sum(-1, keepdims=True)


@cache
def _reach(spread: float | None, first: tuple[float, ...]) -> np.ndarray:
    """The true share of tokens that reach each expert: exact if documents are alike, otherwise from 400,000 of them."""
    shares = np.array(first)[None]
    if spread is not None:
        drawn = np.maximum(np.random.default_rng(0).dirichlet(spread * shares[0], 400_000), 1e-12)
        shares = drawn / drawn.sum(-1, keepdims=True)
    reach = shares.mean(0).copy()
    for expert in range(shares.shape[-1]):
        reach += (shares[:, expert : expert + 1] * without(shares, expert)).mean(0)
    return reach


def without(shares: np.ndarray, expert: int) -> np.ndarray:
    """Shares of the second choice if the first is this expert."""
    left = shares.copy()
    left[..., expert] = 0
    left /= left.sum(-1, keepdims=True)
    return left


def counted(count: np.ndarray, tokens: np.ndarray) -> xr.Dataset:
    """The result of `Jackknife(ExpertCounts())` for such documents."""
    unit = unit_of(np.arange(len(tokens)), UNITS)
    by_unit = np.zeros((min(UNITS, len(tokens)), *count.shape[1:]), np.int64)
    unit_tokens = np.zeros(len(by_unit), np.int64)
    np.add.at(by_unit, unit, count)
    np.add.at(unit_tokens, unit, tokens)
    return xr.Dataset(
        {"counts": (("replicate", "layer", "expert"), without_each(by_unit))},
        {
            "layer": np.arange(count.shape[1]),
            "expert": np.arange(count.shape[2]),
            "replicate": np.arange(1 + len(by_unit)),
            "left_out": ("replicate", np.concatenate([[0], unit_tokens])),
        },
        {"n": int(tokens.sum()), "documents": len(tokens), "units": len(by_unit), "experts_per_token": CHOICES},
    )
