"""A token's distribution over all experts, from its router's logits; used by several metrics and the explorer.

Scores are the exponentials of the logits if weights come from a softmax, before or after the choice, and the sigmoids
of the logits if weights come from those. The distribution is the scores divided by their sum. Correction biases and
groups affect only the choice, not the weights, and are not included.

If only the largest M logits were recorded, each other expert's score lies between 0 and the smallest recorded score.
With all of them at 0, the entropy is smallest and the mass of the recorded experts largest; with all at the smallest
recorded score, the entropy is largest and the mass smallest: entropy grows with any score whose logarithm is below the
mean, and so with the smallest ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from analysis.scanning import Array, kernel, sizes, without
from store.attributes import attributes

HOW = {"softmax": "exponential", "renormalized": "exponential", "sigmoid": "sigmoid"}
"""Values of the attribute `router_transformation`, which says how weights come from logits, and the corresponding
score."""
NO_IDS = np.zeros((0, 0, 0, 0), np.uint8)  # instead of `logit_expert`, if the logits of all experts were recorded


@dataclass(frozen=True)
class Scores:
    """How a capture's logits become scores."""

    how: str
    """The function: "exponential" or "sigmoid"."""
    experts: int
    """Experts per layer; more than the logits if only the largest were recorded."""
    recorded: int
    """Recorded logits of a token at a layer."""

    @property
    def sigmoid(self) -> bool:
        """Whether scores are sigmoids."""
        return self.how == "sigmoid"

    @property
    def truncated(self) -> bool:
        """Whether only the largest logits were recorded."""
        return self.recorded < self.experts


def scores_of(dataset: xr.Dataset) -> Scores:
    """How a capture's logits become scores, according to its attributes.

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
        When it has no logits, or the attributes give no known transformation.
    """
    if "logit" not in dataset:
        raise ValueError(f"the distribution of a router needs {without(dataset, ['logit'])}")
    how = attributes(dataset).get("router_transformation")
    if how not in HOW:
        where = dataset.attrs.get("dataset", "the capture")
        raise ValueError(
            f"{where} has router_transformation={how!r}: a distribution can only be computed for {', '.join(HOW)}"
        )
    return Scores(how=HOW[how], experts=sizes(dataset)[2], recorded=dataset["logit"].sizes[dataset["logit"].dims[-1]])


def known_scores(dataset: xr.Dataset) -> Scores | None:
    """The same; None if no logits were recorded, or it is not known how they become weights."""
    known = "logit" in dataset and attributes(dataset).get("router_transformation") in HOW
    return scores_of(dataset) if known else None


def probabilities(logit: Array, scores: Scores) -> Array:
    """The distribution over the experts with recorded logits, float64, of the same shape."""
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
    """The entropy in bits of one token at one layer: the bounds, which are equal if all logits were recorded."""
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
    """The bounds on the entropy of scores with the given sum and sum of score × log score, if `left` further scores are
    unknown, each at most the smallest, which is given as its logarithm."""
    low = _bits(total, product)
    if left == 0:
        return low, low
    others = left * np.exp(smallest)
    return low, _bits(total + others, product + others * smallest)


@kernel
def _bits(total: float, product: float) -> float:
    """The entropy of scores with the given sum and sum of score × log score; at least 0 in spite of rounding."""
    return float(max((np.log(total) - product / total) / np.log(2.0), 0.0))


@kernel
def entropies(logit: Array, experts: int, sigmoid: bool) -> Array:
    """Lower bounds of the entropy, in bits, float64 (token, layer); NaN if a logit is not finite."""
    tokens, layers, _ = logit.shape
    found = np.empty((tokens, layers))
    for token in range(tokens):
        for layer in range(layers):
            of_all = logit[token, layer]
            found[token, layer] = entropy_ends(of_all, experts, sigmoid)[0] if np.isfinite(of_all).all() else np.nan
    return found
