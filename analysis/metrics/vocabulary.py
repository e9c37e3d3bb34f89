"""Do experts specialize in words? How much a token's identity tells of its experts, beside what chance would show.

The largest share of a token's occurrences that one expert gets is large for rare tokens whatever the routing: of a
token seen once, it is 1. So the null stands beside it: what the same numbers of occurrences give when they are drawn
from all tokens alike, as if identities had been shuffled among the routes. It is drawn from a sample of routes that are
kept whole, so that choices of one token remain different experts and unequal loads remain unequal.

Promises: the sample is the same in any order and any chunking; draws have a fixed seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.tokens import TokenCounts, token_experts_of
from analysis.scanning import Array, Block, Reducer, State, scan, sizes
from analysis.statistics.hashing import mixed
from analysis.statistics.information import association

DRAWN_AT_ONCE = 2**22  # numbers: bounds memory (arbitrary)
NORMAL_FROM = 1024  # occurrences from which counts are drawn as normal: the sample's own error is larger (arbitrary)
_GRID = np.unique(np.round(np.geomspace(1, 2**48, 300))).astype(np.int64)  # of occurrences: 12 % apart (arbitrary)


class SampledRoutes(Reducer):
    """All choices of some tokens, chosen by a hash of their document and their place in it.

    Parameters
    ----------
    size : int
        Tokens kept; fewer where fewer count.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"document_id", "offset"})

    def __init__(self, size: int = 65_536) -> None:
        if size < 1:
            raise ValueError(f"size={size}: at least 1")
        self.size = size

    def init(self, dataset: xr.Dataset) -> State:
        """Nothing: `key` uint64 (token) and `expert` (token, layer, k)."""
        layers, choices, _ = sizes(dataset)
        return {"key": np.zeros(0, np.uint64), "expert": np.zeros((0, layers, choices), dataset["expert"].dtype)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        row, position = np.nonzero(block["counted"])
        with np.errstate(over="ignore"):
            of_row = mixed(mixed(block["document_id"].astype(np.uint64)) + block["offset"].astype(np.uint64))
            key = mixed(of_row[row] + position.astype(np.uint64))
        few = np.flatnonzero(key <= np.partition(key, self.size - 1)[self.size - 1]) if len(key) > self.size else ...
        own = {"key": key[few], "expert": block["expert"][row[few], position[few]]}
        state.update(self.merge(state, own))

    def merge(self, state: State, other: State) -> State:
        """The tokens of the smallest keys of both."""
        key, expert = (np.concatenate([state[name], other[name]]) for name in ("key", "expert"))
        first = np.argsort(key, kind="stable")[: self.size]
        return {"key": key[first], "expert": expert[first]}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The routes, in order of their hashes."""
        _, choices, experts = sizes(dataset)
        return described(
            xr.Dataset(
                {"expert": (("token", "layer", "k"), state["expert"])}, coords={"layer": dataset["layer"].values}
            ),
            n=len(state["key"]),
            estimator="sample by hash",
            null=choices / experts,
            definition="choices of the tokens whose hashes are smallest",
            source="bottom-k sketches (Cohen & Kaplan 2007)",
        )


def vocabulary_specialization(
    dataset: xr.Dataset,
    *,
    min_count: int = 20,
    draws: int = 200,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How far tokens go to experts of their own, layer by layer.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    min_count, draws
        See `vocabulary_specialization_of`.
    threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        See `vocabulary_specialization_of`.

    Raises
    ------
    ValueError
        When `min_count` or `draws` is below 1.
    """
    counts, routes = scan(dataset, [TokenCounts(), SampledRoutes()], threads=threads, progress=progress)
    return vocabulary_specialization_of(token_experts_of(counts), routes, min_count=min_count, draws=draws)


def vocabulary_specialization_of(
    table: xr.Dataset, routes: xr.Dataset, *, min_count: int = 20, draws: int = 200
) -> xr.Dataset:
    """Vocabulary specialization from what `TokenCounts` and `SampledRoutes` counted.

    Parameters
    ----------
    table : xr.Dataset
        From `TokenCounts`, or from `token_experts_of`.
    routes : xr.Dataset
        From `SampledRoutes`, of the same layers.
    min_count : int
        Tokens that occur less often are left out.
    draws : int
        Of the null, for each number of occurrences.

    Returns
    -------
    xr.Dataset
        float64 (layer): `specialization`, the mean over token ids of the largest share of a token's occurrences
        that one expert gets (OLMoE, section 5), and `specialization_weighted`, its mean over occurrences; `null` and
        `null_weighted`, what shuffled identities give, with the standard deviations `null_sd` and `null_weighted_sd` of
        tokens that are drawn independently and of so many draws: shuffles, which share what there is, have smaller
        ones, the weighted by far;
        `mutual_information` of token and expert in bits, and `corrected` by Miller–Madow (null 0). NaN where no token
        occurs often enough.

    Raises
    ------
    ValueError
        When `min_count` or `draws` is below 1, or the tables are not of the same layers.
    """
    if min_count < 1 or draws < 1:
        raise ValueError(f"min_count={min_count}, draws={draws}: both must be at least 1")
    if table["layer"].values.tolist() != routes["layer"].values.tolist():
        here, there = (each["layer"].values.tolist() for each in (table, routes))
        raise ValueError(f"the tables are of other layers: {here} and {there}")
    frequent = table.isel(token_id=table["tokens"].values >= min_count)
    occurrences = frequent["tokens"].values
    largest = (frequent["count"] / frequent["tokens"]).max("expert") if len(occurrences) else None
    layers = table["layer"].values
    names = ("specialization", "specialization_weighted", "null", "null_weighted", "null_sd", "null_weighted_sd")
    found = {name: np.full(len(layers), np.nan) for name in names}
    if largest is not None:
        alike, by_count = np.full(len(occurrences), 1 / len(occurrences)), occurrences / occurrences.sum()
        for index in range(len(layers)):
            expert = routes["expert"].values[:, index]
            grid, mean, deviation = _null(expert, table.sizes["expert"], occurrences, int(table.attrs["n"]), draws)
            at, above = _between(grid, occurrences)
            for suffix, weight in (("", alike), ("_weighted", by_count)):
                on_grid = np.zeros(len(grid))
                np.add.at(on_grid, at, weight * (1 - above))
                np.add.at(on_grid, np.minimum(at + 1, len(grid) - 1), weight * above)
                found[f"null{suffix}"][index] = on_grid @ mean
                # Of tokens by themselves, and of the draws, which all tokens of one point of the grid share.
                of_tokens = weight**2 @ deviation[at] ** 2
                found[f"null{suffix}_sd"][index] = np.sqrt(of_tokens + on_grid**2 @ deviation**2 / draws)
            share = largest.isel(layer=index).values
            found["specialization"][index], found["specialization_weighted"][index] = share.mean(), by_count @ share
    choices, experts = routes.sizes["k"], table.sizes["expert"]
    information = association(frequent["count"], "token_id", "expert", bias=(experts - choices) / (experts - 1))
    result = xr.Dataset({name: ("layer", values) for name, values in found.items()}, coords={"layer": layers})
    return described(
        result.assign({name: information[name] for name in ("mutual_information", "corrected")}),
        n=int(occurrences.sum()),
        counted=f"occurrences of tokens that occur {min_count} times or more",
        token_ids=len(occurrences),
        min_count=min_count,
        draws=draws,
        routes_sampled=routes.attrs["n"],
        null="null, null_weighted; 0 for mutual information",
        estimator="mean over token ids, or over occurrences; the null by drawing each token's occurrences from"
        " sampled routes of all tokens",
        definition="mean over tokens x of max over experts e of N_xe / N_x",
        source="OLMoE (Muennighoff et al. 2024), section 5, vocabulary specialization",
    )


def pointwise_of(table: xr.Dataset) -> xr.Dataset:
    """The other ways to look at a table of tokens and experts.

    Parameters
    ----------
    table : xr.Dataset
        From `analysis.token_experts`.

    Returns
    -------
    xr.Dataset
        `token_given_expert`, the share of an expert's tokens that are this one, and `pmi`, pointwise mutual information
        log2(P(e given x) / P(e)) in bits (Church & Hanks 1990), −inf where never; float64 (layer, token_id, expert), as
        the table's `count`. NaN for experts that were never chosen. Null of `pmi`: 0.
    """
    of_expert = table["count"].sum("token_id")
    with np.errstate(divide="ignore"):
        pmi = np.log2(table["lift"])
    return described(
        xr.Dataset({"token_given_expert": table["count"] / of_expert.where(of_expert > 0), "pmi": pmi}),
        n=table.attrs["n"],
        null=0.0,
        estimator="maximum likelihood",
        definition="token_given_expert = N_xe / N_e; pmi = log2(P(e given x) / P(e)), whose null is 0",
        source="Church & Hanks 1990; OpenMoE (Xue et al. 2024)",
    )


def _null(expert: Array, experts: int, occurrences: Array, tokens: int, draws: int) -> tuple[Array, Array, Array]:
    """Mean and standard deviation of a token's largest share, for each number of occurrences, when drawn from all.

    Computed on a grid of occurrences, which is given first. Drawn with replacement, and drawn together as far as
    drawing without it does: by the square root of (tokens − n) / (tokens − 1).
    """
    random = np.random.default_rng(0)
    chosen = np.zeros((len(expert), experts))
    np.put_along_axis(chosen, expert.astype(np.int64), 1.0, axis=1)
    share, cov = chosen.mean(0), np.atleast_2d(np.cov(chosen.T, bias=True))
    low, high = occurrences.min(), occurrences.max()
    grid = _GRID[max(0, np.searchsorted(_GRID, low, "right") - 1) : np.searchsorted(_GRID, high) + 1]
    mean, deviation = np.zeros(len(grid)), np.zeros(len(grid))
    for index, n in enumerate(grid):
        if n < NORMAL_FROM:
            step = max(1, DRAWN_AT_ONCE // (int(n) * experts))
            parts = (min(step, draws - start) for start in range(0, draws, step))
            drawn = np.concatenate([chosen[random.integers(len(chosen), size=(part, n))].mean(1) for part in parts])
        else:
            drawn = random.multivariate_normal(share, cov / n, size=draws, method="svd")
        together = np.sqrt(max(tokens - n, 0) / max(tokens - 1, 1))
        largest: Any = (share + (drawn - share) * together).max(1)
        mean[index], deviation[index] = largest.mean(), largest.std()
    return grid, mean, deviation


def _between(grid: Array, occurrences: Array) -> tuple[Array, Array]:
    """The point of the grid at or below each number, and how far towards the next one it lies, in the logarithm."""
    at = np.clip(np.searchsorted(grid, occurrences, "right") - 1, 0, max(len(grid) - 2, 0))
    step = np.log(grid[np.minimum(at + 1, len(grid) - 1)] / grid[at])
    return at, np.divide(np.log(occurrences / grid[at]), step, out=np.zeros(len(at)), where=step > 0)
