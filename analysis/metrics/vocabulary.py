"""Do experts specialize in words? How much a token's identity says about its experts, compared with chance.

The largest share of a token's occurrences at one expert is large for rare tokens under any routing: for a token that
occurs once, it is 1. It is also large if routes depend on the document and the token is in few documents. So it is
reported with a null: the same table, counted after token identities were shuffled within each document. This keeps the
effect of documents on routes and removes the effect of tokens.

Promises: a shuffle depends on a store's shards and is the same for any number of threads or machines and any order of
shards. A document that spans several shards is shuffled within each part, so a different division of the rows into
shards gives a different shuffle of the same kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.tokens import Choice, TokenCounts
from analysis.scanning import Array, Block, State, kernel, scan
from analysis.statistics.hashing import mixed
from analysis.statistics.information import mutual_information


class ShuffledTokenCounts(TokenCounts):
    """`TokenCounts` after token identities were shuffled within each document: the effect of documents alone.

    The counted tokens of a document's consecutive rows in a shard are permuted among their places, by a generator
    seeded with a hash of the document, of the first row's offset in it, and of `draw`.

    Parameters
    ----------
    layers, choice
        See `TokenCounts`.
    draw : int
        Number of the shuffle; each number gives a different one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"document_id", "offset"})

    def __init__(self, layers: Sequence[int] | None = None, choice: Choice = "any", draw: int = 0) -> None:
        super().__init__(layers, choice)
        self.draw = draw

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        token = shuffled_tokens(block["token"], block["counted"], block["document_id"], block["offset"], self.draw)
        super().update(state, {**block, "token": token})

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The counts, labelled."""
        counts = super().finish(state, dataset)
        estimator = "counts after one shuffle of token identities within documents"
        return counts.assign_attrs(estimator=estimator, draw=self.draw)


def shuffled_tokens(token: Array, counted: Array, document_id: Array, offset: Array, draw: int) -> Array:
    """Token ids (row, position) with the counted ones permuted within runs of rows of one document."""
    with np.errstate(over="ignore"):
        seed = mixed(mixed(mixed(document_id.astype(np.uint64)) + offset.astype(np.uint64)) + np.uint64(draw))
    shuffled = np.ascontiguousarray(token).copy()
    _shuffle(shuffled.reshape(-1), counted, document_id, seed)
    return shuffled


def vocabulary_specialization(
    dataset: xr.Dataset,
    *,
    choice: Choice = "any",
    min_count: int = 20,
    draws: int = 1,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How far tokens go to specific experts, layer by layer.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    choice : {"any", "first"}
        OLMoE's two forms: a token is counted at all of its k choices, or only at its first one (top-1).
    min_count
        See `vocabulary_specialization_of`.
    draws : int
        Number of shuffles for the null. Each needs a table as large as that of `TokenCounts` in every thread, and takes
        about as long. One is enough if many tokens are frequent; several give the spread of the null on small data.
    threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        See `vocabulary_specialization_of`.

    Raises
    ------
    ValueError
        When `min_count` or `draws` is below 1, or `choice` has another value.
    """
    if draws < 1:
        raise ValueError(f"draws={draws}: must be at least 1")
    asked = [TokenCounts(choice=choice), *(ShuffledTokenCounts(choice=choice, draw=draw) for draw in range(draws))]
    table, *shuffled = scan(dataset, asked, threads=threads, progress=progress)
    return vocabulary_specialization_of(table, shuffled, min_count=min_count)


def vocabulary_specialization_of(
    table: xr.Dataset, shuffled: Sequence[xr.Dataset], *, min_count: int = 20
) -> xr.Dataset:
    """Vocabulary specialization from the counts of `TokenCounts` and `ShuffledTokenCounts`.

    Parameters
    ----------
    table : xr.Dataset
        From `TokenCounts`.
    shuffled : sequence of xr.Dataset
        From `ShuffledTokenCounts`, for the same tokens, layers and choice; one for each draw.
    min_count : int
        Tokens that occur less often are left out.

    Returns
    -------
    xr.Dataset
        float64 (layer): `specialization`, the mean over token ids of the largest share of a token's occurrences at one
        expert (OLMoE, section 5), and `specialization_weighted`, its mean over occurrences; `null` and `null_weighted`,
        their means over the shuffles, with the standard deviations of one shuffle `null_sd` and `null_weighted_sd`, NaN
        for a single shuffle; `mutual_information` of token and expert in bits, its mean over the shuffles
        `null_information`, and `corrected`, the difference, which is 0 if routes depend on documents only. NaN if no
        token occurs often enough.

    Raises
    ------
    ValueError
        When `min_count` is below 1, there is no shuffle, or the tables do not cover the same tokens and layers.
    """
    if min_count < 1 or not shuffled:
        raise ValueError(f"min_count={min_count}, {len(shuffled)} shuffled tables: both must be at least 1")
    own, *drawn = (_summary(each, min_count) for each in (table, *_alike(table, shuffled)))
    by_chance = xr.concat(drawn, "draw")
    mean = by_chance.mean("draw", skipna=False)
    deviation = by_chance.std("draw", ddof=1, skipna=False) if len(drawn) > 1 else mean * np.nan
    frequent = table["tokens"].values[table["tokens"].values >= min_count]
    result = {
        "specialization": own["plain"],
        "specialization_weighted": own["weighted"],
        "null": mean["plain"],
        "null_weighted": mean["weighted"],
        "null_sd": deviation["plain"],
        "null_weighted_sd": deviation["weighted"],
        "mutual_information": own["information"].assign_attrs(units="bits"),
        "null_information": mean["information"].assign_attrs(units="bits"),
        "corrected": (own["information"] - mean["information"]).assign_attrs(units="bits", null=0.0),
    }
    return described(
        xr.Dataset(result, coords={"layer": table["layer"].values}),
        n=int(frequent.sum()),
        counted=f"occurrences of tokens that occur at least {min_count} times",
        token_ids=len(frequent),
        min_count=min_count,
        draws=len(drawn),
        choice=table.attrs["choice"],
        null="null, null_weighted and null_information: token identities shuffled within documents",
        estimator="mean over token ids, or over occurrences; mutual information by maximum likelihood, corrected by its"
        " mean over the shuffles",
        definition=f"mean over tokens x of max over experts e of N_xe / N_x, N_xe by {table.attrs['choice']} choice",
        source="OLMoE (Muennighoff et al. 2024), section 5, vocabulary specialization",
    )


