"""What an expert does, in one line computed from the data, and its evidence.

Promises: a token class, or a token, is named only if it chooses the expert more often than its documents explain,
corrected for all classes, tokens, layers and experts (Bonferroni); a data set only if its interval, simultaneous over
all experts, layers and data sets, lies above those of all others. If nothing is beyond chance, the line says so. Does
not know HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.scanning import Array

SURE = 0.05  # probability that something is named although documents explain everything
LEAST_LIFT = 1.5  # the least lift of what is named: smaller differences do not characterize an expert (arbitrary)
MOST = 0.5  # of a data set's tokens: the line names this share if the expert gets more (arbitrary)
CLASSES_TOLD, TOKENS_TOLD = 3, 3
LEAST_WEIGHT = 0.25  # the least weight of a further class, relative to the first (arbitrary)


@dataclass(frozen=True)
class Kind:
    """A token class, or a token, that an expert gets more often than by chance."""

    number: int
    """Its index in the input."""
    name: str
    p: float
    """Corrected for all tests."""
    share: float
    """Its share of the tokens that choose the expert."""
    of_all: float
    """Its share of all tokens."""
    reach: float
    """The share of its tokens that choose the expert."""

    @property
    def lift(self) -> float:
        """The share of its tokens that choose the expert, over that of all tokens."""
        return self.share / self.of_all

    @property
    def weight(self) -> float:
        """Its part of the information that the expert carries about the token, in bits; kinds are sorted by it."""
        return self.share * float(np.log2(self.lift))


@dataclass(frozen=True)
class Set:
    """An expert's share in a data set."""

    name: str
    share: float
    low: float
    high: float


def kinds_of(names: Sequence[str], p: Array, count: Array, tokens: Array, of: tuple[int, int]) -> list[Kind]:
    """The classes or tokens that an expert gets beyond chance, the most informative first.

    Parameters
    ----------
    names
        The names of the classes or tokens.
    p : array, shape (name), float64
        Corrected p-values.
    count, tokens : arrays, shape (name), int64
        How often each chose the expert, and how often it occurs.
    of : tuple of int
        The same for all tokens.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share, of_all = count / of[0], tokens / of[1]
        found = np.flatnonzero((p <= SURE) & (share >= LEAST_LIFT * of_all) & (count > 0)).tolist()
    values = (p, share, of_all, count / np.maximum(tokens, 1))
    kinds = [Kind(at, names[at], *(float(each[at]) for each in values)) for at in found]
    return sorted(kinds, key=lambda kind: -kind.weight)


def apart(kinds: Sequence[Kind], members: Array, count: Array, most: int = CLASSES_TOLD) -> list[Kind]:
    """The first classes, each mostly of other tokens than those before it, and with at least `LEAST_WEIGHT` times the
    weight of the first.

    Parameters
    ----------
    kinds
        From `kinds_of`.
    members : array, shape (class, token_id), bool
    count : array, shape (token_id), int64
        How often each token chose the expert.
    most
        The most classes to return.
    """
    told: list[Kind] = []
    for kind in kinds:
        own = members[kind.number]
        shared = [count[own & members[other.number]].sum() for other in told]
        smaller = [min(count[own].sum(), count[members[other.number]].sum()) for other in told]
        others = all(both < MOST * least for both, least in zip(shared, smaller, strict=True))
        if others and kind.weight >= LEAST_WEIGHT * kinds[0].weight:
            told.append(kind)
    return told[:most]


def busiest(sets: Sequence[Set]) -> list[Set]:
    """The data sets whose intervals lie above those of all others; empty if there are none, or no others."""
    if any(np.isnan(each.low) for each in sets):
        return []
    ordered = sorted(sets, key=lambda each: -each.low)
    for number in range(1, len(ordered)):
        if ordered[number - 1].low > max(each.high for each in ordered[number:]):
            return sorted(ordered[:number], key=lambda each: -each.share)
    return []


def summary(
    own: Set, reach: float, classes: Sequence[Kind], tokens: Sequence[Kind], others: Sequence[Set]
) -> Mapping[str, Any]:
    """The `line`, and the `evidence` for it in sentences.

    Parameters
    ----------
    own, others
        The data set of the page, and the other ones.
    reach
        Share of its tokens that choose the expert.
    classes, tokens
        What it gets beyond chance, from `apart` and `kinds_of`.
    """
    if not reach:
        return {"line": f"No token of {own.name} chooses it", "evidence": []}
    tokens, strongest = tokens[:TOKENS_TOLD], busiest([own, *others])
    told = classes or [replace(kind, name=f"“{kind.name}”") for kind in tokens]
    line = [_listed([f"{kind.name} ({kind.lift:.1f} × the average)" for kind in told])] if told else []
    if not line and reach >= MOST:
        line = [f"{reach:.0%} of the tokens of {own.name}"]
    if strongest:
        line.append(f"strongest in {_listed([each.name for each in strongest])}")
    if not line:
        return {"line": f"Nothing distinguishes it in {own.name}", "evidence": [_nothing(reach)]}
    evidence = [_of_class(kind, own.name) for kind in classes]
    if tokens:
        said = [f"“{kind.name}” ({kind.lift:.1f} ×, {kind.reach:.0%} of them choose it)" for kind in tokens]
        evidence.append(f"Most characteristic tokens: {_listed(said)}.")
    if strongest:
        evidence.append(_busy(strongest, [each for each in (own, *others) if each not in strongest]))
    text = "; ".join(line)
    return {"line": text[0].upper() + text[1:], "evidence": evidence}


def _of_class(kind: Kind, where: str) -> str:
    p = "p < 0.001" if kind.p < 0.001 else f"p = {kind.p:.3f}"
    return (
        f"{kind.share:.0%} of the tokens that choose it in {where} are {kind.name}, compared with {kind.of_all:.0%} of"
        f" all tokens there; {kind.reach:.0%} of them choose it ({p}, compared with tokens shuffled within their"
        " documents, corrected for all classes, experts and layers)."
    )


def _busy(strongest: Sequence[Set], rest: Sequence[Set]) -> str:
    nearest = max(rest, key=lambda each: each.share)
    return (
        f"It gets {_listed([f'{each.share:.1%} of the choices of {each.name}' for each in strongest])}, compared with"
        f" {nearest.share:.1%} of those of {nearest.name}{', the next highest' if len(rest) > 1 else ''} (the"
        " intervals over documents, simultaneous for all experts, layers and data sets, do not overlap)."
    )


def _nothing(reach: float) -> str:
    return (
        f"It is chosen by {reach:.0%} of the tokens there. There is no evidence that a token class or a token chooses"
        f" it at least {LEAST_LIFT:g} times as often as the average, or that one data set uses it more than the others"
        " do."
    )


def _listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
