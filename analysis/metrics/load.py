"""The load of each expert: its share of the choices and of the gate weight, layer by layer.

Promises: exact counts, and weights summed exactly in any order. Does not know about tokens or neighbours.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import Array, Block, Reducer, State, kernel, labelled, scan, sizes
from analysis.statistics.jackknife import enough_documents
from analysis.statistics.overdispersion import Units, drawn, spread_of, units_of

WEIGHT_UNIT = 2.0**-24  # every finite float16 is an integer multiple of its smallest subnormal

Bins = int | Literal["doubling"]


class Load(Reducer):
    """Counts of choices and sums of weights, by layer, choice and expert; only counts for routes without weights."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight?"})
    stacks = True

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` and `mass` (layer, k, expert)."""
        layers, choices, experts = sizes(dataset)
        return {name: np.zeros((layers, choices, experts), dtype=np.int64) for name in ("count", "mass")}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        if "weight" not in block:
            _add_ranks(block["expert"], block["counted"], state["count"])
            return
        bits = block["weight"].view(np.uint16)
        if not _add_choices(block["expert"], bits, block["counted"], state["count"], state["mass"]):
            raise ValueError("a weight is not a finite number: the shard is damaged")

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Shares of choices and of weight; NaN if nothing was counted, and for weight if there are no weights."""
        layers, _, experts = sizes(dataset)
        unit = WEIGHT_UNIT if "weight" in dataset else np.nan
        count = labelled(state["count"], "layer", "k", "expert")
        mass = labelled(state["mass"] * unit, "layer", "k", "expert")
        of_expert = labelled(state["mass"].sum(axis=-2) * unit, "layer", "expert")
        tokens = int(state["count"].reshape(-1, *state["count"].shape[-3:])[0, 0, 0].sum()) if layers else 0
        per_expert = count.sum("k")
        result = xr.Dataset(
            {
                "counts": count.assign_attrs(long_name="times chosen, by rank of the choice", units="tokens"),
                "mass": mass.assign_attrs(long_name="gate weight, by rank of the choice", units="tokens"),
                "share": share_of_experts(per_expert).assign_attrs(long_name="share of choices"),
                "mass_share": share_of_experts(of_expert).assign_attrs(long_name="share of gate weight"),
            },
            coords={"layer": dataset["layer"].values, "expert": np.arange(experts)},
        )
        return described(
            result,
            n=tokens,
            estimator="maximum likelihood",
            null=1 / experts,
            definition="share = N_e / (k T): choices of expert e over all choices of T tokens at a layer; "
            "mass_share = sum of e's weights / sum of all weights",
            source="OLMoE (Muennighoff et al. 2024), section 5; Switch Transformers (Fedus et al. 2022)",
        )


class ExpertCounts(Reducer):
    """Choices by layer and expert over all ranks and, if requested, by position in the row; nothing else.

    Parameters
    ----------
    bins : int or "doubling", optional
        Number of ranges of positions of equal length, the last of which may be shorter; or ranges that double in
        length, 0, 1, 2–3, 4–7 and so on, which resolve a row's first tokens. Default: all positions together.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"code"})
    stacks = True

    def __init__(self, bins: Bins | None = None) -> None:
        if isinstance(bins, int) and bins < 1:
            raise ValueError(f"bins={bins}: must be at least 1")
        self.bins = bins

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` (layer, expert), with a leading dimension (start) if there are ranges."""
        layers, _, experts = sizes(dataset)
        ranges = () if self.bins is None else (len(range_starts(self.bins, dataset.sizes["position"])),)
        return {"count": np.zeros((*ranges, layers, experts), dtype=np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        positions = block["counted"].shape[1]
        starts = [0] if self.bins is None else range_starts(self.bins, positions)
        count = state["count"].reshape(len(starts), *state["count"].shape[-2:])  # a view
        ranges = np.array([*starts, positions])
        if "code" in block:
            _add_codes(block["code"], block["length"], block["expert"].shape[-1], ranges, count)
        else:
            _add_experts(block["expert"], block["counted"], ranges, count)

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The counts, labelled: `counts` int64 (layer, expert), or (start, layer, expert)."""
        _, choices, experts = sizes(dataset)
        coords: dict[str, Any] = {"layer": dataset["layer"].values, "expert": np.arange(experts)}
        if self.bins is not None:
            coords = {"start": range_starts(self.bins, dataset.sizes["position"]), **coords}
        count = labelled(state["count"], *coords, **coords).assign_attrs(units="choices")
        own = count.isel(replicate=0) if "replicate" in count.dims else count
        ranges = (
            {} if self.bins is None else {"ranges": f"of {'doubling' if self.bins == 'doubling' else 'equal'} length"}
        )
        return described(
            xr.Dataset({"counts": count}),
            n=int(own.isel(layer=slice(1)).sum()) // choices,
            estimator="counts",
            null="even tables",
            definition="choices of an expert at a layer, over all ranks",
            source="OLMoE (Muennighoff et al. 2024), section 5",
            experts_per_token=choices,
            **ranges,
        )


