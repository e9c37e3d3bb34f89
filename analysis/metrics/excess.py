"""Which tokens go to an expert more often than their documents explain.

A token that occurs in few documents has the experts of these documents. So each count is compared with its mean if
tokens were shuffled within their documents, which is known exactly, and the tail probability is bounded.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import Array, kernel


def token_excess_of(routes: xr.Dataset, *, min_count: int = 20) -> xr.Dataset:
    """How much more often tokens went to experts than their documents explain, from the sample of `SampledRoutes`.

    If tokens are shuffled within documents, the count of a token x at an expert e is a sum of hypergeometric variables,
    one for each document, and therefore a sum of independent Bernoulli variables (Vatutin & Mikhailov 1982). Of all
    such sums with the same mean, the binomial has the heaviest tail (Hoeffding 1956, theorem 4).

    Parameters
    ----------
    routes : xr.Dataset
        From `analysis.SampledRoutes`.
    min_count : int
        Tokens that occur less often in the sample are left out.

    Returns
    -------
    xr.Dataset
        Over (token_id, layer, expert): `counts` int64, `expected` float64, its mean when tokens are shuffled within
        their documents, and `p` float64, an upper bound on the probability of a count at least as large under
        shuffling, for a single cell; `tokens` int64 and the coordinate `piece` (token_id), the token's occurrences and
        text.

    Raises
    ------
    ValueError
        When `min_count` is below 1.
    """
    from scipy import special

    if min_count < 1:
        raise ValueError(f"min_count={min_count}: must be at least 1")
    ids, first, token = np.unique(routes["token_id"].values, return_index=True, return_inverse=True)
    document = np.unique(routes["document_id"].values, return_inverse=True)[1]
    occurrences = np.bincount(token, minlength=len(ids))
    frequent = np.flatnonzero(occurrences >= min_count)
    slot = np.full(len(ids), -1)
    slot[frequent] = np.arange(len(frequent))
    expert = routes["expert"].transpose("token", "layer", "k").values
    experts = routes.attrs["experts"]
    count, expected = _count(expert, slot[token], document, experts, len(frequent))
    n = occurrences[frequent]
    share = np.clip(expected / n[:, None, None], 0, 1)
    # P(Binomial(n, share) >= count), by the incomplete beta function; Hoeffding's bound holds for counts of at least
    # the mean + 1.
    tail = special.betainc(np.maximum(count, 1), (n[:, None, None] - count) + 1.0, share)
    p = np.where(count >= expected + 1, tail, 1.0)
    dims = ("token_id", "layer", "expert")
    result = xr.Dataset(
        {"counts": (dims, count), "expected": (dims, expected), "p": (dims, p), "tokens": ("token_id", n)},
        coords={
            "token_id": ids[frequent],
            "layer": routes["layer"].values,
            "expert": np.arange(experts),
            "piece": ("token_id", routes["piece"].values[first[frequent]]),
        },
    )
    return described(
        result,
        n=routes.attrs["n"],
        estimator="counts; p from the binomial distribution with the same mean",
        null="expected",
        definition="expected = Σ over documents d of n_xd N_de / T_d: occurrences of x, tokens of e, and tokens",
        source="Hoeffding 1956; Vatutin & Mikhailov 1982",
        of=routes.attrs["of"],
        documents=routes.attrs["documents"],
        min_count=min_count,
    )


@kernel
def _count(expert: Array, slot: Array, document: Array, experts: int, tokens: int) -> tuple[Array, Array]:
    """Counts of (token, layer, expert) and their means when tokens are shuffled within documents; documents are
    contiguous.

    Each occurrence of a token adds its document's share of tokens at the expert.
    """
    n, layers, choices = expert.shape
    count, expected = np.zeros((tokens, layers, experts), dtype=np.int64), np.zeros((tokens, layers, experts))
    share = np.zeros((layers, experts))
    start = 0
    while start < n:
        stop = start
        share[:] = 0.0
        while stop < n and document[stop] == document[start]:
            for layer in range(layers):
                for k in range(choices):
                    share[layer, expert[stop, layer, k]] += 1.0
            stop += 1
        share /= stop - start
        for at in range(start, stop):
            if slot[at] >= 0:
                expected[slot[at]] += share
                for layer in range(layers):
                    for k in range(choices):
                        count[slot[at], layer, expert[at, layer, k]] += 1
        start = stop
    return count, expected
