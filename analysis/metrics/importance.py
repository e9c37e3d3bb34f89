"""The effect of each expert on predictions: how the next token's log-probability changes when the expert is masked.

Needs a capture of `jobs/importance.py`, which has the effect of every expert of the measured layers on each token: its
log-probability without the expert at that layer, minus that with it, in nats; negative if the expert helps. Other
experts take its place. Documents are the units of intervals and tests; each is compared with itself.

The result also holds quantities that may predict the effect without measuring it, such as load or saliency, with the
rank correlation (Spearman 1904) of each with the loss, which is the negative effect.

Promises: sums of integers, so the result does not depend on order. Does not know which experts can be removed together:
each is masked alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.load import Load
from analysis.metrics.saliency import Saliency
from analysis.scanning import EVERYTHING, Array, Block, Reducer, Selection, State, kernel, labelled, scan, sizes
from analysis.statistics.differences import p_by_layer, studentized
from analysis.statistics.flips import flipped, sum_of, why_untested
from analysis.statistics.jackknife import Jackknife, interval, with_intervals
from analysis.statistics.resampled import totals_of
from analysis.statistics.testing import false_discovery

UNIT = 2.0**-20  # nats; effects are rounded to multiples of it (stored: 2**-16), so that sums are exact
REPLICATES = 9999  # sign flips: many, because p-values of single experts are adjusted for all of them
DEFINITION = (
    "mean over predicted tokens of log P(token | previous tokens) if the expert cannot be chosen at the layer - the"
    " same if it can"
)
NOTHING = "no effect of an expert was measured on a counted token"
CELL = ("layer", "expert")
Progress = Callable[[int, int], None] | None


class MaskEffects(Reducer):
    """Sums of effects by layer and expert, and predicted tokens by layer."""

    needs: ClassVar[frozenset[str]] = frozenset({"effect"})
    stacks = True

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `effect` (layer, expert), in units of 2**-20, and `predicted` (layer)."""
        layers, _, experts = sizes(dataset)
        return {"effect": np.zeros((layers, experts), np.int64), "predicted": np.zeros(layers, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        if not _add(block["effect"], block["counted"], *state.values()):
            raise ValueError("an effect is not a finite number: the shard is damaged")

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Means, NaN at layers that were not measured; and predicted tokens."""
        total, predicted = labelled(state["effect"], *CELL), labelled(state["predicted"], "layer")
        effect = (total * UNIT / predicted.where(predicted > 0)).assign_attrs(units="nat", amount="predicted", null=0.0)
        return described(
            xr.Dataset(
                {"effect": effect, "predicted": predicted.assign_attrs(units="tokens")},
                {"layer": dataset["layer"].values, "expert": np.arange(total.sizes["expert"])},
            ),
            n=int(state["predicted"].reshape(-1, len(dataset["layer"]))[0].max(initial=0)),
            counted="predicted tokens",
            estimator="mean",
            null=0.0,
            definition=DEFINITION,
            source="-",
        )


def importance(
    dataset: xr.Dataset,
    *,
    level: float = 0.95,
    replicates: int = REPLICATES,
    only: Selection = EVERYTHING,
    threads: int | None = None,
    progress: Progress = None,
) -> xr.Dataset:
    """The effect of each expert of the measured layers on predictions, and quantities that may predict it.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture of `jobs/importance.py`: with effects, weights and the norms of outputs.
    level : float
                        Level of the intervals.
    replicates : int
                        Number of sign flips.
    only, threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        See `importance_of`.

    Raises
    ------
    ValueError
        When the capture has no effects, or one of them is not finite.
    """
    counts = _counted(dataset, only, threads, progress)
    return importance_of(*counts, level=level, replicates=replicates)


def _counted(dataset: xr.Dataset, only: Selection, threads: int | None, progress: Progress) -> list[xr.Dataset]:
    """The counts of a capture that `importance_of` needs."""
    asked = [Jackknife(MaskEffects()), Jackknife(Load()), Jackknife(Saliency())]
    return scan(dataset, asked, only=only, threads=threads, progress=progress)


def importance_of(
    effects: xr.Dataset,
    load: xr.Dataset,
    saliency: xr.Dataset,
    *,
    average: xr.DataArray | None = None,
    level: float = 0.95,
    replicates: int = REPLICATES,
) -> xr.Dataset:
    """The effect of each expert on predictions, from the counts of one capture.

    Parameters
    ----------
    effects, load, saliency : xr.Dataset
        From `analysis.Jackknife` of `MaskEffects`, `Load` and `Saliency`, for the same tokens.
    average : xr.DataArray, optional
        Shares of choices, float64 (layer, expert), relative to which `lift` is computed.
    level : float
                Level of the intervals.
    replicates : int
                Number of sign flips.

    Returns
    -------
    xr.Dataset
        float64 over (layer, expert), for the measured layers: `effect`, in nats per predicted token, negative if the
        expert helps; its interval `effect_low` to `effect_high`, by a jackknife over documents; `p`, two-sided, by
        flipping the signs of whole documents, and `q`, the same adjusted for all these experts (Benjamini & Hochberg
        1995); `share` of choices, `weight_share` of weight, `mean_saliency` over the tokens that choose the expert (NaN
        if none does) and `total_saliency`, all of which may predict the effect; and `lift`, the share divided by the
        average one, if that is given (NaN if it is 0). Over predictor, the names of these: `within_layers`, the rank
        correlation with the loss within a layer, averaged over layers, and `over_all` experts, each with the ends
        `_low` and `_high` of a jackknife interval; NaN if all ranks are equal. Intervals and p are NaN if there are
        fewer than six units of documents, or four effective ones: attribute `untested` gives the reason.

    Raises
    ------
    ValueError
        When no effect was measured.
    """
    predicted = effects["predicted"].isel(replicate=0)
    if not int(predicted.max()):
        raise ValueError(NOTHING)
    there = effects["layer"][(predicted > 0).values].values
    effects, load, saliency = (each.sel(layer=there) for each in (effects, load, saliency))
    totals = totals_of(effects, "effect")
    reason = why_untested(np.stack([totals.amount[:, 0]] * 2))
    found = with_intervals(effects[["effect", "predicted"]], level=level)
    predictors = {
        "share": load["share"],
        "weight_share": load["mass_share"],
        "mean_saliency": saliency["mean_saliency"],
        "total_saliency": saliency["total_saliency"],
    }
    if average is not None:
        predictors["lift"] = load["share"] / average.where(average > 0).sel(layer=there)
    p = np.full(found["effect"].shape, np.nan) if reason else _p(totals.total, totals.amount, replicates)
    p_of = xr.DataArray(p.reshape(found["effect"].shape), found["effect"].coords, CELL)
    ends = {name: found[name].where(not reason) for name in ("effect_low", "effect_high")}
    return described(
        xr.Dataset(
            {
                "effect": found["effect"],
                **ends,
                "p": p_of,
                "q": false_discovery(p_of),
                **{name: each.isel(replicate=0, drop=True) for name, each in predictors.items()},
                **_correlations(effects["effect"], predictors, level, reason),
            }
        ),
        n=int(predicted.max()),
        counted="predicted tokens",
        documents=effects.attrs["documents"],
        untested=reason,
        level=level,
        replicates=replicates,
        estimator="mean; jackknife over documents; studentized sign-flip test over whole documents",
        null=0.0,
        definition=f"{DEFINITION}; loss = - effect",
        source="Fisher 1935 (sign-flip test); Benjamini & Hochberg 1995 (q); Spearman 1904 (rank correlation)",
    )


def importances(
    captures: Mapping[str, xr.Dataset],
    *,
    level: float = 0.95,
    replicates: int = REPLICATES,
    only: Selection = EVERYTHING,
    threads: int | None = None,
    progress: Progress = None,
) -> xr.Dataset:
    """The effect of each expert on the predictions of several data sets.

    Parameters
    ----------
    captures : mapping of str to xr.Dataset
        Captures as for `importance`, by data set, of one model and with the same measured layers.
    level : float
        Level of the intervals.
    replicates : int
        Number of sign flips.
    only, threads, progress
        See `analysis.scan`; progress is reported for one capture after the other.

    Returns
    -------
    xr.Dataset
        The variables of `importance_of`, with an additional leading dim data_set; for several data sets also `lift`,
        the share of choices relative to the average of all data sets' shares; and over data_set, `n`, predicted tokens,
        and `documents`, int64, and `untested`, why there is no interval, otherwise empty.

    Raises
    ------
    ValueError
        When there is no data set, they have different layers or experts, or `importance` raises for one.
    """
    if not captures:
        raise ValueError("no data set: pass captures of jobs/importance.py by name")
    counts = {name: _counted(capture, only, threads, progress) for name, capture in captures.items()}
    for name, (effects, *_) in counts.items():
        if not effects.attrs["n"]:
            raise ValueError(f"{name}: {NOTHING}")
    shares = [load["share"].isel(replicate=0, drop=True) for _, load, _ in counts.values()]
    average = sum(shares[1:], shares[0]) / len(shares) if len(shares) > 1 else None
    found = {
        name: importance_of(*each, average=average, level=level, replicates=replicates) for name, each in counts.items()
    }
    names = xr.DataArray(list(found), dims="data_set", name="data_set")
    said = {
        name: ("data_set", np.array([each.attrs[name] for each in found.values()], dtype))
        for name, dtype in (("n", np.int64), ("documents", np.int64), ("untested", np.str_))
    }
    common = [each.assign_attrs(dict.fromkeys(said)) for each in found.values()]
    together = xr.concat(common, names, join="exact", combine_attrs="drop_conflicts").assign(said)
    return together.assign_attrs(n={name: int(each.attrs["n"]) for name, each in found.items()})


def least_important(found: xr.Dataset, least: int) -> dict[int, list[int]]:
    """The experts of each layer whose removal costs predictions least: those with the largest effects.

    Parameters
    ----------
    found : xr.Dataset
        From `importances`; their effects are averaged over data sets.
    least : int
        Number of experts of each layer.

    Returns
    -------
    dict of int to list of int
        Layer to experts, the least important first; ties go to the lower id.
    """
    effect = found["effect"].mean("data_set").transpose(*CELL)
    order = np.argsort(-effect.values, axis=1, kind="stable")[:, :least]
    return dict(zip(effect["layer"].values.tolist(), effect["expert"].values[order].tolist(), strict=True))


def _p(total: Array, amount: Array, replicates: int) -> Array:
    """Two-sided p-value of each cell: float64 (cell), from (unit, cell)."""
    part = amount[:, 0] / amount[:, 0].sum()
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (replicates, len(part)))
    found = []
    for cell in (total / amount.sum(0)).T:
        own = cell[:, None, None]
        found.append(p_by_layer(abs(studentized(*sum_of(own, part))), flipped(own, part, signs))[0])
    return np.array(found)


def _correlations(
    effect: xr.DataArray, predictors: Mapping[str, xr.DataArray], level: float, reason: str
) -> dict[str, xr.DataArray]:
    """Rank correlations with the loss, with the ends of their intervals."""
    found: dict[str, list[xr.DataArray]] = {}
    loss = -effect.transpose("replicate", *CELL)
    for values in predictors.values():
        own = values.fillna(0.0).transpose(*loss.dims)
        for name, of_layers in (("within_layers", True), ("over_all", False)):
            ranked = loss.isel(layer=0, expert=0, drop=True).copy(data=_spearman(loss.values, own.values, of_layers))
            ends = interval(ranked, level)
            for end, key in (("", "estimate"), ("_low", "low"), ("_high", "high")):
                kept = ends[key] if not end else ends[key].where(not reason).clip(-1, 1)
                found.setdefault(f"{name}{end}", []).append(kept)
    predictor = xr.DataArray(list(predictors), dims="predictor", name="predictor")
    return {name: xr.concat(each, predictor) for name, each in found.items()}


def _spearman(one: Array, other: Array, of_layers: bool) -> Array:
    """Rank correlations of (replicate, layer, expert), within each layer on average, or over all: (replicate)."""
    from scipy.stats import rankdata

    if not of_layers:
        one, other = (each.reshape(len(each), 1, -1) for each in (one, other))
    ranks = [rankdata(each, axis=-1) for each in (one, other)]
    apart = [each - each.mean(-1, keepdims=True) for each in ranks]
    with np.errstate(divide="ignore", invalid="ignore"):
        each_layer = (apart[0] * apart[1]).sum(-1) / np.sqrt((apart[0] ** 2).sum(-1) * (apart[1] ** 2).sum(-1))
    known = np.isfinite(each_layer)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, each_layer, 0.0).sum(-1) / known.sum(-1)
    return mean


@kernel
def _add(effect: Array, counted: Array, total: Array, predicted: Array) -> bool:
    """Add the effects on counted tokens, stored at the position before each; False if one is not finite."""
    rows, positions, layers, experts = effect.shape
    for row in range(rows):
        for position in range(positions - 1):
            if not counted[row, position + 1]:
                continue
            for layer in range(layers):
                own = effect[row, position, layer]
                if np.isnan(own).all():  # the layer was not measured, or the row ends here
                    continue
                if not np.isfinite(own).all():
                    return False
                predicted[layer] += 1
                for expert in range(experts):
                    total[layer, expert] += np.int64(np.rint(np.float64(own[expert]) / UNIT))
    return True