def _alike(table: xr.Dataset, shuffled: Sequence[xr.Dataset]) -> Sequence[xr.Dataset]:
    """The shuffled tables, checked to match the table's capture."""
    for each in shuffled:
        here, there = (one["layer"].values.tolist() for one in (table, each))
        if here != there:
            raise ValueError(f"the tables have different layers: {here} and {there}")
        if not np.array_equal(table["tokens"], each["tokens"]) or table.attrs["choice"] != each.attrs["choice"]:
            raise ValueError(
                f"the tables have different tokens or choices: {table.attrs['n']:,} tokens by {table.attrs['choice']}"
                f" choice, and {each.attrs['n']:,} by {each.attrs['choice']}; count both in one scan"
            )
    return shuffled


def _summary(table: xr.Dataset, min_count: int) -> xr.Dataset:
    """Mean largest share over token ids and over occurrences, and mutual information in bits, of frequent tokens."""
    frequent = table.isel(token_id=np.flatnonzero(table["tokens"].values >= min_count))
    count, occurrences = frequent["counts"].astype(np.int64), frequent["tokens"]
    most, n = count.max("expert"), float(occurrences.sum()) or np.nan
    return xr.Dataset(
        {
            "plain": (most / occurrences).sum("token_id") / (len(occurrences) or np.nan),
            "weighted": most.sum("token_id") / n,
            "information": mutual_information(count, "token_id", "expert"),
        }
    )


def pointwise_of(table: xr.Dataset) -> xr.Dataset:
    """Other views of a table of tokens and experts.

    Parameters
    ----------
    table : xr.Dataset
        From `analysis.token_experts`.

    Returns
    -------
    xr.Dataset
        `token_given_expert`, the token's share of an expert's tokens, and `pmi`, pointwise mutual information log2(P(e
        given x) / P(e)) in bits (Church & Hanks 1990), −inf for pairs that never occur; float64 (layer, token_id,
        expert), like the table's `counts`. NaN for experts that were never chosen. Null of `pmi`: 0.
    """
    of_expert = table["counts"].sum("token_id")
    with np.errstate(divide="ignore"):
        pmi = np.log2(table["lift"])
    return described(
        xr.Dataset({"token_given_expert": table["counts"] / of_expert.where(of_expert > 0), "pmi": pmi}),
        n=table.attrs["n"],
        null=0.0,
        estimator="maximum likelihood",
        definition="token_given_expert = N_xe / N_e; pmi = log2(P(e given x) / P(e)), whose null is 0",
        source="Church & Hanks 1990; OpenMoE (Xue et al. 2024)",
    )


@kernel
def _shuffle(token: Array, counted: Array, document_id: Array, seed: Array) -> None:
    """Permute the counted tokens of each run of rows of one document in place (Fisher–Yates with SplitMix64)."""
    rows, positions = counted.shape
    place = np.empty(counted.size, dtype=np.int64)
    start = 0
    while start < rows:
        stop, n = start, 0
        while stop < rows and document_id[stop] == document_id[start]:
            for position in range(positions):
                if counted[stop, position]:
                    place[n] = stop * positions + position
                    n += 1
            stop += 1
        state = seed[start]
        for last in range(n - 1, 0, -1):
            state += np.uint64(0x9E3779B97F4A7C15)
            number = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            number ^= number >> np.uint64(31)
            # The upper 32 bits, scaled to 0 … last (Lemire 2019); uniform to one in 2**32 / n.
            other = np.int64(((number >> np.uint64(32)) * np.uint64(last + 1)) >> np.uint64(32))
            here, there = place[last], place[other]
            token[here], token[there] = token[there], token[here]
        start = stop
