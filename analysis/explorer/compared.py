"""How two data sets compare, in words computed from the data.

Promises: an expert is named only if its simultaneous interval, over all differences, excludes 0; a loss or a gain only
if its interval excludes 0 and its p-value is small. Otherwise the text says that nothing is beyond chance, or why
nothing is tested.
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
        The names of the first and the second data set.
    """
    if found["shows"] == "agreement":
        return [*_effect(found["effect"], names), _agreement(found)]
    return [_experts(found, names), *_told(found)]


def _experts(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """The expert that differs most, and how many experts differ."""
    if found["untested"]:
        reasons = "; ".join(f"{name}: {why}" for name, why in found["untested"].items())
        return f"Differences cannot be tested here. {reasons}."
    sure = [row for row in found["experts"] if row["low"] > 0 or row["high"] < 0]
    if not sure:
        return "No expert's share of tokens differs between the data sets by more than chance."
    row, one, other = sure[0], *names
    if row["difference"] < 0:
        one, other = other, one
    least, share = sorted((row["share"], row["other_share"]))
    low, high = sorted(abs(100 * row[end]) for end in ("low", "high"))
    return (
        f"Expert {row['expert']} of layer {row['layer']} differs most: it is chosen by {share:.0%} of the tokens of"
        f" {one} and {least:.0%} of those of {other} ({low:.1f} to {high:.1f} percentage points more; simultaneous"
        f" {found['level']:.0%} interval over documents). {found['beyond_chance']:,} of {found['cells']:,} experts"
        " differ by more than chance."
    )


def _told(found: Mapping[str, Any]) -> list[str]:
    """How well a document's data set can be identified from its experts."""
    if found["told"] is None:
        return [f"How well documents can be classified is not known: {found['why']}."]
    parts = [f"{each['right']:.0%} of the {each['documents']:,} documents of {each['name']}" for each in found["told"]]
    return [f"From their experts alone, {' and '.join(parts)} are classified correctly; 50% is expected by chance."]


def _effect(effect: Mapping[str, Any] | None, names: Sequence[str]) -> list[str]:
    """Whether the second capture predicts worse or better."""
    if effect is None:
        return [
            "Both captures hold the same tokens. The effect on predictions is not known: both need --record logprob."
        ]
    if not effect["known"]:
        return [
            f"Both captures hold the same tokens. {names[1]} predicts a token {effect['effect']:+.4f} nats better on"
            f" average; this is not tested: {effect['untested']}."
        ]
    sure = (effect["low"] > 0 or effect["high"] < 0) and effect["p"] <= 1 - effect["level"]
    if not sure:
        return [
            f"Both captures hold the same tokens. {names[1]} predicts them neither better nor worse than {names[0]}"
            f" beyond chance ({effect['effect']:+.4f} nats per token, p = {effect['p']:.3f})."
        ]
    low, high = sorted(abs(effect[end]) for end in ("low", "high"))
    return [
        f"Both captures hold the same tokens. {names[1]} predicts a token {abs(effect['effect']):.4f} nats"
        f" {'worse' if effect['effect'] < 0 else 'better'} than {names[0]} on average ({low:.4f} to {high:.4f},"
        f" {effect['level']:.0%} interval over {effect['documents']:,} documents, p = {effect['p']:.3f} by a sign-flip"
        " test)."
    ]


def _agreement(found: Mapping[str, Any]) -> str:
    return f"{found['any_difference']:.1%} of {found['tokens']:,} tokens have different experts at one layer or more."
