"""Which experts the same documents use in two captures: a different checkpoint or precision, or a translation.

Each document is compared with itself, so differences between documents do not hide differences between the captures. If
the captures did not differ, each document's two counts could be exchanged: signs are flipped, which is exact if
documents have the same number of tokens in both, however much documents differ among each other (sign-flip test; Fisher
1935, The design of experiments, section 21).

Promises: constant memory, the same result in any order. Does not compare tokens: see `agreement` for captures of the
same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.contrast import refuse_incomparable
from analysis.metrics.load import ExpertCounts
from analysis.scanning import Array, scan
from analysis.statistics.differences import p_adjusted, p_by_layer, quantile_of_largest, studentized
from analysis.statistics.flips import REPLICATES, flipped, sum_of, why_untested
from analysis.statistics.jackknife import Jackknife


def paired_contrast(
    captures: Mapping[str, xr.Dataset],
    *,
    replicates: int = REPLICATES,
    level: float = 0.95,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How two captures of the same documents differ, layer by layer and expert by expert.

    Parameters
    ----------
    captures : mapping of str to xr.Dataset
        Two captures, by name. Documents are paired by `document_id`; those that only one has are left out.
    replicates : int
        Number of sign flips.
    level : float
        Level of the intervals.
    threads, progress
        See `analysis.scan`; progress is reported for one capture after the other.

    Returns
    -------
    xr.Dataset
        float64: `share` (data_set, layer, expert) of tokens that choose the expert; over (layer, expert) `difference`,
        the first capture's share minus the second's, with the simultaneous interval `difference_low` to
        `difference_high`, and `difference_p`, adjusted for all of them (single-step max-T, Westfall & Young 1993); `p`
        (layer), of the largest studentized difference of the layer. Intervals and p are NaN if there are fewer than six
        units of documents, or four effective ones; attribute `untested` gives the reason. Attributes `documents`
        (paired) and `unpaired` (left out of each capture).

    Raises
    ------
    ValueError
        When there are not two captures, they have different layers or experts, or no document in common.
    """
    refuse_incomparable(captures)
    if len(captures) != 2:
        raise ValueError(f"{len(captures)} captures: exactly two are needed to pair documents")
    ids = [np.unique(capture["document_id"].values) for capture in captures.values()]
    common = np.intersect1d(ids[0], ids[1])
    if not common.size:
        raise ValueError(f"{' and '.join(captures)} have no document_id in common: nothing can be paired")
    counts = [
        scan(_only(capture, common), [Jackknife(ExpertCounts())], threads=threads, progress=progress)[0]
        for capture in captures.values()
    ]
    choices = int(counts[0].attrs["experts_per_token"])
    count, tokens = _by_unit(counts)
    total = tokens.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = count.sum(1) / total[:, None, None]  # (data_set, layer, expert)
        pooled = count.sum((0, 1)) / total.sum()
        part = tokens.sum(0) / total.sum()
    alike = _residuals(count, tokens, np.stack([pooled, pooled]))
    difference, error = sum_of(alike, part)
    reason = why_untested(tokens)
    largest, centred = np.zeros((0, 0)), np.zeros((0, 0))
    if not reason:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (replicates, len(part)))
        largest, centred = (flipped(each, part, signs) for each in (alike, _residuals(count, tokens, share)))
    reach = quantile_of_largest(centred, level) * error
    cell = ("layer", "expert")
    statistic = abs(studentized(difference, error))
    return described(
        xr.Dataset(
            {
                "share": (("data_set", *cell), share),
                "difference": (cell, difference),
                "difference_low": (cell, difference - reach),
                "difference_high": (cell, difference + reach),
                "difference_p": (cell, p_adjusted(statistic, largest)),
                "p": ("layer", p_by_layer(statistic, largest)),
            },
            {"data_set": list(captures), **{name: counts[0][name].values for name in cell}},
        ),
        n=dict(zip(captures, (int(n) for n in total), strict=True)),
        documents=len(common),
        unpaired={name: len(own) - len(common) for name, own in zip(captures, ids, strict=True)},
        untested=reason,
        experts_per_token=choices,
        replicates=replicates,
        level=level,
        null=0.0,
        estimator="plug-in; studentized sign-flip test over whole documents",
        definition="share of the first capture's tokens that choose the expert - the second's, for the same documents",
        source="Fisher 1935 (sign-flip test); Westfall & Young 1993 (max-T)",
    )


def _only(capture: xr.Dataset, documents: Array) -> xr.Dataset:
    """The rows of some documents."""
    rows = np.isin(capture["document_id"].values, documents)
    return capture if rows.all() else capture.isel(doc=rows)


def _by_unit(counts: list[xr.Dataset]) -> tuple[Array, Array]:
    """Choices (data_set, unit, layer, expert) and tokens (data_set, unit), in the same order of units."""
    units = np.unique(np.concatenate([found["unit"].values[1:] for found in counts])).astype(int)
    count, tokens = [], []
    for found in counts:
        own = found["counts"].transpose("replicate", "layer", "expert").values.astype(float)
        at = np.searchsorted(units, found["unit"].values[1:].astype(int))
        by_unit = np.zeros((len(units), *own.shape[1:]))
        by_unit[at] = own[0] - own[1:]
        count.append(by_unit)
        tokens.append(np.zeros(len(units)))
        tokens[-1][at] = found["left_out"].values[1:]
    return np.stack(count), np.stack(tokens)


def _residuals(count: Array, tokens: Array, share: Array) -> Array:
    """Each unit's contribution to the difference, beyond these shares: (unit, layer, expert)."""
    total = tokens.sum(1)
    one, other = ((count[side] - tokens[side][:, None, None] * share[side]) / max(total[side], 1.0) for side in (0, 1))
    residuals: Array = one - other
    return residuals
