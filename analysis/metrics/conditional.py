"""What words, data sets and positions say about the experts when the obvious confounder is already known.

Words are bursty: a token occurs in few documents, and routes may depend on the document. Data sets use different words,
and so do the beginnings of documents. Each measure here is a conditional mutual information, which removes that effect,
with a null from shuffles that preserve it.

Computed from a sample of documents (`analysis.SampledRoutes`), which is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.contrast import refuse_incomparable
from analysis.metrics.load import Bins, range_starts
from analysis.metrics.sample import SampledRoutes
from analysis.scanning import scan
from analysis.statistics.conditional import conditional_information

Progress = Callable[[int, int], None]


def token_information(
    dataset: xr.Dataset,
    *,
    size: int = 65_536,
    draws: int = 100,
    threads: int | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """How much a token's identity says about its experts when its document is known: I(expert; token | document).

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    size : int
        Size of the sample of documents in tokens; see `analysis.SampledRoutes`.
    draws : int
        Number of shuffles of tokens within documents.
    threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        See `token_information_of`.
    """
    [routes] = scan(dataset, [SampledRoutes(size)], threads=threads, progress=progress)
    return token_information_of(routes, draws=draws)


def token_information_of(routes: xr.Dataset, *, draws: int = 100) -> xr.Dataset:
    """How much a token's identity says about its experts when its document is known, from the sample of
    `SampledRoutes`.

    Parameters
    ----------
    routes : xr.Dataset
        From `analysis.SampledRoutes`.
    draws : int
        Number of shuffles of tokens within documents.

    Returns
    -------
    xr.Dataset
        float64 (layer), in bits: `mutual_information` by maximum likelihood, far too large in short documents; `null`
        and `null_high`, the mean and the 95% quantile after shuffles; `corrected`, the difference from the mean, 0 on
        average if routes depend on documents only. It errs on the small side: a token that occurs once in its document
        adds as much to the null. NaN if there is no token.
    """
    document = routes["document_id"].values
    found = conditional_information(routes["expert"], routes["token_id"].values, document, draws=draws)
    return _described(found, [routes], "token", "document", "tokens shuffled within documents")


def domain_information(
    captures: Mapping[str, xr.Dataset],
    *,
    size: int = 65_536,
    draws: int = 100,
    threads: int | None = None,
) -> xr.Dataset:
    """How much a token's data set says about its experts when the token is known: I(expert; data set | token).

    It is 0 if data sets differ only because they use different words. The null shuffles whole documents between the
    data sets, which keep their numbers of documents: documents of very unequal lengths or kinds make it too wide or too
    narrow.

    Parameters
    ----------
    captures : mapping of str to xr.Dataset
        Two or more data sets, of one model and tokenizer.
    size : int
        Size of the sample of documents of each data set in tokens; see `analysis.SampledRoutes`. Data sets are weighted
        by their sampled tokens.
    draws : int
        Number of shuffles of documents between data sets.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        float64 (layer), in bits: `mutual_information` by maximum likelihood; `null` and `null_high`, the mean and the
        95% quantile after shuffles; `corrected`, the difference from the mean. NaN if there is no token.

    Raises
    ------
    ValueError
        When there are fewer than two captures, or they have different layers, experts, choices or token ids.
    """
    refuse_incomparable(captures)
    [(first, one), *others] = captures.items()
    for name, other in others:
        if not np.array_equal(one["piece"].values, other["piece"].values):
            raise ValueError(f"{first} and {name} have different token ids: both must be made with one tokenizer")
    routes = [scan(capture, [SampledRoutes(size)], threads=threads)[0] for capture in captures.values()]
    joined = xr.concat([each.drop_attrs() for each in routes], "token")
    data_set = np.repeat(np.arange(len(routes)), [each.sizes["token"] for each in routes])
    unit = np.unique(np.stack([data_set, joined["document_id"].values]), axis=1, return_inverse=True)[1]
    found = conditional_information(joined["expert"], data_set, joined["token_id"].values, unit=unit, draws=draws)
    names = {"data_sets": list(captures)}
    return _described(found, routes, "data set", "token", "documents shuffled between data sets", **names)


def position_information(
    dataset: xr.Dataset,
    *,
    bins: Bins = "doubling",
    size: int = 65_536,
    draws: int = 100,
    threads: int | None = None,
) -> xr.Dataset:
    """How much a token's position in its row says about its experts when the token is known: I(expert; position |
    token).

    It is 0 if positions differ only because different words occur there. The null shuffles the positions of a token
    among its occurrences in the same document, so the effect of document lengths is in the null, not in `corrected`.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    bins : int or "doubling"
        Ranges of positions; see `analysis.ExpertCounts`.
    size : int
        Size of the sample of documents in tokens; see `analysis.SampledRoutes`.
    draws : int
        Number of shuffles of positions.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        float64 (layer), in bits: `mutual_information` by maximum likelihood; `null` and `null_high`, the mean and the
        95% quantile after shuffles; `corrected`, the difference from the mean, which errs on the small side: a token
        that occurs once in its document adds as much to the null. NaN if there is no token.
    """
    [routes] = scan(dataset, [SampledRoutes(size)], threads=threads)
    starts = range_starts(bins, dataset.sizes["position"])
    place = np.searchsorted(starts, routes["position"].values, side="right")
    token, document = routes["token_id"].values, routes["document_id"].values
    found = conditional_information(routes["expert"], place, token, within=document, draws=draws)
    return _described(found, [routes], "range of positions", "token", "positions shuffled within token and document")


def _described(found: xr.Dataset, routes: list[xr.Dataset], x: str, given: str, null: str, **more: Any) -> xr.Dataset:
    """The attributes of a measure and of its samples."""
    return described(
        found,
        n=sum(each.attrs["n"] for each in routes),
        estimator=found.attrs["estimator"],
        null=f"null: {null}; 0 for corrected",
        definition=f"x is the {x}, g the {given}: {found.attrs['definition']}",
        source=found.attrs["source"],
        of=sum(each.attrs["of"] for each in routes),
        documents=sum(each.attrs["documents"] for each in routes),
        **more,
    )
