"""Which tokens contribute to a difference between two data sets.

A difference in an expert's load has two causes: the data sets have different tokens, or the same tokens go to different
experts. Each token's part of a difference is split exactly into the two (Kitagawa 1955; also known as the
Oaxaca–Blinder decomposition).

Promises: constant memory; the same result in any order. Does not know documents: `analysis.metrics.document_scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.contrast import refuse_incomparable
from analysis.metrics.tokens import TokenCounts
from analysis.scanning import EVERYTHING, Array, Selection, scan


def token_contributions(
    one: xr.Dataset,
    other: xr.Dataset,
    layers: Sequence[int] | None = None,
    *,
    top: int = 20,
    only: Selection = EVERYTHING,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """The tokens that make an expert's load differ between two data sets.

    Parameters
    ----------
    one, other : xr.Dataset
        Captures of one model.
    layers : sequence of int, optional
        The model's layer numbers; default all.
    top : int
        Number of tokens to list per expert.
    only, threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        Over (layer, expert), float64: `difference`, the share of `one`'s tokens that choose the expert minus that of
        `other`'s, and its parts `usage`, from how often tokens occur, and `routing`, from the experts of the same
        tokens. Over (layer, expert, place), largest absolute value first: `token_id` int64 (-1 if there is none),
        `piece` str, and float64 the token's `contribution`, `token_usage` and `token_routing`, which add up to the
        above over all tokens. A token that only one data set has counts as usage.

    Raises
    ------
    ValueError
        When they are not of one model and tokenizer, or a layer was not captured.
    """
    refuse_incomparable({"one": one, "other": other})
    if not np.array_equal(one["piece"].values, other["piece"].values):
        raise ValueError("the captures have different tokenizers: their pieces differ")
    asked = [TokenCounts(layers)]
    tables = [scan(capture, asked, only=only, threads=threads, progress=progress)[0] for capture in (one, other)]
    n = [int(table["tokens"].sum()) for table in tables]
    if not all(n):
        raise ValueError(
            f"the {'other' if n[0] else 'first'} capture has no counted token, so there is nothing to compare"
        )
    pieces = one["piece"].values.astype(object)
    parts = [
        contributions_of(tables[0].isel(layer=index), tables[1].isel(layer=index), pieces, top)
        for index in range(tables[0].sizes["layer"])
    ]
    return described(
        xr.concat(parts, xr.DataArray(tables[0]["layer"].values, dims="layer", name="layer")),
        n=dict(zip(("one", "other"), n, strict=True)),
        null=0.0,
        estimator="plug-in",
        definition="contribution of token x = P1(x) P1(e given x) - P2(x) P2(e given x); usage = (P1(x) - P2(x)) times"
        " the mean of P(e given x); routing = the mean of P(x) times (P1(e given x) - P2(e given x))",
        source="Kitagawa 1955",
    )


def contributions_of(one: xr.Dataset, other: xr.Dataset, pieces: Array, top: int) -> xr.Dataset:
    """`token_contributions` for one layer, from the counts (token_id, expert) of both sides and their `tokens`."""
    seen = np.flatnonzero(one["tokens"].values + other["tokens"].values)
    share, goes = [], []
    for side in (one, other):
        tokens, count = side["tokens"].values[seen, None], side["counts"].values[seen]
        share.append(tokens / tokens.sum())
        goes.append(np.divide(count, tokens, out=np.full(count.shape, np.nan), where=tokens > 0))
    goes = [np.where(np.isnan(mine), its, mine) for mine, its in (goes, goes[::-1])]
    usage = (share[0] - share[1]) * (goes[0] + goes[1]) / 2
    routing = (share[0] + share[1]) / 2 * (goes[0] - goes[1])
    values = [part.T for part in (usage + routing, usage, routing)]  # (expert, token)
    order = np.argsort(-abs(values[0]), axis=-1, kind="stable")[:, :top]
    listed = [np.take_along_axis(part, order, -1) for part in values]
    none, ids = listed[0] == 0, seen[order]
    names, sums = ("contribution", "token_usage", "token_routing"), ("difference", "usage", "routing")
    return xr.Dataset(
        {
            **{name: ("expert", part.sum(-1)) for name, part in zip(sums, values, strict=True)},
            "token_id": (("expert", "place"), np.where(none, -1, ids)),
            "piece": (("expert", "place"), np.where(none, "", pieces[ids])),
            **{name: (("expert", "place"), part) for name, part in zip(names, listed, strict=True)},
        },
        coords={"expert": np.arange(len(values[0])), "place": np.arange(1, order.shape[1] + 1)},
    )
