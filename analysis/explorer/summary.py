"""What an expert does, in one line computed from the data, and what it rests on.

Promises: a class of tokens, or a token, is named only where it reaches the expert more often than its documents
explain, with all classes, tokens, layers and experts counted as tests (Bonferroni); a data set only where its interval,
which holds all experts, layers and data sets together, lies above those of all others. Where nothing is beyond chance,
that is what is said. Does not know HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.scanning import Array

SURE = 0.05  # probability that something is named where documents explain all
LEAST_LIFT = 1.5  # of what is named: an expert is not for what it gets hardly more of (arbitrary)
MOST = 0.5  # of a data set's tokens: an expert that gets more is told by that (arbitrary)
CLASSES_TOLD, TOKENS_TOLD = 3, 3
LEAST_WEIGHT = 0.25  # of a class that is told, beside that of the first (arbitrary)


@dataclass(frozen=True)
class Kind:
    """A class of tokens, or a token, that an expert gets beyond chance."""

    number: int
    """Among those that were asked for."""
    name: str
    p: float
    """Adjusted for all tests."""
    share: float
    """Of the tokens that reach the expert."""
    of_all: float
    """Of all tokens."""
    reach: float
    """Of its tokens, how many reach the expert."""

    @property
    def lift(self) -> float:
        """How much more of it reaches the expert than of all tokens."""
        return self.share / self.of_all

    @property
    def weight(self) -> float:
        """Its part of what the expert tells of the token, in bits: what sorts kinds."""
        return self.share * float(np.log2(self.lift))


@dataclass(frozen=True)
class Set:
    """How busy an expert is in a data set."""

    name: str
    share: float
    low: float
    high: float


def kinds_of(names: Sequence[str], p: Array, count: Array, tokens: Array, of: tuple[int, int]) -> list[Kind]:
    """The classes or tokens that an expert gets beyond chance, the one that tells most of it first.

    Parameters
    ----------
    names
        Of the classes or tokens.
    p : array, shape (name), float64
        Adjusted.
    count, tokens : arrays, shape (name), int64
        How often each reached the expert, and how often it occurs.
    of : tuple of int
        The same of all tokens.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        share, of_all = count / of[0], tokens / of[1]
        found = np.flatnonzero((p <= SURE) & (share >= LEAST_LIFT * of_all) & (count > 0)).tolist()
    values = (p, share, of_all, count / np.maximum(tokens, 1))
    kinds = [Kind(at, names[at], *(float(each[at]) for each in values)) for at in found]
    return sorted(kinds, key=lambda kind: -kind.weight)


def apart(kinds: Sequence[Kind], members: Array, count: Array, most: int = CLASSES_TOLD) -> list[Kind]:
    """The first classes, each mostly of other tokens than those before it, and telling `LEAST_WEIGHT` of the first.

    Parameters
    ----------
    kinds
        From `kinds_of`.
    members : array, shape (class, token_id), bool
    count : array, shape (token_id), int64
        How often each token reached the expert.
    most
        Classes that are told.
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
    """The data sets whose intervals lie above those of all others; none where there are no such, or no others."""
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
    """The `line`, and the sentences of `evidence` that it rests on.

    Parameters
    ----------
    own, others
        The data set that the page is of, and the other ones.
    reach
        Share of its tokens that reach the expert.
    classes, tokens
        What it gets beyond chance, as `apart` and `kinds_of` give them.
    """
    if not reach:
        return {"line": f"No token of {own.name} reaches it", "evidence": []}
    tokens, strongest = tokens[:TOKENS_TOLD], busiest([own, *others])
    told = classes or [replace(kind, name=f"“{kind.name}”") for kind in tokens]
    line = [_listed([f"{kind.name} ({kind.lift:.1f} × the average)" for kind in told])] if told else []
    if not line and reach >= MOST:
        line = [f"{reach:.0%} of the tokens of {own.name}"]
    if strongest:
        line.append(f"strongest in {_listed([each.name for each in strongest])}")
    if not line:
        return {"line": f"Nothing sets it apart in {own.name}", "evidence": [_nothing(reach)]}
    evidence = [_of_class(kind, own.name) for kind in classes]
    if tokens:
        said = [f"“{kind.name}” ({kind.lift:.1f} ×, {kind.reach:.0%} of them reach it)" for kind in tokens]
        evidence.append(f"The tokens that tell most of it: {_listed(said)}.")
    if strongest:
        evidence.append(_busy(strongest, [each for each in (own, *others) if each not in strongest]))
    text = "; ".join(line)
    return {"line": text[0].upper() + text[1:], "evidence": evidence}


def _of_class(kind: Kind, where: str) -> str:
    p = "p < 0.001" if kind.p < 0.001 else f"p = {kind.p:.3f}"
    return (
        f"{kind.share:.0%} of the tokens that reach it in {where} are {kind.name}, and {kind.of_all:.0%} of all tokens"
        f" there; {kind.reach:.0%} of them reach it ({p}, against the same tokens shuffled within their documents, all"
        " classes, experts and layers counted as tests)."
    )


def _busy(strongest: Sequence[Set], rest: Sequence[Set]) -> str:
    nearest = max(rest, key=lambda each: each.share)
    return (
        f"It has {_listed([f'{each.share:.1%} of the choices of {each.name}' for each in strongest])}, and"
        f" {nearest.share:.1%} of those of {nearest.name}{', the nearest' if len(rest) > 1 else ''} (intervals over"
        " documents, of all experts, layers and data sets together, lie apart)."
    )


def _nothing(reach: float) -> str:
    return (
        f"It gets {reach:.0%} of the tokens there. No class of tokens and no token is known to reach it {LEAST_LIFT:g}"
        " times as often as the average, and no data set to use it more than others do."
    )


def _listed(names: Sequence[str]) -> str:
    """Names as a sentence lists them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
