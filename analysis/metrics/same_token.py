"""Tokens of one row with the same id: differences within them are not explained by words or documents.

Frequent words are easy to predict and have their own experts, and documents differ in both. Deviations from the mean of
the same token in the same row contain neither effect (a regression with an effect for each token id and row).
"""

from __future__ import annotations

import numpy as np

from analysis.scanning import Array, kernel


@kernel
def usable(counted: Array, logprob: Array) -> Array:
    """Positions of a row whose token is counted and has a prediction, unordered: int64."""
    return np.flatnonzero(counted & ~np.isnan(logprob))


@kernel
def grouped(place: Array, token: Array) -> tuple[Array, Array]:
    """These positions of a row ordered by token id, and the start of each id in that order, plus the end."""
    order = place[np.argsort(token[place], kind="mergesort")]
    starts = np.zeros(order.size + 1, np.int64)
    groups = 0
    for index in range(order.size):
        if index == 0 or token[order[index]] != token[order[index - 1]]:
            starts[groups] = index
            groups += 1
    starts[groups] = order.size
    return order, starts[: groups + 1]
