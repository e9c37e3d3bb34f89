"""Which experts a token goes to, and which tokens an expert gets: the notebook's two dictionaries, counted.

A token is counted at an expert when that expert is any of its k choices. Promises exact counts for any
layers; the table takes 4 × vocabulary × layers × experts bytes (33 MB for all of Mixtral) in each
thread. Does not know text: pieces are the tokenizer's own ("▁the", "<0x0A>"), as the store keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr

from analysis.scan import Array, Block, Reducer, State, kernel, scan, sizes

Order = Literal["count", "lift"]
Layers = int | Sequence[int] | None

_SOURCE = "OLMoE (Muennighoff et al. 2024), section 5, vocabulary specialization; OpenMoE (Xue et al. 2024)"


class TokenExperts(Reducer):
    """Counts by layer, token id and expert, for chosen layers.

    Parameters
    ----------
    layers : sequence of int, optional
        The model's layer numbers to count; default all that were captured.
    """

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        self.layers = layers

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` (token_id, layer, expert) and `tokens` (token_id), and layer indices.

        A token's counts lie together, in 32 bits: a quarter of the time that a table for each layer takes (measured).
        """
        index = _layer_index(dataset, self.layers)
        vocabulary, (_, _, experts) = dataset.sizes["token_id"], sizes(dataset)
        return {
            "count": np.zeros((vocabulary, index.size, experts), dtype=np.uint32),
            "tokens": np.zeros(vocabulary, dtype=np.int64),
            "index": index,
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        arrays = (block["expert"], block["token"], block["counted"])
        if state["tokens"].sum() + arrays[2].size > np.iinfo(state["count"].dtype).max:
            state["count"] = state["count"].astype(np.int64)
        _add_tokens(*arrays, state["index"], state["count"], state["tokens"])

    def merge(self, state: State, other: State) -> State:
        """Sum the counts; both hold the same layers."""
        tokens = state["tokens"] + other["tokens"]
        fits = tokens.sum() <= np.iinfo(np.uint32).max
        count = state["count"] if fits else state["count"].astype(np.int64)
        count += other["count"].astype(count.dtype, copy=False)
        return {"count": count, "tokens": tokens, "index": state["index"]}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The table of the tokens that occur, with shares, lifts and pieces."""
        return _table(state, dataset, slice(None))


class TopTokens(TokenExperts):
    """As `TokenExperts`, but finishes with each expert's first tokens only, one layer at a time in memory."""

    def __init__(
        self, layers: Sequence[int] | None = None, *, top: int = 20, by: Order = "count", min_count: int = 1
    ) -> None:
        super().__init__(layers)
        if by not in ("count", "lift"):
            raise ValueError(f"by={by!r}: tokens are ordered by 'count' or by 'lift'")
        if top < 1 or min_count < 1:
            raise ValueError(f"top={top}, min_count={min_count}: both must be at least 1")
        self.top, self.by, self.min_count = top, by, min_count

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The first `top` tokens of each expert at each layer."""
        ranked = []
        for slot in range(state["index"].size):
            table = _table(state, dataset, slice(slot, slot + 1))
            ranked.append(_rank(table, top=self.top, by=self.by, min_count=self.min_count))
        result = xr.concat(ranked, "layer", combine_attrs="override")
        return result.assign_attrs(order=self.by, min_count=self.min_count)


class TokenCounts(TokenExperts):
    """As `TokenExperts`, but finishes with the counts alone: shares and lifts of all layers take six times as much."""

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """What was counted: `count` (token_id, layer, expert) and `tokens` (token_id), all ids of the vocabulary."""
        dims = ("token_id", "layer", "expert")
        variables = {"count": (dims, state["count"]), "tokens": ("token_id", state["tokens"])}
        return xr.Dataset(variables, {"layer": dataset["layer"].values[state["index"]]})


def token_experts(dataset: xr.Dataset, layer: Layers = None, *, threads: int | None = None) -> xr.Dataset:
    """For every token that occurs, how often it was sent to each expert.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    layer : int or sequence of int, optional
        The model's own layer numbers; default all. For one number the result has no `layer` dimension.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        `count` int64, `share` and `lift` float64 (layer, token_id, expert), `tokens` int64 (token_id); the
        coordinate `piece` makes ids readable. `share` sums to k over experts; its null is k/E, that of
        `lift` is 1 (NaN for an expert that was never chosen).

    Raises
    ------
    ValueError
        When a layer was not captured; the message names those that were.
    """
    layers, one = _numbers(layer)
    table = scan(dataset, [TokenExperts(layers)], threads=threads)[0]
    return table.isel(layer=0) if one else table


def expert_tokens(
    dataset: xr.Dataset,
    layer: Layers = None,
    *,
    top: int = 20,
    by: Order = "count",
    min_count: int = 1,
    threads: int | None = None,
) -> xr.Dataset:
    """For every expert, the tokens it gets most often, or most out of proportion.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    layer : int or sequence of int, optional
        The model's own layer numbers; default all.
    top : int
        Tokens listed for each expert.
    by : {"count", "lift"}
        Order: by how often the expert got the token, or by how much more often than other tokens.
    min_count : int
        Tokens that occur less often are left out; a lift of a rare token is mostly luck.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        Over (layer, expert, rank): `token_id` int64 (-1 where the expert has fewer tokens), `piece`, `count`
        and `tokens` int64, `share` of the token's occurrences and `lift` float64. Ties go to the more
        frequent, then to the lower id. For one layer number the result has no `layer` dimension.
    """
    layers, one = _numbers(layer)
    ranked = scan(dataset, [TopTokens(layers, top=top, by=by, min_count=min_count)], threads=threads)[0]
    return ranked.isel(layer=0) if one else ranked


def _table(state: State, dataset: xr.Dataset, slots: slice) -> xr.Dataset:
    """Counts, shares and lifts of the tokens that occur, for some of the counted layers."""
    _, choices, experts = sizes(dataset)
    seen = np.flatnonzero(state["tokens"])
    counted = state["count"][seen, slots].astype(np.int64).swapaxes(0, 1)
    count = xr.DataArray(np.ascontiguousarray(counted), dims=("layer", "token_id", "expert"))
    tokens = xr.DataArray(state["tokens"][seen], dims=("token_id",))
    n = int(tokens.sum())
    per_expert = count.sum("token_id")
    share = count / tokens
    lift = share * n / per_expert.where(per_expert > 0)
    result = xr.Dataset(
        {
            "count": count.assign_attrs(long_name="times the token was sent to the expert", units="tokens"),
            "tokens": tokens.assign_attrs(long_name="occurrences of the token", units="tokens"),
            "share": share.assign_attrs(long_name="share of the token's occurrences sent to the expert"),
            "lift": lift.assign_attrs(long_name="share over the share of all tokens sent to the expert"),
        },
        coords={
            "layer": dataset["layer"].values[state["index"]][slots],
            "expert": np.arange(experts),
            "token_id": seen,
            "piece": ("token_id", dataset["piece"].isel(token_id=seen).values.astype(object)),
        },
    )
    return result.assign_attrs(
        n=n,
        estimator="maximum likelihood",
        null=choices / experts,
        null_lift=1.0,
        definition="share = N_xe / N_x: occurrences of token x with expert e among the k choices, over all"
        " of x; lift = share / (N_e / T)",
        source=_SOURCE,
    )


def _rank(table: xr.Dataset, *, top: int, by: Order, min_count: int) -> xr.Dataset:
    """The first `top` tokens of each expert in a table."""
    dims = ("layer", "expert", "token_id")
    values = {name: table[name].transpose(*dims).values for name in ("count", "share", "lift")}
    shape = values["count"].shape
    for name in ("tokens", "token_id", "piece"):
        values[name] = np.broadcast_to(table[name].values, shape)
    listed = (values["count"] > 0) & (values["tokens"] >= min_count)
    # lexsort: the last key leads, and equals keep their order, which is that of ids. An expert's tokens have
    # the same order by lift as by share, and equal shares are equal floats.
    keys = (-values["count"],) if by == "count" else (-values["count"], -values["share"])
    order = np.lexsort((*keys, ~listed), axis=-1)[..., :top]
    empty = ~np.take_along_axis(listed, order, -1)
    absent = {"token_id": -1, "piece": "", "count": 0, "tokens": 0, "share": np.nan, "lift": np.nan}
    ranked = {}
    for name, missing in absent.items():
        picked = np.take_along_axis(values[name], order, -1)
        picked[empty] = missing
        ranked[name] = (("layer", "expert", "rank"), picked, table[name].attrs)
    coords = {"layer": table["layer"].values, "expert": table["expert"].values}
    return xr.Dataset(ranked, {**coords, "rank": np.arange(1, order.shape[-1] + 1)}, table.attrs)


def _numbers(layer: Layers) -> tuple[Sequence[int] | None, bool]:
    """Layer numbers as a sequence, and whether the caller asked for just one."""
    if isinstance(layer, int | np.integer):
        return [int(layer)], True
    return layer, False


def _layer_index(dataset: xr.Dataset, layers: Sequence[int] | None) -> Array:
    captured = [int(number) for number in dataset["layer"].values]
    unknown = sorted(set(layers or ()) - set(captured))
    if unknown:
        raise ValueError(f"layers {unknown} were not captured; this capture has {captured}")
    wanted = captured if layers is None else layers
    return np.array([captured.index(number) for number in wanted], dtype=np.int64)


@kernel
def _add_tokens(expert: Array, token: Array, counted: Array, index: Array, count: Array, tokens: Array) -> None:
    rows, positions, _, choices = expert.shape
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position]:
                continue
            x = token[row, position]
            tokens[x] += 1
            of_token = count[x]
            for slot in range(index.size):
                for k in range(choices):
                    of_token[slot, expert[row, position, index[slot], k]] += 1


def at_layer(counts: xr.Dataset, layer: int) -> State:
    """What `TokenCounts` counted at one layer, for `TokenExperts.finish` or `TopTokens.finish` with the whole capture.

    Raises
    ------
    ValueError
        When the layer was not captured.
    """
    captured = counts["layer"].values.tolist()
    if layer not in captured:
        raise ValueError(f"layer {layer} was not captured; this capture has {captured}")
    slot = [captured.index(layer)]
    return {"count": counts["count"].values[:, slot], "tokens": counts["tokens"].values, "index": np.array(slot)}
