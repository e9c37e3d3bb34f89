"""How data sets differ in a mean: of router entropy, saliency, log-probability, or any other that a reducer gives.

The means are over tokens, and documents are the unit, as in `analysis.contrast`. What is compared is no share of
tokens,
so that no documents can be drawn around a common one: documents are drawn from those that there are, and
the largest studentized difference of all cells is compared with that of the draws (`analysis.statistics.resampled`).

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
        What gives the mean: `RouterDistribution`, `Saliency`, `LogProbability`, `Surprise`, or your own.
    variable : str
        The mean's name in its result: "mean_entropy", "mean_saliency", "within".
    replicates : int
        Draws of documents.
    level : float
        Of the intervals, all of them together.
    block_tokens : int, optional
        Take blocks of so many tokens for documents: see `Jackknife`.
    threads, progress
        See `analysis.scan`; progress is that of one capture after the other.

    Returns
    -------
    xr.Dataset
        See `mean_contrast_of`. Attribute `models_differ` says in what the captures' models differ, such as
        quantization.

    Raises
    ------
    ValueError
        When there are fewer than two captures, they have other layers or experts, one lacks what the reducer needs, or
        there is no such variable.
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
    """How data sets differ in a mean over tokens, from what a `Jackknife` counted of each.

    Parameters
    ----------
    counts : mapping of str to xr.Dataset
        Results of `analysis.Jackknife` of one reducer, by data set.
    variable : str
        One of their variables that is a mean, and names by its attribute `amount` what it is a mean over.
    replicates : int
        Draws of documents.
    level : float
        Of the intervals, all of them together.

    Returns
    -------
    xr.Dataset
        float64 over (data_set) and the variable's own dims: `estimate`, the data set's own value; `difference` to the
        mean of the other data sets, with the interval `difference_low` to `difference_high`, and `difference_p`.
        Intervals and p hold of all cells together (single-step max-T, Westfall & Young 1993), so that the largest
        difference may be picked. NaN where a data set has no value; intervals and p also where it has fewer than 10
        effective documents, in all or of the tokens that the cell is a mean of. Attribute `untested` names data sets
        that take no part, with the reason.

    Raises
    ------
    ValueError
        When there are fewer than two data sets, or no such variable.
    """
    if len(counts) < 2:
        raise ValueError(f"{len(counts)} data sets: a contrast needs two or more")
    names, first = list(counts), next(iter(counts.values()))
    means = [str(name) for name in first if "amount" in first[name].attrs]
    if variable not in means:
        raise ValueError(f"{variable!r} is no mean that the reducer gives; it gives {', '.join(means) or 'none'}")
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
        estimator="mean over tokens; simultaneous intervals and max-T p-values, from documents drawn with replacement",
        definition=f"difference = the data set's {variable} - mean of the others'; {first.attrs['definition']}",
        source="Efron & Tibshirani 1993 (bootstrap-t); Westfall & Young 1993 (max-T)",
    )


def _why_untested(found: xr.Dataset) -> str:
    """Why a data set takes no part in tests and intervals, in words; empty where it does."""
    reason, effective = why_untested(found), effective_documents(left_out(found))
    if reason or effective >= MIN_DOCUMENTS:
        return reason
    said = f"{found.attrs['documents']} documents, as unequal as {effective:.1f} of one length"
    return f"{said}: no test of means below {MIN_DOCUMENTS:.0f}"
