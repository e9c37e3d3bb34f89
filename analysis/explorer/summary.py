"""What an expert does, in one line computed from the data, and what it rests on.

Promises: a class of tokens, or a token, is named only where it reaches the expert more often than its documents
explain, with all classes, tokens, layers and experts counted as tests (Bonferroni); a data set only where its interval,
which holds all experts, layers and data sets together, lies above those of all others. Where nothing is beyond chance,
that is what is said. Does not know HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.scanning import Array

SURE = 0.05  # probability that something is named where documents explain all
LEAST_LIFT = 1.5  # of what is named: an expert is not for what it gets hardly more of (arbitrary)
MOST = 0.5  # of a data set's tokens: an expert that gets more is one for whatever comes (arbitrary)
CLASSES_TOLD, TOKENS_TOLD = 2, 3


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
        found = np.flatnonzero((p <= SURE) & (share >= LEAST_LIFT * of_all) & (count > 0))
    kinds = [Kind(int(at), names[at], float(p[at]), float(share[at]), float(of_all[at])) for at in found]
    return sorted(kinds, key=lambda kind: -kind.weight)


def apart(kinds: Sequence[Kind], members: Array, count: Array, most: int = CLASSES_TOLD) -> list[Kind]:
    """The first classes, each mostly of other tokens than those before it, and telling half as much as the first.

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
        other_tokens = all(both < MOST * least for both, least in zip(shared, smaller, strict=True))
        if other_tokens and kind.weight >= told[0].weight / 2 if told else True:
            told.append(kind)
    return told[:most]


def busiest(sets: Sequence[Set]) -> Set | None:
    """The data set whose interval lies above those of all others; None where there is none, or no other."""
    known = [each for each in sets if not np.isnan(each.low)]
    if len(known) < 2 or len(known) < len(sets):
        return None
    first, *others = sorted(known, key=lambda each: -each.low)
    return first if all(first.low > other.high for other in others) else None


def summary(own: Set, reach: float, classes: Sequence[Kind], tokens: Sequence[Kind], strongest: Set | None,
            others: Sequence[Set]) -> Mapping[str, object]:  # fmt: skip
    """The line, and the sentences that it rests on.

    Parameters
    ----------
    own
        The data set that the page is of.
    reach
        Share of its tokens that reach the expert.
    classes, tokens
        What it gets beyond chance, as `apart` and `kinds_of` give them.
    strongest
        See `busiest`.
    others
        The other data sets.
    """
    line: list[str] = []
    evidence: list[str] = []
    tokens = tokens[:TOKENS_TOLD]
    if classes:
        names = " and ".join(kind.name for kind in classes)
        line += [names[0].upper() + names[1:], f"{classes[0].lift:.1f} × the average"]
    elif tokens:
        line += [", ".join(f"“{kind.name}”" for kind in tokens), f"{tokens[0].lift:.1f} × the average"]
    elif reach >= MOST:
        line += [f"{reach:.0%} of the tokens of {own.name}, whatever they are"]
    if strongest is not None:
        line += [f"strongest in {strongest.name}"]
    for kind in classes:
        evidence.append(f"{kind.share:.0%} of the tokens that reach it in {own.name} are {kind.name}, and"
                        f" {kind.of_all:.0%} of all tokens there{_sure(kind)}.")  # fmt: skip
    if tokens:
        said = ", ".join(f"“{kind.name}” ({kind.lift:.1f} ×)" for kind in tokens)
        evidence.append(f"The tokens that tell most of it: {said}.")
    if strongest is not None:
        rest = [each for each in (own, *others) if each.name != strongest.name]
        nearest = max(rest, key=lambda each: each.share)
        evidence.append(f"It has {strongest.share:.1%} of the choices of {strongest.name}, and {nearest.share:.1%} of"
                        f" those of {nearest.name}{', the nearest' if len(rest) > 1 else ''} (intervals of all experts,"
                        " layers and data sets together lie apart).")  # fmt: skip
    if not line:
        return {"line": f"Nothing sets it apart in {own.name}", "evidence": [
            f"It gets {reach:.0%} of the tokens there. No class of tokens and no token is known to reach it"
            f" {LEAST_LIFT:g} times as often as the average, and no data set to use it more than all others do."
        ]}  # fmt: skip
    text = "; ".join(line)
    return {"line": text[0].upper() + text[1:], "evidence": evidence}


def _sure(kind: Kind) -> str:
    """How sure, once."""
    p = f"p < {0.001}" if kind.p < 0.001 else f"p = {kind.p:.3f}"
    return f" ({p}: shuffled within documents, all classes, experts and layers counted as tests)"
