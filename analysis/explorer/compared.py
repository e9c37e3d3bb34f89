"""How two data sets compare, in words computed from the data.

Promises: an expert is named only where the interval that holds all differences together leaves out 0; a loss or a gain
only where its interval does, and its p-value is small; else that nothing is beyond chance, or why nothing is tested, is
what is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def verdict(found: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The sentences of a comparison, the most important first.

    Parameters
    ----------
    found
        From `analysis.explorer.compare.Comparisons`.
    names
        Of the first data set, and of the second.
    """
    if found["shows"] == "agreement":
        return [*_effect(found["effect"], names), _agreement(found)]
    return [_experts(found, names), *_told(found)]


def _experts(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """The expert that differs most, and how many do."""
    if found["untested"]:
        reasons = "; ".join(f"{name}: {why}" for name, why in found["untested"].items())
        return f"Differences cannot be told from chance here. {reasons}."
    sure = [row for row in found["experts"] if row["low"] > 0 or row["high"] < 0]
    if not sure:
        return "No expert gets more of one data set's tokens than of the other's beyond chance."
    row, one, other = sure[0], *names
    if row["difference"] < 0:
        one, other = other, one
    least, share = sorted((row["share"], row["other_share"]))
    low, high = sorted(abs(100 * row[end]) for end in ("low", "high"))
    return (
        f"Expert {row['expert']} of layer {row['layer']} differs most: {share:.0%} of the tokens of {one} reach it, and"
        f" {least:.0%} of those of {other} ({low:.1f} to {high:.1f} points more, {found['level']:.0%} interval over"
        f" documents of all experts together). {found['beyond_chance']:,} of {found['cells']:,} experts differ by more"
        " than chance."
    )


def _told(found: Mapping[str, Any]) -> list[str]:
    """How well a document is told by its experts."""
    if found["told"] is None:
        return [f"How well a document can be told is not known: {found['why']}."]
    parts = [f"{each['right']:.0%} of the {each['documents']:,} documents of {each['name']}" for each in found["told"]]
    return [f"By its experts alone, {' and '.join(parts)} are told right; 50% would be by chance."]


def _effect(effect: Mapping[str, Any] | None, names: Sequence[str]) -> list[str]:
    """Whether the second capture predicts worse, or better."""
    if effect is None:
        return ["The same tokens. What it does to predictions is not known: both captures need --record logprob."]
    if not effect["known"]:
        return [
            f"The same tokens: {names[1]} predicts one {effect['effect']:+.4f} nats better on average, which is not"
            f" tested: {effect['untested']}."
        ]
    sure = (effect["low"] > 0 or effect["high"] < 0) and effect["p"] <= 1 - effect["level"]
    if not sure:
        return [
            f"The same tokens: {names[1]} predicts them no worse and no better than {names[0]} beyond chance"
            f" ({effect['effect']:+.4f} nats a token, p = {effect['p']:.3f})."
        ]
    low, high = sorted(abs(effect[end]) for end in ("low", "high"))
    return [
        f"The same tokens: {names[1]} predicts one {abs(effect['effect']):.4f} nats"
        f" {'worse' if effect['effect'] < 0 else 'better'} than {names[0]} on average ({low:.4f} to {high:.4f},"
        f" {effect['level']:.0%} interval over {effect['documents']:,} documents, p = {effect['p']:.3f} by flipped"
        " signs)."
    ]


def _agreement(found: Mapping[str, Any]) -> str:
    return f"{found['any_difference']:.1%} of {found['tokens']:,} tokens have other experts at some layer."
