"""The effect of one change on the predictions of several texts: does removing an expert hurt prose more than code?

Each pair is compared as in `analysis.effect`, and the effects are compared with each other, with documents as the units
in each data set. Does not know what was changed, or whether it was the same in each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.agreement import paired
from analysis.metrics.effect import DEFINITION, Effects, effect_of
from analysis.metrics.mean_contrast import mean_contrast_of
from analysis.scanning import EVERYTHING, Selection, scan
from analysis.statistics.flips import REPLICATES
from analysis.statistics.jackknife import Jackknife
from analysis.token_classes import CLASSES, members_by_class


def effect_by_data_set(
    pairs: Mapping[str, tuple[xr.Dataset, xr.Dataset]],
    *,
    classes: Sequence[str] = tuple(CLASSES),
    level: float = 0.95,
    replicates: int = REPLICATES,
    only: Selection = EVERYTHING,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How a change affects the predictions of several data sets, and how the effects differ.

    Parameters
    ----------
    pairs : mapping of str to pair of xr.Dataset
        For each data set, by name, two captures of the same rows: first without the change, then with it.
    classes : sequence of str
        Classes of predicted tokens: names of `analysis.CLASSES`, or regular expressions between slashes.
    level : float
        Level of the intervals.
    replicates : int
        Number of sign flips.
    only, threads, progress
        See `analysis.scan`; progress is reported for one pair after the other.

    Returns
    -------
    xr.Dataset
        Over data_set, and (data_set, token_class), the results of `effect_of` for each pair: `effect`, `low`, `high`,
        `p`, `of_class` and so on, float64; `predicted` int64 (data_set), the predicted tokens. If there are several,
        `difference` float64 (data_set), the effect minus the mean of the others', with `difference_low`,
        `difference_high` and `difference_p`, which hold simultaneously for all data sets: see `mean_contrast_of`.
        Attributes `untested` and `untested_difference` name data sets that are not tested, with the reason.

    Raises
    ------
    ValueError
        When there is no pair, or the captures of a pair cannot be compared or did not record log-probabilities; the
        message names the pair.
    """
    if not pairs:
        raise ValueError("no pair of captures: give at least one")
    counts = {}
    for name, (one, other) in pairs.items():
        asked = [Jackknife(Effects(members_by_class(classes, one["piece"].values.tolist())))]
        try:
            counts[name] = scan(paired(one, other), asked, only=only, threads=threads, progress=progress)[0]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    own = {name: effect_of(found, level=level, replicates=replicates) for name, found in counts.items()}
    names = xr.DataArray(np.array(list(own), object), dims="data_set", name="data_set")
    found = xr.concat(list(own.values()), names, combine_attrs="drop")
    n = {name: int(each.attrs["n"]) for name, each in own.items()}
    apart = mean_contrast_of(counts, "effect", level=level) if len(counts) > 1 else None
    if apart is not None:
        found = found.merge(apart.drop_vars("estimate"), combine_attrs="drop")
    return described(
        found.assign(predicted=("data_set", list(n.values()))),
        n=n,
        counted="predicted tokens",
        documents={name: int(each.attrs["documents"]) for name, each in own.items()},
        untested={name: each.attrs["untested"] for name, each in own.items() if each.attrs["untested"]},
        untested_difference={} if apart is None else apart.attrs["untested"],
        level=level,
        replicates=replicates,
        estimator="; ".join(
            [next(iter(own.values())).attrs["estimator"], *([] if apart is None else [apart.attrs["estimator"]])]
        ),
        null=0.0,
        definition=DEFINITION,
        source="Fisher 1935 (sign-flip test); Efron & Tibshirani 1993 (bootstrap-t); Westfall & Young 1993",
    )
