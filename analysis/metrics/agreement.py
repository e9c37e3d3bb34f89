"""Do two captures of the same text agree? 4 bits against 16, two revisions, two machines: where and how much they
differ.

The comparison is token by token, so the rows must be the same: same text, tokenizer and sequence length. Promises:
tokens are compared, not assumed to be equal; a row whose tokens differ is an error, and tokens that only one capture
holds are not counted. Does not know why they differ.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.choice_kernels import in_common
from analysis.metrics.choices import overlap_summary, random_overlap
from analysis.metrics.load import WEIGHT_UNIT
from analysis.scanning import Array, Block, Reducer, State, kernel, scan, sizes

MARGIN_BINS = 10  # of equal width, from 0 to 1 (arbitrary)


class OtherTokens(ValueError):
    """Two captures hold different tokens, or the same tokens in different rows: use a contrast, not an agreement."""


class Agreement(Reducer):
    """Counts of what two captures have in common, for a dataset from `paired`."""

    needs: ClassVar[frozenset[str]] = frozenset({"other_expert", "other_token", "weight?"})

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros; `finish` names the dimensions."""
        layers, choices, _ = sizes(dataset)
        return {
            "shared": np.zeros((layers, choices + 1, 2), dtype=np.int64),
            "first_difference": np.zeros(layers + 1, dtype=np.int64),
            "margin": np.zeros((layers, 2), dtype=np.int64),
            "by_margin": np.zeros((layers, MARGIN_BINS, 3), dtype=np.int64),
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        expert, other, both = block["expert"], block["other_expert"], counted_in_both(block)
        weight = block["weight"] if "weight" in block else np.zeros(expert.shape)
        _add(expert, other, weight.astype(np.float32), both, *state.values())

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Shares of tokens; NaN if there is none."""
        layer, (_, choices, experts) = dataset["layer"].values, sizes(dataset)
        count = xr.DataArray(
            state["shared"],
            dims=("layer", "shared_experts", "same_first"),
            coords={"layer": layer, "shared_experts": np.arange(choices + 1), "same_first": [False, True]},
        )
        tokens = count.sum(("shared_experts", "same_first"))
        same = count.sel(same_first=True, drop=True).sum("shared_experts")
        shared = count.sum("same_first")
        overlap = (shared * shared["shared_experts"]).sum("shared_experts") / choices
        first = xr.DataArray(state["first_difference"][:-1], dims="layer", coords={"layer": layer})
        weighed = "weight" in dataset  # otherwise margins are not known
        margin = xr.DataArray(
            state["margin"] * (WEIGHT_UNIT if weighed else np.nan), dims=("layer", "flipped"), coords={"layer": layer}
        )
        flips = tokens - same
        of_bin = xr.DataArray(
            state["by_margin"] * weighed,
            dims=("layer", "bin", "what"),
            coords={"layer": layer, "margin_from": ("bin", np.arange(MARGIN_BINS) / MARGIN_BINS)},
        )
        in_bin = of_bin.isel(what=0)
        n = int(state["first_difference"].sum())
        set_null = random_overlap(choices, experts)["same_set"]
        values = {
            "same_set": (overlap_summary(shared)["same_set"], set_null),
            "overlap": (overlap / tokens.where(tokens > 0), choices / experts),
            "same_first": (same / tokens.where(tokens > 0), 1 / experts),
            "first_difference": (first / max(n, 1), None),
            "margin": (margin.sel(flipped=0) / same.where(same > 0), None),
            "margin_at_flips": (margin.sel(flipped=1) / flips.where(flips > 0), None),
            "tokens_of_margin": (in_bin, None),
            "same_set_of_margin": (of_bin.isel(what=1) / in_bin.where(in_bin > 0), set_null),
            "same_first_of_margin": (of_bin.isel(what=2) / in_bin.where(in_bin > 0), 1 / experts),
        }
        return described(
            xr.Dataset({name: value.assign_attrs(null=null) for name, (value, null) in values.items()}),
            n=n,
            any_difference=1 - int(state["first_difference"][-1]) / n if n else float("nan"),
            any_difference_null=1 - set_null ** len(layer),
            estimator="mean over tokens that both captures hold",
            null="by variable: the value for two unrelated captures",
            definition="same_set: share of tokens with the same k experts at a layer; overlap: mean of |S ∩ S'|/k;"
            " same_first: share with the same first choice; first_difference: share of tokens whose set differs at this"
            " layer and at no lower layer; margin: mean of the first weight minus the second, in the first capture, for"
            " tokens with the same first choice, and at flips for the others; …_of_margin: the same shares of the"
            " tokens whose margin in the first capture lies in a bin; any_difference: share of tokens whose set"
            " differs at any layer",
            source="router saturation, OLMoE (Muennighoff et al. 2024), section 5; R3 (rollout routing replay)",
        )


def agreement(one: xr.Dataset, other: xr.Dataset, *, threads: int | None = None) -> xr.Dataset:
    """How far two captures of the same rows agree.

    Parameters
    ----------
    one, other : xr.Dataset
        Captures with the same rows, layers, k and E.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        Over layer, float64: `same_set`, `overlap`, `same_first`, `first_difference`, `margin`, `margin_at_flips` (NaN
        if k = 1, there is no such token, or `one` was imported without weights); over (layer, bin), by the margin in
        `one`, whose bins begin at `margin_from`: `tokens_of_margin` int64, `same_set_of_margin`, `same_first_of_margin`
        float64 (NaN if there is no token, as is the case for k = 1 or without weights); attribute `any_difference`. The
        nulls for k = 2 of 8 experts: 1/28, 1/4, 1/8.

    Raises
    ------
    OtherTokens
        When they do not hold the same tokens in the same rows.
    ValueError
        When the captures cannot be compared for another reason; the message says what differs.
    """
    return scan(paired(one, other), [Agreement()], threads=threads)[0]


def paired(one: xr.Dataset, other: xr.Dataset) -> xr.Dataset:
    """The first capture, with the second one's choices, tokens and recorded predictions added to its own."""
    here, there = ({**each.sizes, "experts": int(each.attrs["num_experts"])} for each in (one, other))
    for name in ("doc", "position", "layer", "k", "experts"):
        if here[name] != there[name]:
            differs = f"one has {here[name]} of {name}, the other {there[name]}"
            if name in ("doc", "position"):
                raise OtherTokens(f"the captures hold different rows: {differs}")
            raise ValueError(f"the captures cannot be compared: {differs}")
    if one["layer"].values.tolist() != other["layer"].values.tolist():
        raise ValueError(f"the captures have different layers: {one['layer'].values} and {other['layer'].values}")
    names = ("expert", "token", *["logprob"] * ("logprob" in other))
    variables = {f"other_{name}": other[name].variable for name in names}
    if "captured" in one and "captured" in other:
        variables["captured"] = one["captured"].variable & other["captured"].variable
    chunks = dict(one.chunksizes)
    return one.assign(
        {
            name: variable.chunk({d: chunks[d] for d in variable.dims if d in chunks})
            for name, variable in variables.items()
        }
    )


def counted_in_both(block: Block) -> Array:
    """Which counted tokens both captures hold; bool (doc, position).

    Raises
    ------
    OtherTokens
        When tokens differ; the message names the first.
    """
    other = block["other_expert"]
    both: Array = block["counted"] & (other[:, :, 0, 0] != np.iinfo(other.dtype).max)
    if wrong := np.argwhere(both & (block["token"] != block["other_token"])).tolist():
        row, position = wrong[0]
        raise OtherTokens(
            f"the captures hold different texts: at position {position} of a row, the tokens are"
            f" {block['token'][row, position]} and {block['other_token'][row, position]}"
        )
    return both


@kernel
def _add(
    expert: Array,
    other: Array,
    weight: Array,
    counted: Array,
    shared: Array,
    first_difference: Array,
    margin: Array,
    by_margin: Array,
) -> None:
    rows, positions, layers, choices = expert.shape
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position]:
                continue
            differs = layers
            for layer in range(layers):
                here, there = expert[row, position, layer], other[row, position, layer]
                common = in_common(here, there)
                same = 1 if here[0] == there[0] else 0
                shared[layer, common, same] += 1
                if common < choices and differs == layers:
                    differs = layer
                if choices > 1:
                    apart = weight[row, position, layer, 0] - weight[row, position, layer, 1]
                    margin[layer, 1 - same] += np.int64(apart / WEIGHT_UNIT)
                    width = min(max(int(apart * MARGIN_BINS), 0), MARGIN_BINS - 1)
                    by_margin[layer, width, 0] += 1
                    by_margin[layer, width, 1] += common == choices
                    by_margin[layer, width, 2] += same
            first_difference[differs] += 1
