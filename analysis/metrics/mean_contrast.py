"""How data sets differ in a mean: of router entropy, saliency, log-probability, or any other that a reducer returns.

The means are over tokens, and documents are the units, as in `analysis.contrast`. The compared quantity is not a share
of tokens, so documents cannot be drawn around a common share: the observed documents are resampled, and the largest
studentized difference of all cells is compared with that of the resamples (`analysis.statistics.resampled`).

Does not know what the numbers are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.contrast import models_differ, other_sets, refuse_incomparable, why_untested
from analysis.scanning import Reducer, scan
from analysis.statistics.jackknife import Jackknife, effective_documents, left_out
from analysis.statistics.resampled import MIN_DOCUMENTS, REPLICATES, together, totals_of


def mean_contrast(
    captures: Mapping[str, xr.Dataset],
    reducer: Reducer,
    variable: str,
    *,
    replicates: int = REPLICATES,
    level: float = 0.95,
    block_tokens: int | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How data sets differ in a mean over tokens, cell by cell.

    Parameters
    ----------
    captures : mapping of str to xr.Dataset
        Two or more captures of one model, by name.
    reducer : Reducer
        Computes the mean: `RouterDistribution`, `Saliency`, `LogProbability`, `Surprise`, or your own.
    variable : str
        The mean's name in its result: "mean_entropy", "mean_saliency", "within".
    replicates : int
                Number of resamples of documents.
    level : float
        Simultaneous level of the intervals.
    block_tokens : int, optional
        Use blocks of so many tokens instead of documents: see `Jackknife`.
    threads, progress
        See `analysis.scan`; progress is reported for one capture after the other.

    Returns
    -------
    xr.Dataset
        See `mean_contrast_of`. Attribute `models_differ` says how the captures' models differ, for example in
        quantization.

    Raises
    ------
    ValueError
        When there are fewer than two captures, they have different layers or experts, one lacks what the reducer needs,
        or there is no such variable.
    """
    refuse_incomparable(captures)
    asked = [Jackknife(reducer, block_tokens=block_tokens)]
    found = {name: scan(capture, asked, threads=threads, progress=progress)[0] for name, capture in captures.items()}
    return mean_contrast_of(found, variable, replicates=replicates, level=level).assign_attrs(
        models_differ=models_differ(captures)
    )


def mean_contrast_of(
    counts: Mapping[str, xr.Dataset], variable: str, *, replicates: int = REPLICATES, level: float = 0.95
) -> xr.Dataset:
    """How data sets differ in a mean over tokens, from the counts of a `Jackknife` for each.

    Parameters
    ----------
    counts : mapping of str to xr.Dataset
        Results of `analysis.Jackknife` with one reducer, by data set.
    variable : str
        One of their variables that is a mean and whose attribute `amount` names what it is a mean over.
    replicates : int
        Number of resamples of documents.
    level : float
        Simultaneous level of the intervals.

    Returns
    -------
    xr.Dataset
        float64 over (data_set) and the variable's own dims: `estimate`, the data set's own value; `difference` from the
        mean of the other data sets, with the interval `difference_low` to `difference_high`, and `difference_p`.
        Intervals and p hold simultaneously for all cells (single-step max-T, Westfall & Young 1993), so the largest
        difference may be selected. NaN if a data set has no value; intervals and p also if it has fewer than 10
        effective documents, in total or for the tokens of the cell. Attribute `untested` names data sets that are
        excluded, with the reason.

    Raises
    ------
    ValueError
        When there are fewer than two data sets, or no such variable.
    """
    if len(counts) < 2:
        raise ValueError(f"{len(counts)} data sets: a contrast needs at least two")
    names, first = list(counts), next(iter(counts.values()))
    means = [str(name) for name in first if "amount" in first[name].attrs]
    if variable not in means:
        raise ValueError(f"{variable!r} is not a mean of the reducer; it has {', '.join(means) or 'none'}")
    untested = {name: reason for name, found in counts.items() if (reason := _why_untested(found))}
    tested = [index for index, name in enumerate(names) if name not in untested]
    sets = [totals_of(found, variable) for found in counts.values()]
    apart = together(sets, other_sets(len(names), tested), level=level, replicates=replicates)
    own = first[variable].isel(replicate=0).drop_vars(["replicate", "left_out", "unit"]).drop_attrs()
    shape, dims = (len(names), *own.shape), ("data_set", *own.dims)
    estimate = np.stack([found[variable].isel(replicate=0).values for found in counts.values()])
    values = {"estimate": estimate, "difference": apart.estimate.reshape(shape)}
    values |= {f"difference_{name}": getattr(apart, name).reshape(shape) for name in ("low", "high", "p")}
    return described(
        xr.Dataset({name: (dims, value) for name, value in values.items()}, {"data_set": names, **own.coords}),
        n={name: int(found.attrs["n"]) for name, found in counts.items()},
        documents={name: int(found.attrs["documents"]) for name, found in counts.items()},
        effective_documents={name: round(effective_documents(left_out(found)), 1) for name, found in counts.items()},
        untested=untested,
        level=level,
        tests=apart.tests,
        replicates=replicates,
        null=0.0,
        estimator="mean over tokens; simultaneous intervals and max-T p-values, from documents resampled with"
        " replacement",
        definition=f"difference = the data set's {variable} - mean of the others'; {first.attrs['definition']}",
        source="Efron & Tibshirani 1993 (bootstrap-t); Westfall & Young 1993 (max-T)",
    )


def _why_untested(found: xr.Dataset) -> str:
    """Why a data set is excluded from tests and intervals, in words; empty if it is not."""
    reason, effective = why_untested(found), effective_documents(left_out(found))
    if reason or effective >= MIN_DOCUMENTS:
        return reason
    said = f"{found.attrs['documents']} documents of unequal length, worth {effective:.1f} equal ones"
    return f"{said}: a test of means needs at least {MIN_DOCUMENTS:.0f}"
