"""Which experts a token goes to, and which tokens an expert gets: the two dictionaries of the original notebook.

A token is counted at an expert if that expert is any of its k choices. Promises exact counts for any layers; the table
takes 4 × vocabulary × layers × experts bytes (33 MB for all of Mixtral) in each thread. Does not know text: pieces are
those of the tokenizer ("▁the", "<0x0A>"), as in the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import Array, Block, Reducer, State, kernel, scan, sizes

TokenOrder = Literal["count", "lift"]
Choice = Literal["any", "first"]
Layers = int | Sequence[int] | None

_AMONG = {"any": "among the k choices", "first": "as the first choice"}
_SOURCE = "OLMoE (Muennighoff et al. 2024), section 5, vocabulary specialization; OpenMoE (Xue et al. 2024)"


class TokenCounts(Reducer):
    """Counts by token id, layer and expert, for selected layers: the input of `token_experts_of` and
    `expert_tokens_of`.

    Parameters
    ----------
    layers : sequence of int, optional
        The model's layer numbers to count; default all that were captured.
    choice : {"any", "first"}
        Count a token at an expert that is any of its k choices, or only at its first choice.

    Raises
    ------
    ValueError
        When `choice` has another value.
    """

    def __init__(self, layers: Sequence[int] | None = None, choice: Choice = "any") -> None:
        if choice not in ("any", "first"):
            raise ValueError(f"choice={choice!r}: must be 'any' (all choices of a token) or 'first' (its first one)")
        self.layers, self.choice = layers, choice

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` (token_id, layer, expert) and `tokens` (token_id), and layer indices.

        A token's counts are contiguous, in 32 bits, which takes a quarter of the time of a table for each layer
        (measured).
        """
        index = layer_index(dataset["layer"].values, self.layers)
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
        choices = 1 if self.choice == "first" else block["expert"].shape[-1]
        add_tokens(*arrays, state["index"], choices, state["count"], state["tokens"])

    def merge(self, state: State, other: State) -> State:
        """Sum the counts; both hold the same layers."""
        tokens = state["tokens"] + other["tokens"]
        fits = tokens.sum() <= np.iinfo(np.uint32).max
        count = state["count"] if fits else state["count"].astype(np.int64)
        count += other["count"].astype(count.dtype, copy=False)
        return {"count": count, "tokens": tokens, "index": state["index"]}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The counts, labelled."""
        layers = dataset["layer"].values[state["index"]]
        return label_counts(state["count"], state["tokens"], layers, dataset, self.choice)


def label_counts(
    count: Array, tokens: Array, layers: Sequence[int] | Array, dataset: xr.Dataset, choice: Choice = "any"
) -> xr.Dataset:
    """The result of `TokenCounts`, from counts that were made elsewhere.

    Parameters
    ----------
    count, tokens : int array, shapes (token_id, layer, expert) and (token_id)
        Counts of all ids of the vocabulary.
    layers : sequence of int
        The model's layer numbers.
    dataset : xr.Dataset
        The capture.
    choice : {"any", "first"}
        Which choices were counted.

    Returns
    -------
    xr.Dataset
        `counts` (token_id, layer, expert) and `tokens` (token_id), in tokens, unchanged; `piece` (token_id).
    """
    _, choices, experts = sizes(dataset)
    return described(
        xr.Dataset(
            {
                "counts": (("token_id", "layer", "expert"), count, {"units": "tokens"}),
                "tokens": ("token_id", tokens, {"units": "tokens"}),
            },
            coords={
                "token_id": np.arange(len(tokens)),
                "layer": layers,
                "expert": np.arange(experts),
                "piece": ("token_id", dataset["piece"].values.astype(object)),
            },
        ),
        n=int(tokens.sum()),
        estimator="counts",
        null="even tables",
        definition=f"occurrences of a token with an expert {_AMONG[choice]} at a layer; occurrences of the token",
        source=_SOURCE,
        choice=choice,
        experts_per_token=1 if choice == "first" else choices,
    )


def token_experts(dataset: xr.Dataset, layer: Layers = None, *, threads: int | None = None) -> xr.Dataset:
    """How often every token that occurs was sent to each expert.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    layer : int or sequence of int, optional
        The model's own layer numbers; default all. For one number the result has no `layer` dimension.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        See `token_experts_of`.

    Raises
    ------
    ValueError
        When a layer was not captured; the message lists the captured ones.
    """
    return token_experts_of(scan(dataset, [TokenCounts(_numbers(layer))], threads=threads)[0], layer)


def token_experts_of(counts: xr.Dataset, layer: Layers = None) -> xr.Dataset:
    """How often every token that occurs was sent to each expert, from the counts of `TokenCounts`.

    Parameters
    ----------
    counts : xr.Dataset
        From `TokenCounts`.
    layer : int or sequence of int, optional
        The model's own layer numbers; default all that were counted. For one number the result has no `layer`
        dimension. Shares and lifts of all layers take six times the memory of the counts.

    Returns
    -------
    xr.Dataset
        `counts` int64, `share` and `lift` float64 (layer, token_id, expert), `tokens` int64 (token_id); the
        coordinate `piece` makes ids readable. `share` sums to k over experts; its null is k/E, that of
        `lift` is 1 (NaN for an expert that was never chosen).

    Raises
    ------
    ValueError
        When a layer was not counted; the message names those that were.
    """
    table = _table(_at(counts, layer))
    table = table.assign_coords(piece=("token_id", counts["piece"].values[table["token_id"].values]))
    return table.isel(layer=0) if _is_one(layer) else table


def expert_tokens(
    dataset: xr.Dataset,
    layer: Layers = None,
    *,
    top: int = 20,
    by: TokenOrder = "count",
    min_count: int = 1,
    threads: int | None = None,
) -> xr.Dataset:
    """For every expert, its most frequent tokens, or those with the highest lift.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    layer : int or sequence of int, optional
        The model's own layer numbers; default all.
    top, by, min_count
        See `expert_tokens_of`.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        See `expert_tokens_of`.

    Raises
    ------
    ValueError
        When a layer was not captured, or an option is invalid.
    """
    check_ranking(top=top, by=by, min_count=min_count)
    counts = scan(dataset, [TokenCounts(_numbers(layer))], threads=threads)[0]
    return expert_tokens_of(counts, layer, top=top, by=by, min_count=min_count)


def expert_tokens_of(
    counts: xr.Dataset,
    layer: Layers = None,
    *,
    top: int = 20,
    by: TokenOrder = "count",
    min_count: int = 1,
    shuffled: xr.Dataset | None = None,
) -> xr.Dataset:
    """For every expert, its first tokens, from the counts of `TokenCounts`; one layer at a time in memory.

    Parameters
    ----------
    counts : xr.Dataset
        From `TokenCounts`.
    layer : int or sequence of int, optional
        The model's own layer numbers; default all that were counted.
    top : int
        Number of tokens to list per expert.
    by : {"count", "lift"}
        Order by how often the expert got the token, or by lift.
    min_count : int
        Tokens that occur less often are left out, because the lift of a rare token is mostly chance.
    shuffled : xr.Dataset, optional
        From `ShuffledTokenCounts`, for the same capture and layers.

    Returns
    -------
    xr.Dataset
        Over (layer, expert, place): `token_id` int64 (-1 if the expert has fewer tokens), `piece`, `counts` and
        `tokens` int64, `share` of the token's occurrences and `lift` float64. Ties go to the more frequent, then to the
        lower id. With `shuffled` also `lift_within` float64: the count over that of tokens shuffled within their
        documents, with 0 replaced by 1; its null is 1, while a lift may be due to the token's documents. For one layer
        number the result has no `layer` dimension.

    Raises
    ------
    ValueError
        When a layer was not counted, or an option is invalid.
    """
    check_ranking(top=top, by=by, min_count=min_count)
    wanted, by_chance = _at(counts, layer), None if shuffled is None else _at(shuffled, layer)
    ranked = []
    for part in (slice(at, at + 1) for at in range(wanted.sizes["layer"])):
        table = _table(wanted.isel(layer=part))
        if by_chance is not None:
            table = _beside(table, by_chance.isel(layer=part))
        ranked.append(_rank(table, top=top, by=by, min_count=min_count))
    result = xr.concat(ranked, "layer", combine_attrs="override").assign_attrs(order=by, min_count=min_count)
    pieces = np.append(counts["piece"].values, "")  # the last stands for no token, -1
    result = result.assign(piece=(result["token_id"].dims, pieces[result["token_id"].values]))
    return result.isel(layer=0) if _is_one(layer) else result


def check_ranking(*, top: int, by: TokenOrder, min_count: int) -> None:
    """Raise the ValueError of `expert_tokens_of` before anything is counted."""
    if by not in ("count", "lift"):
        raise ValueError(f"by={by!r}: must be 'count' or 'lift'")
    if top < 1 or min_count < 1:
        raise ValueError(f"top={top}, min_count={min_count}: both must be at least 1")


def _table(counts: xr.Dataset) -> xr.Dataset:
    """Counts, shares and lifts of the tokens that occur, without their pieces."""
    tokens, choices = counts["tokens"].values, int(counts.attrs["experts_per_token"])
    seen = np.flatnonzero(tokens)
    counted = counts["counts"].values[seen].astype(np.int64).swapaxes(0, 1)
    count = xr.DataArray(np.ascontiguousarray(counted), dims=("layer", "token_id", "expert"))
    occurrences = xr.DataArray(tokens[seen], dims=("token_id",))
    n = int(occurrences.sum())
    per_expert = count.sum("token_id")
    share = count / occurrences
    lift = share * n / per_expert.where(per_expert > 0)
    result = xr.Dataset(
        {
            "counts": count.assign_attrs(long_name="times the token was sent to the expert", units="tokens"),
            "tokens": occurrences.assign_attrs(long_name="occurrences of the token", units="tokens"),
            "share": share.assign_attrs(long_name="share of the token's occurrences sent to the expert"),
            "lift": lift.assign_attrs(long_name="share over the share of all tokens sent to the expert"),
        },
        coords={
            "layer": counts["layer"].values,
            "expert": counts["expert"].values,
            "token_id": seen,
        },
    )
    return described(
        result,
        n=n,
        estimator="maximum likelihood",
        null=choices / counts.sizes["expert"],
        null_lift=1.0,
        definition=f"share = N_xe / N_x: occurrences of token x with expert e {_AMONG[counts.attrs['choice']]}, over"
        " all occurrences of x; lift = share / (N_e / T)",
        source=_SOURCE,
    )


def _beside(table: xr.Dataset, shuffled: xr.Dataset) -> xr.Dataset:
    """A table with the lift within documents."""
    place = shuffled.get_index("token_id").get_indexer(table["token_id"].values)
    by_chance = shuffled["counts"].variable.isel(token_id=place)  # with its coordinates, the pieces would be copied
    within = (table["counts"].variable / np.maximum(by_chance, 1)).transpose(*table["counts"].dims)
    about = f"{table.attrs['definition']}; lift_within = N_xe over that of tokens shuffled within their documents"
    within.attrs["long_name"] = "count over that of tokens shuffled within documents"
    return table.assign(lift_within=within).assign_attrs(definition=about)


def _rank(table: xr.Dataset, *, top: int, by: TokenOrder, min_count: int) -> xr.Dataset:
    """The first `top` tokens of each expert in a table."""
    dims = ("layer", "expert", "token_id")
    absent = {"token_id": -1, "counts": 0, "tokens": 0, "share": np.nan, "lift": np.nan}
    if "lift_within" in table:
        absent["lift_within"] = np.nan
    values = {name: table[name].transpose(*dims).values for name in absent if table[name].ndim == len(dims)}
    shape = values["counts"].shape
    for name in ("tokens", "token_id"):
        values[name] = np.broadcast_to(table[name].values, shape)
    listed = (values["counts"] > 0) & (values["tokens"] >= min_count)
    # The last key is the primary one, and ties keep their order, which is that of ids. An expert's tokens have the same
    # order by lift as by share, and equal shares are equal floats.
    keys = (-values["counts"],) if by == "count" else (-values["counts"], -values["share"])
    order = _first(keys, listed, top)
    empty = ~np.take_along_axis(listed, order, -1)
    ranked = {}
    for name, missing in absent.items():
        picked = np.take_along_axis(values[name], order, -1)
        picked[empty] = missing
        ranked[name] = (("layer", "expert", "place"), picked, table[name].attrs)
    coords = {"layer": table["layer"].values, "expert": table["expert"].values}
    return xr.Dataset(ranked, {**coords, "place": np.arange(1, order.shape[-1] + 1)}, table.attrs)


def _first(keys: Sequence[Array], listed: Array, top: int) -> Array:
    """`np.lexsort((*keys, ~listed))[..., :top]` for listed tokens, followed by others.

    Only tokens that can be among the first `top` are sorted.
    """
    size = min(top, listed.shape[-1])
    if size == 0:
        return np.zeros((*listed.shape[:-1], 0), np.int64)
    leading = np.where(listed, keys[-1], np.inf)
    last = np.partition(leading, size - 1, axis=-1)[..., size - 1]
    order = np.empty((*last.shape, size), np.int64)
    for at in np.ndindex(*last.shape):
        near = np.flatnonzero(leading[at] <= last[at])
        order[at] = near[np.lexsort([key[at][near] for key in (*keys, ~listed)])[:size]]
    return order


def _numbers(layer: Layers) -> Sequence[int] | None:
    """Layer numbers as a sequence."""
    return [int(layer)] if isinstance(layer, int | np.integer) else layer


def _is_one(layer: Layers) -> bool:
    """Whether one layer was requested."""
    return isinstance(layer, int | np.integer)


def _at(counts: xr.Dataset, layer: Layers) -> xr.Dataset:
    """The counts at some layers; not copied for all layers or for one."""
    if layer is None:
        return counts
    index = layer_index(counts["layer"].values, _numbers(layer))
    whole = index.tolist() == list(range(counts.sizes["layer"]))
    return counts if whole else counts.isel(layer=slice(index[0], index[0] + 1) if index.size == 1 else index)


def layer_index(layers: Array, wanted: Sequence[int] | None) -> Array:
    """The indices of some layers among those of a capture."""
    captured = [int(number) for number in layers]
    if unknown := sorted(set(wanted or ()) - set(captured)):
        raise ValueError(f"layers {unknown} were not captured; this capture has {captured}")
    return np.array([captured.index(number) for number in (captured if wanted is None else wanted)], dtype=np.int64)


@kernel
def add_tokens(
    expert: Array, token: Array, counted: Array, index: Array, choices: int, count: Array, tokens: Array
) -> None:
    """Count tokens by id and by their first choices at some layers, which are given by index."""
    rows, positions, _, _ = expert.shape
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position]:
                continue
            x = token[row, position]
            tokens[x] += 1
            of_token, chosen = count[x], expert[row, position]
            for slot in range(index.size):
                of_slot, of_layer = of_token[slot], chosen[index[slot]]
                for k in range(choices):
                    of_slot[of_layer[k]] += 1