def expert_load(dataset: xr.Dataset, *, threads: int | None = None) -> xr.Dataset:
    """Each expert's share of the choices, and of the gate weight, at each layer.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture; `weight` is read if present.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        `counts` int64 and `mass` float64, the sum of weights (layer, k, expert), in tokens; `share` and `mass_share`
        float64 (layer, expert), both summing to 1 over experts and NaN if no token was counted. `mass` and `mass_share`
        are NaN for routes without weights. Attribute `n`: tokens counted; `null`: the even share 1/E.

    Raises
    ------
    ValueError
        When a weight is not a finite number.
    """
    return scan(dataset, [Load()], threads=threads)[0]


def balance_of(load: xr.Dataset) -> xr.Dataset:
    """How even the load of each layer is.

    Parameters
    ----------
    load : xr.Dataset
        From `expert_load`, or from `Jackknife(Load())`, whose replicates are kept.

    Returns
    -------
    xr.Dataset
        Over layer, float64, NaN if nothing was counted; the value for an even load of E experts in brackets:
        `max_violation` max·E − 1 (0), `variation` standard deviation over mean (0), `entropy` in bits (log2 E) and
        `relative_entropy` of it (1), `effective_experts` 2^H (E), `gini` (0), `jain` (Σf)²/(E Σf²) (1), and
        `balancedness` mean over maximum (1).
    """
    share, experts = load["share"], load.sizes["expert"]
    known = share.notnull().all("expert")
    positive = share.where(share > 0)
    bits = -(share * np.log2(positive)).sum("expert").where(known)
    dims: dict[str, Any] = {"input_core_dims": [["expert"]], "output_core_dims": [["expert"]]}
    ranked = xr.apply_ufunc(np.sort, share, **dims)
    weight = xr.DataArray(
        2 * np.arange(1, experts + 1) - experts - 1, dims="expert", coords={"expert": share["expert"]}
    )
    values = {
        "max_violation": share.max("expert") * experts - 1,
        "variation": share.std("expert", skipna=False) * experts,  # a layer is either counted completely or not at all
        "entropy": bits,
        "relative_entropy": bits / np.log2(experts) if experts > 1 else bits * np.nan,
        "effective_experts": 2.0**bits,
        "gini": (ranked * weight).sum("expert") / experts,
        "jain": 1 / (experts * (share**2).sum("expert")),
        "balancedness": 1 / (experts * share.max("expert")),
    }
    null = dict.fromkeys(("max_violation", "variation", "gini"), 0.0)
    null |= {"entropy": float(np.log2(experts)), "effective_experts": float(experts)}
    return described(
        xr.Dataset({name: value.where(known).assign_attrs(null=null.get(name, 1.0)) for name, value in values.items()}),
        n=load.attrs["n"],
        estimator="plug-in",
        null="by variable: the value for an even load",
        definition="summaries of the shares f_e of a layer's choices",
        source="MaxVio: Wang et al. 2024 (loss-free balancing); balancedness: SGLang; Jain et al. 1984; Gini 1912",
    )


def balance_null(counts: xr.Dataset, *, draws: int = 200) -> xr.Dataset:
    """The result of `balance_of` for this many documents if every expert has the same share.

    Parameters
    ----------
    counts : xr.Dataset
        From `Jackknife(ExpertCounts())`.
    draws : int
        Number of drawn sets of documents, with the lengths and the spread of the capture's documents.

    Returns
    -------
    xr.Dataset
        float64 (of, layer): each variable of `balance_of`, its `mean`, and the ends `low` and `high` of the central 95%
        of the draws. A measure within them cannot be distinguished from an even load with these documents. NaN if there
        are fewer than `MIN_EFFECTIVE_DOCUMENTS` effective documents, because their spread is not known.
    """
    choices, experts = int(counts.attrs["experts_per_token"]), counts.sizes["expert"]
    even = np.full(experts, choices / experts)
    share = np.full((draws, counts.sizes["layer"], experts), np.nan)

    def of_layer(index: int, units: Units) -> None:
        random = np.random.default_rng(index)
        spread = spread_of(units, choices)
        share[:, index] = drawn(units.tokens, even, spread, choices, draws, random, whole=True)[0]

    if enough_documents(counts):
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(of_layer, range(counts.sizes["layer"]), units_of(counts)))
    coords = {name: counts[name].values for name in ("layer", "expert")}
    of_experts = share_of_experts(xr.DataArray(share, coords, ("draw", *coords)))
    of_draws = balance_of(xr.Dataset({"share": of_experts}, attrs=counts.attrs))
    middle = of_draws.quantile([0.025, 0.975], "draw", skipna=False).drop_vars("quantile").rename(quantile="of")
    found = xr.concat([of_draws.mean("draw", skipna=False).expand_dims("of"), middle], "of", combine_attrs="override")
    return described(
        found.assign_coords(of=["mean", "low", "high"]),
        n=counts.attrs["n"],
        null="this is the null",
        estimator=f"{draws} drawn sets of documents",
        definition="balance_of for documents drawn around even shares, with the capture's own lengths and spread",
        source="Mosimann 1962 (Dirichlet-multinomial)",
    )


