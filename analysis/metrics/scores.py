"""A token's distribution over all experts, from its router's logits: what several metrics and the explorer share.

Scores are the exponentials of the logits where weights are made by a softmax, before or after the choice, and their
sigmoids where they are made by these; divided by their sum they are the distribution. Correction biases and groups,
which choose and do not weigh, are not in it.

Where only the largest M logits were recorded, each other expert's score lies between 0 and the smallest of theirs. All
at 0 gives the smallest entropy and the largest mass of what is recorded, all at that score the largest entropy and the
smallest mass: entropy grows with any score that is below the mean of its logarithm, and so with the smallest ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from analysis.scanning import Array, kernel, sizes, without
from store.attributes import attributes

HOW = {"softmax": "exponential", "renormalized": "exponential", "sigmoid": "sigmoid"}
"""Values of the attribute `router_transformation`, which says how weights come from logits, and what a score is."""
NO_IDS = np.zeros((0, 0, 0, 0), np.uint8)  # in place of `logit_expert`, where the logits of all experts are there


@dataclass(frozen=True)
class Scores:
    """How a capture's logits become scores."""

    how: str
    """By the "exponential" or the "sigmoid" of each."""
    experts: int
    """Of a layer; more than there are logits where only the largest were recorded."""
    recorded: int
    """Logits of a token at a layer."""

    @property
    def sigmoid(self) -> bool:
        """Whether scores are sigmoids."""
        return self.how == "sigmoid"

    @property
    def truncated(self) -> bool:
        """Whether only the largest logits were recorded."""
        return self.recorded < self.experts


def scores_of(dataset: xr.Dataset) -> Scores:
    """How a capture's logits become scores, as its attributes say.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture with the router's logits.

    Returns
    -------
    Scores
        What `RouterDistribution` and `SurpriseEntropy` need to know.

    Raises
    ------
    ValueError
        When it has no logits, or they say nothing that is known here.
    """
    if "logit" not in dataset:
        raise ValueError(f"the distribution of a router needs {without(dataset, ['logit'])}")
    how = attributes(dataset).get("router_transformation")
    if how not in HOW:
        where = dataset.attrs.get("dataset", "the capture")
        raise ValueError(
            f"how the logits of {where} become weights is {how!r}, as the attribute router_transformation says: a"
            f" distribution can be made where it is one of {', '.join(HOW)}"
        )
    return Scores(how=HOW[how], experts=sizes(dataset)[2], recorded=dataset["logit"].sizes[dataset["logit"].dims[-1]])


def known_scores(dataset: xr.Dataset) -> Scores | None:
    """The same; None where no logits were recorded, or it is not known how they become weights."""
    known = "logit" in dataset and attributes(dataset).get("router_transformation") in HOW
    return scores_of(dataset) if known else None


def probabilities(logit: Array, scores: Scores) -> Array:
    """The distribution over the experts whose logits are there, float64, of the same shape."""
    logit = np.asarray(logit, np.float64)
    with np.errstate(over="ignore"):
        score = 1 / (1 + np.exp(-logit)) if scores.sigmoid else np.exp(logit - logit.max(-1, keepdims=True))
    found: Array = score / score.sum(-1, keepdims=True)
    return found


@kernel
def log_score(logit: float, sigmoid: bool) -> float:
    """The logarithm of a logit's score."""
    if not sigmoid:
        return logit
    return float(-np.log1p(np.exp(-logit)) if logit > 0 else logit - np.log1p(np.exp(logit)))


@kernel
def entropy_ends(logit: Array, experts: int, sigmoid: bool) -> tuple[float, float]:
    """The entropy in bits of one token at one layer: the bounds, which are equal where all logits are there."""
    largest, smallest, total, product = log_score(logit.max(), sigmoid), 0.0, 0.0, 0.0
    for index in range(logit.size):
        log = log_score(logit[index], sigmoid) - largest
        score = np.exp(log)
        smallest = min(smallest, log)
        total += score
        product += score * log
    return bits_of(total, product, smallest, experts - logit.size)


@kernel
def bits_of(total: float, product: float, smallest: float, left: int) -> tuple[float, float]:
    """The bounds of the entropy of scores of this sum and this sum of score × log score, where so many are left, each
    of them at most the smallest, which is given as its logarithm."""
    low = _bits(total, product)
    if left == 0:
        return low, low
    others = left * np.exp(smallest)
    return low, _bits(total + others, product + others * smallest)


@kernel
def _bits(total: float, product: float) -> float:
    """The entropy of scores of this sum and this sum of score × log score; not below 0, as rounding may make it."""
    return float(max((np.log(total) - product / total) / np.log(2.0), 0.0))


@kernel
def entropies(logit: Array, experts: int, sigmoid: bool) -> Array:
    """Lower bounds of the entropy, in bits, float64 (token, layer); NaN where a logit is not finite."""
    tokens, layers, _ = logit.shape
    found = np.empty((tokens, layers))
    for token in range(tokens):
        for layer in range(layers):
            of_all = logit[token, layer]
            found[token, layer] = entropy_ends(of_all, experts, sigmoid)[0] if np.isfinite(of_all).all() else np.nan
    return found
