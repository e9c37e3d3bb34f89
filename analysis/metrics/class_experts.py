"""Which experts a token class goes to: digits, punctuation, words in capitals, a regular expression.

A class is counted like a token: its tokens are counted at each of their k choices. Promises exact counts, and intervals
over documents. Does not know which tokens a class has: `analysis.token_classes` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.excess import token_excess_of
from analysis.metrics.tokens import add_tokens
from analysis.scanning import EVERYTHING, Array, Block, Reducer, Selection, State, labelled, scan, sizes
from analysis.statistics.jackknife import Jackknife, effective_of, how, interval
from analysis.token_classes import CLASSES, groups_of, members_by_class


class ClassCounts(Reducer):
    """Counts by token class, layer and expert: the input of `class_experts_of`, inside a `Jackknife`.

    Parameters
    ----------
    members : mapping of str to bool array, shape (token_id)
        The members of each class, by its name: see `analysis.token_classes.members_of`.

    Raises
    ------
    ValueError
        When there is no class.
    """

    stacks = True

    def __init__(self, members: Mapping[str, Array]) -> None:
        self.groups = groups_of(members)

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` (group, layer, expert) and `tokens` (group), by groups of tokens that are in the same
        classes."""
        layers, _, experts = sizes(dataset)
        groups = len(self.groups.belongs)
        return {"count": np.zeros((groups, layers, experts), np.int64), "tokens": np.zeros(groups, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        layers, choices = block["expert"].shape[2:]
        group = self.groups.of_token[block["token"]]  # -1 after a row's end indexes the last group, and is not counted
        add_tokens(
            block["expert"], group, block["counted"], np.arange(layers), choices, state["count"], state["tokens"]
        )

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """`counts` (token_class, layer, expert) and `tokens` (token_class), and for all tokens `all_counts` (layer,
        expert) and `all_tokens`; int64."""
        _, choices, experts = sizes(dataset)
        coords = {"layer": dataset["layer"].values, "expert": np.arange(experts)}
        by_class = {"token_class": np.array(self.groups.names, object), **coords}
        count, tokens, of_classes = state["count"], state["tokens"], self.groups.of_classes
        found = xr.Dataset(
            {
                "counts": labelled(np.moveaxis(of_classes(np.moveaxis(count, -3, -1)), -1, -3), *by_class, **by_class),
                "tokens": labelled(of_classes(tokens), "token_class"),
                "all_counts": labelled(count.sum(-3), *coords, **coords),
                "all_tokens": labelled(tokens.sum(-1)),
            }
        )
        return described(
            found,
            n=int(tokens.reshape(-1, tokens.shape[-1])[0].sum()),
            estimator="counts",
            null="even tables",
            definition="occurrences of tokens of a class with an expert among the k choices at a layer; occurrences of"
            " the class",
            source="OLMoE (Muennighoff et al. 2024), section 5, vocabulary specialization, applied to token classes",
            experts_per_token=choices,
            experts=experts,
        )


def class_experts(
    dataset: xr.Dataset,
    classes: Sequence[str] = tuple(CLASSES),
    *,
    level: float = 0.95,
    only: Selection = EVERYTHING,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    r"""How often token classes were sent to each expert.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    classes : sequence of str
        Names of `analysis.token_classes.CLASSES`, or regular expressions between slashes: `/\d/`.
    level : float
                Level of the intervals.
    only, threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        See `class_experts_of`.

    Raises
    ------
    ValueError
        When there is no such class, or a regular expression is invalid.
    """
    counted = Jackknife(ClassCounts(members_by_class(classes, dataset["piece"].values.tolist())))
    return class_experts_of(scan(dataset, [counted], only=only, threads=threads, progress=progress)[0], level)


def class_experts_of(counts: xr.Dataset, level: float = 0.95) -> xr.Dataset:
    """How often token classes were sent to each expert, from the counts of `Jackknife(ClassCounts())`.

    Parameters
    ----------
    counts : xr.Dataset
        From `ClassCounts` inside `Jackknife`, or a selection of its layers or experts.
    level : float
        Level of the intervals.

    Returns
    -------
    xr.Dataset
        Over (token_class, layer, expert): `counts` int64; `share` of the class's tokens that are sent to the expert,
        `lift` over the share of all tokens, and their intervals over documents, `_low` and `_high`, float64; `tokens`
        int64 and `effective_documents` float64 (token_class), the occurrences of the class, and the equivalent number
        of documents of equal length. The null of a share is k/E, that of a lift 1. NaN if the class or the expert has
        no token; intervals are also NaN if the tokens come from fewer than four effective documents, or if an expert
        gets none or all of them.
    """
    amount, share = counts["tokens"], share_of_class(counts)
    lift = lift_of_class(counts)
    of_share = interval(share, level, scale="share", amount=amount)
    of_lift = np.exp(interval(np.log(lift.where(lift > 0)), level, amount=amount))
    whole = counts.isel(replicate=0).drop_vars(["replicate", "left_out", "unit"])
    own = lift.isel(replicate=0, drop=True)
    return described(
        xr.Dataset(
            {
                "counts": whole["counts"].assign_attrs(long_name="tokens sent to the expert", units="tokens"),
                "tokens": whole["tokens"].assign_attrs(long_name="occurrences of the class", units="tokens"),
                "effective_documents": effective_of(share, amount),
                "share": of_share["estimate"].assign_attrs(long_name="share of the class sent to the expert"),
                "lift": own.assign_attrs(long_name="share over the share of all tokens sent to the expert"),
                **{f"share_{end}": of_share[end] for end in ("low", "high")},
                **{f"lift_{end}": of_lift[end] for end in ("low", "high")},
            }
        ),
        n=counts.attrs["n"],
        documents=counts.attrs["documents"],
        level=level,
        estimator=f"maximum likelihood; {how(counts.attrs['units'], level)}, on the logarithm of a lift",
        null=counts.attrs["experts_per_token"] / counts.attrs["experts"],
        null_lift=1.0,
        definition="share = N_ce / N_c: occurrences of tokens of class c with expert e among the k choices, over all"
        " occurrences of c; lift = share / (N_e / T)",
        source=counts.attrs["source"],
    )


def strongest_experts_of(counts: xr.Dataset, *, min_count: int = 20, level: float = 0.95) -> xr.Dataset:
    """The expert with the highest lift for each class at each layer, from the counts of `Jackknife(ClassCounts())`.

    Parameters
    ----------
    counts : xr.Dataset
        From `ClassCounts` inside `Jackknife`.
    min_count : int
        Experts that get fewer tokens of the class are left out: their lift is mostly chance.
    level : float
        Level of the intervals. Each is valid for an expert that was selected beforehand; for the highest of several
        lifts it is somewhat too high.

    Returns
    -------
    xr.Dataset
        Over (token_class, layer): `strongest` int64, the expert, -1 if none gets that many; the other variables of
        `class_experts_of` for this expert, NaN or 0 if there is none.

    Raises
    ------
    ValueError
        When `min_count` is below 1.
    """
    if min_count < 1:
        raise ValueError(f"min_count={min_count}: must be at least 1")
    whole = counts.isel(replicate=0, drop=True)
    lift = lift_of_class(whole).where(whole["counts"] >= min_count)
    known, strongest = lift.notnull().any("expert"), lift.fillna(-1.0).argmax("expert")
    found = class_experts_of(counts.isel(expert=strongest), level).drop_vars("expert")
    found = found.assign(counts=found["counts"].where(known, 0), strongest=strongest.where(known, -1))
    return found.assign({name: found[name].where(known) for name in found if str(name).startswith(("share", "lift"))})


def class_excess_of(routes: xr.Dataset, members: Mapping[str, Array], *, min_count: int = 20) -> xr.Dataset:
    """How much more often classes went to experts than their documents explain, from the sample of `SampledRoutes`.

    Parameters
    ----------
    routes : xr.Dataset
        From `analysis.SampledRoutes`.
    members : mapping of str to bool array, shape (token_id)
        The members of each class, by its name.
    min_count : int
        Classes that occur less often in the sample are left out.

    Returns
    -------
    xr.Dataset
        Over (token_class, layer, expert), like `token_excess_of` for tokens: `counts` int64, `expected` and `p`
        float64; `tokens` int64 (token_class).

    Raises
    ------
    ValueError
        When `min_count` is below 1, or there is no class.
    """
    if not members:
        raise ValueError("no token class: name at least one")
    token, found = routes["token_id"].values, []
    for name, belongs in members.items():
        two = token_excess_of(routes.assign(token_id=("token", belongs[token].astype(np.int64))), min_count=min_count)
        own = two.isel(token_id=np.flatnonzero(two["token_id"].values == 1)).drop_vars("piece")
        found.append(own.assign_coords(token_id=[name] * own.sizes["token_id"]))
    return xr.concat(found, "token_id", combine_attrs="override").rename(token_id="token_class")


def share_of_class(counts: xr.Dataset) -> xr.DataArray:
    """The share of a class's tokens that are sent to each expert; NaN if the class has no token."""
    return counts["counts"] / counts["tokens"].where(counts["tokens"] > 0)


def lift_of_class(counts: xr.Dataset) -> xr.DataArray:
    """That share over the share of all tokens; NaN if the class or the expert has no token."""
    of_all = counts["all_counts"].where(counts["all_counts"] > 0) / counts["all_tokens"]
    return share_of_class(counts) / of_all