def domain_specialization(load: xr.Dataset) -> xr.Dataset:
    """Share of a data set's tokens that choose each expert (OLMoE, section 5).

    Parameters
    ----------
    load : xr.Dataset
        From `expert_load`.

    Returns
    -------
    xr.Dataset
        Over (layer, expert), float64: `any_choice` N_e / T, which sums to k, null k/E; `first_choice`, for first
        choices only, which sums to 1, null 1/E. NaN if nothing was counted.
    """
    choices, experts = load.sizes["k"], load.sizes["expert"]
    first = load["counts"].isel(k=0, drop=True)
    tokens = first.sum("expert")
    return described(
        xr.Dataset(
            {
                "any_choice": (load["share"] * choices).assign_attrs(null=choices / experts),
                "first_choice": (first / tokens.where(tokens > 0)).assign_attrs(null=1 / experts),
            }
        ),
        n=load.attrs["n"],
        estimator="maximum likelihood",
        null=choices / experts,
        definition="share of the data set's tokens for which the expert is one of the k choices, or the first",
        source="OLMoE (Muennighoff et al. 2024), section 5; Mixtral of Experts (Jiang et al. 2024), figure 7",
    )


def share_of_experts(amount: xr.DataArray) -> xr.DataArray:
    """Each expert's part of a total over `expert`; NaN if the total is 0."""
    total = amount.sum("expert")
    return amount / total.where(total > 0)


@kernel
def _add_choices(expert: Array, weight_bits: Array, counted: Array, count: Array, mass: Array) -> bool:
    """Add choices and weights (float16 bits, read as multiples of 2**-24); False for NaN or infinity."""
    rows, positions, layers, choices = expert.shape
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position]:
                continue
            for layer in range(layers):
                for k in range(choices):
                    bits = np.int64(weight_bits[row, position, layer, k])
                    exponent, fraction = (bits >> 10) & 31, bits & 1023
                    if exponent == 31:
                        return False
                    units = fraction if exponent == 0 else (fraction + 1024) << (exponent - 1)
                    chosen = expert[row, position, layer, k]
                    count[layer, k, chosen] += 1
                    mass[layer, k, chosen] += -units if bits >> 15 else units
    return True


@kernel
def _add_ranks(expert: Array, counted: Array, count: Array) -> None:
    """Add choices by (layer, k, expert)."""
    rows, positions, layers, choices = expert.shape
    for row in range(rows):
        for position in range(positions):
            if counted[row, position]:
                for layer in range(layers):
                    for k in range(choices):
                        count[layer, k, expert[row, position, layer, k]] += 1


def range_starts(bins: Bins, positions: int) -> list[int]:
    """The first position of each range."""
    if bins == "doubling":
        return [start for start in (0, *(2**power for power in range(32))) if start < positions]
    return list(range(0, positions, -(-positions // bins)))


@kernel
def _add_codes(code: Array, length: Array, choices: int, ranges: Array, count: Array) -> None:
    """Add choices by (range, layer, expert) over all ranks, if those of a token are coded as one number.

    Takes a third of the time of `_add_experts` for k = 2 (measured).
    """
    rows, layers, _ = code.shape
    experts = count.shape[2]
    codes = np.zeros(256, np.int64)
    for index in range(len(count)):
        for layer in range(layers):
            codes[:] = 0
            for row in range(rows):
                here = code[row, layer]
                for position in range(ranges[index], min(ranges[index + 1], length[row])):
                    codes[here[position]] += 1
            for number in range(experts**choices):  # the next number stands for tokens that are not counted
                left = number
                for _ in range(choices):
                    count[index, layer, left % experts] += codes[number]
                    left //= experts


@kernel
def _add_experts(expert: Array, counted: Array, ranges: Array, count: Array) -> None:
    """Add choices by (range, layer, expert) over all ranks."""
    rows, _, layers, choices = expert.shape
    for index in range(len(count)):
        for row in range(rows):
            for position in range(ranges[index], ranges[index + 1]):
                if counted[row, position]:
                    for layer in range(layers):
                        for k in range(choices):
                            count[index, layer, expert[row, position, layer, k]] += 1
