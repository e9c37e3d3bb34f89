"""The paths of some tokens through the layers: their first choices, and the transitions between these.

The tokens are selected before the scan: `frequent_ids` reads a part of the planned text, whose token ids are known
without any route. Rare tokens are not candidates, because their transitions would be mostly chance. Promises exact
counts for the given tokens. Does not know about other tokens: see `analysis.metrics.choices`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import Array, Block, Reducer, State, kernel, labelled, shards_to_read, sizes

SHARDS_LOOKED_AT = 4  # for finding frequent tokens: a million tokens with the default shards (arbitrary)


class TokenPaths(Reducer):
    """First choices of some tokens by layer, and their transitions.

    Parameters
    ----------
    tokens : sequence of int
        Token ids.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError(f"tokens {self.tokens}: an id is repeated")

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `tokens` (token), `first` (token, layer, expert) and `followed` (token, lower layer, expert, next).

        In 32 bits, because many experts take much space.
        """
        layers, _, experts = sizes(dataset)
        count = len(self.tokens)
        slot = np.full(dataset.sizes["token_id"], -1, np.int64)
        slot[list(self.tokens)] = np.arange(count)
        return {
            "tokens": np.zeros(count, np.int64),
            "first": np.zeros((count, layers, experts), np.uint32),
            "followed": np.zeros((count, max(0, layers - 1), experts, experts), np.uint32),
            "slot": slot,
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        if state["tokens"].sum() + block["counted"].size > np.iinfo(state["followed"].dtype).max:
            _widen(state)
        counts = (state[name] for name in ("slot", "tokens", "first", "followed"))
        _add_paths(block["expert"], block["token"], block["counted"], *counts)

    def merge(self, state: State, other: State) -> State:
        """Sum the counts; both cover the same tokens."""
        if state["tokens"].sum() + other["tokens"].sum() > np.iinfo(state["followed"].dtype).max:
            _widen(state)
        return super().merge(state, other) | {"slot": state["slot"]}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The counts, labelled."""
        layer, experts = dataset["layer"].values, np.arange(sizes(dataset)[2])
        ids = np.array(self.tokens, dtype=np.int64)
        step = ("token_id", "lower_layer", "expert", "next_expert")
        result = xr.Dataset(
            {
                "tokens": ("token_id", state["tokens"], {"units": "tokens"}),
                "first": labelled(state["first"], "token_id", "layer", "expert").assign_attrs(units="tokens"),
                "followed": labelled(state["followed"], *step).assign_attrs(units="tokens"),
            },
            coords={
                "token_id": ids,
                "piece": ("token_id", dataset["piece"].isel(token_id=ids).values.astype(object)),
                "layer": layer,
                "lower_layer": layer[:-1],
                "expert": experts,
                "next_expert": experts,
            },
        )
        return described(
            result,
            n=int(state["tokens"].sum()),
            counted="occurrences of these tokens",
            estimator="counts",
            null="even tables",
            definition="occurrences of a token by its first choice at a layer, and by its first choices at two"
            " neighbouring layers",
            source="OLMoE (Muennighoff et al. 2024), cross-layer flow, here for one token",
        )


def frequent_ids(dataset: xr.Dataset, count: int) -> list[int]:
    """The most frequent token ids in a part of the capture, most frequent first, without special tokens.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture; `token` is read from `SHARDS_LOOKED_AT` evenly spaced shards.
    count : int
        Number of ids; fewer if fewer occur.

    Returns
    -------
    list of int
        Token ids.
    """
    shards = shards_to_read(dataset)
    spread = np.unique(np.linspace(0, len(shards) - 1, min(SHARDS_LOOKED_AT, len(shards))).astype(int))
    occurrences = np.zeros(dataset.sizes["token_id"], np.int64)
    for index in spread if shards else ():
        token = dataset["token"].variable.isel(doc=shards[index]).load(scheduler="synchronous").values
        known = token[(token >= 0) & (token < len(occurrences))]  # a damaged id is rejected by the scan
        occurrences += np.bincount(known, minlength=len(occurrences))
    occurrences[list(dataset.attrs["special_token_ids"])] = 0
    order = np.argsort(-occurrences, kind="stable")[:count]
    return [int(token) for token in order if occurrences[token]]


def telling(paths: xr.Dataset, load: xr.Dataset, count: int, *, min_count: int) -> xr.Dataset:
    """A selection of the tokens, with information about their first choices: half of them because they are frequent,
    half because their paths differ most.

    Parameters
    ----------
    paths : xr.Dataset
        From `TokenPaths`.
    load : xr.Dataset
        From `analysis.metrics.load.expert_load`, for the same capture.
    count : int
        Number of tokens to return.
    min_count : int
        The least number of occurrences of a token.

    Returns
    -------
    xr.Dataset
        As `paths`, most frequent token first, with `apart` float64 (token_id): how far its first choices are from all
        tokens', Kullback–Leibler divergence in bits, mean over layers, minus the value expected for as many random
        draws (Miller–Madow); and int64 (token_id) `telling_layer` and `telling_expert`, the largest contribution to it.
    """
    paths = paths.isel(token_id=np.flatnonzero(paths["tokens"].values >= min_count))
    paths = paths.isel(token_id=np.argsort(-paths["tokens"].values, kind="stable"))
    usual = load["counts"].isel(k=0, drop=True)
    usual = usual / usual.sum("expert")
    own = paths["first"] / paths["tokens"]
    bits = (own * np.log2((own / usual).where(own > 0))).fillna(0.0).transpose("token_id", "layer", "expert")
    by_chance = ((usual > 0).sum("expert") - 1) / (2 * np.log(2) * paths["tokens"])
    most = np.array([each.argmax() for each in bits.values], dtype=np.int64)
    layer, expert = np.unravel_index(most, bits.shape[1:])
    paths = paths.assign(
        apart=(bits.sum("expert") - by_chance).mean("layer"),
        telling_layer=("token_id", paths["layer"].values[layer]),
        telling_expert=("token_id", paths["expert"].values[expert]),
    )
    frequent = np.arange(min(-(-count // 2), paths.sizes["token_id"]))
    rest = np.arange(len(frequent), paths.sizes["token_id"])
    special = rest[np.argsort(-paths["apart"].values[rest], kind="stable")[: count - len(frequent)]]
    found = paths.isel(token_id=np.sort(np.concatenate([frequent, special])))
    return described(
        found,
        n=int(found["tokens"].sum()),
        counted="occurrences of these tokens",
        estimator="plug-in, minus the Miller–Madow bias",
        null=0.0,
        definition="apart: mean over layers of Σ over experts of P(e given x) log2(P(e given x) / P(e))",
        source="Kullback & Leibler 1951",
    )


def _widen(state: State) -> None:
    for name in ("first", "followed"):
        state[name] = state[name].astype(np.int64)


@kernel
def _add_paths(
    expert: Array, token: Array, counted: Array, slot: Array, tokens: Array, first: Array, followed: Array
) -> None:
    rows, positions, layers, _ = expert.shape
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position] or slot[token[row, position]] < 0:
                continue
            own, chosen = slot[token[row, position]], expert[row, position]
            tokens[own] += 1
            for layer in range(layers):
                first[own, layer, chosen[layer, 0]] += 1
            for layer in range(layers - 1):
                followed[own, layer, chosen[layer, 0], chosen[layer + 1, 0]] += 1
