"""What a report says, in words computed from the data.

Promises: a specialist is named only if the data set differs from each other one by intervals that hold simultaneously
for all differences; a token's expert only if documents do not explain it, corrected for all tokens, layers and experts.
If nothing is beyond chance, or nothing can be tested, the text says so.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from analysis.report.section import Answers, Finding
from analysis.report.sections.contrast import of_expert, why_apart

SURE = 0.05  # probability that a token is named although documents explain all of them (Bonferroni)


def sentences(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[str]:
    """What was measured, in words computed from the data."""
    return [finding.said for finding in findings(answers, apart)]


def findings(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[Finding]:
    """The same, with the subject of each: one for each data set, one for the busiest expert, one for a token."""
    captured = [each for each in answers if each["load"].attrs["n"]]
    compared = compared_in(captured, apart)
    found = []
    for each in answers:
        if each not in captured:
            found.append(Finding(said=f"{each.label}: no token is captured yet.", of=each))
        elif apart is not None and each in compared:
            found.append(_of_data_set(each, apart))
        else:
            apart_from = why_apart(captured[0], each)
            reason = f" Not compared with {captured[0].label}: {apart_from}." if apart_from else ""
            own = busiest([each])
            said = f"{each.label}: {each['load'].attrs['n']:,} tokens.{reason} {own.said}"
            found.append(Finding(said=said, of=each, page=own.page, layer=own.layer))
    if apart is not None:
        found.append(busiest(compared))
    return found + [finding for finding in [token_finding(captured)] if finding]


def compared_in(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[Answers]:
    """The data sets that are compared with each other."""
    return [] if apart is None else [each for each in answers if each.label in apart["data_set"].values]


def specialist(each: Answers, apart: xr.Dataset) -> tuple[Finding, float] | None:
    """The expert that a data set uses more than each other one does, and the least difference; None without one.

    It is the expert whose smallest lower bound is largest.
    """
    others = _others(each, apart)
    if not others:
        return None
    own = apart.sel(data_set=each.label, other_data_set=others)
    least = own["pairwise_low"].min("other_data_set").fillna(0.0)
    if float(least.max()) <= 0:
        return None
    cell = own.isel(least.argmax(("layer", "expert")))
    nearest = cell.isel(other_data_set=int(cell["pairwise_low"].argmin("other_data_set")))
    low, high = (100 * float(nearest[f"pairwise_{end}"]) for end in ("low", "high"))
    reach, even = float(cell["share"]), each["load"].attrs["null"] * each["load"].sizes["k"]
    rival = f"{nearest['other_data_set'].item()}{', the next highest' if len(others) > 1 else ''}"
    said = (
        f"expert {int(cell['expert'])} at layer {int(cell['layer'])}: {reach:.0%} of the tokens"
        f" choose it, compared with {reach - float(nearest['pairwise_difference']):.0%} of those of {rival} ({low:.1f}"
        f" to {high:.1f} percentage points more, simultaneous 95% interval over documents for all experts, layers and"
        f" data sets; an even share is {even:.0%})."
    )
    return of_expert(said, each, cell), low


def busiest(answers: Sequence[Answers]) -> Finding:
    """The largest share of a layer's choices that one expert has."""
    found = max(answers, key=lambda each: float(each["load"]["share"].max()))
    share = found["load"]["share"].fillna(0)
    top = share.isel(share.argmax(("layer", "expert")))
    where = f" in {found.label}" if len(answers) > 1 else ""
    said = (
        f"The busiest expert is {int(top['expert'])} at layer {int(top['layer'])}{where}, with {float(top):.1%} of that"
        f" layer's choices (an even share is {found['load'].attrs['null']:.1%})."
    )
    return of_expert(said, found, top)


def token_finding(answers: Sequence[Answers]) -> Finding | None:
    """The token that goes to an expert most clearly more often than its documents explain; None if there is none."""
    tests = sum(each["token_excess"]["p"].size for each in answers)
    best, finding = 0.0, None
    for each in answers:
        found = each["token_excess"]
        usual = found["expected"] / found["tokens"]
        spread: Any = np.sqrt(found["expected"] * (1 - usual).clip(0))
        surely = (found["p"] * tests <= SURE) & (spread > 0)  # Bonferroni
        score = ((found["counts"] - found["expected"]) / spread.where(surely)).fillna(0.0)
        if score.size and float(score.max()) > best:
            best = float(score.max())
            at = score.argmax(score.dims)
            finding = _told(each, found.isel(at), float(usual.isel(at)))
    return finding


def _of_data_set(each: Answers, apart: xr.Dataset) -> Finding:
    """The sentence about a compared data set: its specialist, or why it has none."""
    head, untested = f"{each.label}: {each['load'].attrs['n']:,} tokens.", apart.attrs["untested"]
    if (found := specialist(each, apart)) is not None:
        finding, _ = found
        return Finding(said=f"{head} Its specialist is {finding.said}", of=each, page=finding.page, layer=finding.layer)
    if each.label in untested:
        return Finding(said=f"{head} Not compared with the others: {untested[each.label]}.", of=each)
    if not (others := _others(each, apart)):
        return Finding(said=f"{head} Not compared: no other data set has enough documents.", of=each)
    return Finding(said=f"{head} {_no_specialist(apart.sel(data_set=each.label, other_data_set=others))}", of=each)


def _others(each: Answers, apart: xr.Dataset) -> list[str]:
    """The data sets that a data set is tested against."""
    untested = apart.attrs["untested"]
    names: list[str] = apart["data_set"].values.tolist()
    return [] if each.label in untested else [name for name in names if name != each.label and name not in untested]


def _no_specialist(own: xr.Dataset) -> str:
    """The sentence about a data set without a specialist: whether it differs from others at all."""
    differs = ((own["pairwise_low"] > 0) | (own["pairwise_high"] < 0)).any(("layer", "expert"))
    names = own["other_data_set"].values[differs.values].tolist()
    none = "No expert is chosen by a larger share of them than of every other data set's tokens, beyond chance"
    if names:
        return f"{none}; some experts' shares differ from those in {' and '.join(names)}."
    return f"{none}, and no expert's share differs (simultaneous intervals over documents for all experts and layers)."


def _told(each: Answers, cell: xr.Dataset, usual: float) -> Finding:
    """A token and its expert, in words."""
    of, n = cell.attrs["of"], cell.attrs["n"]
    sampled = f" (in a sample of whole documents with {n:,} of {of:,} tokens)" if n < of else ""
    layer, expert, token = int(cell["layer"]), int(cell["expert"]), int(cell["token_id"])
    said = (
        f"Tokens have specific experts: at layer {layer}, {float(cell['counts'] / cell['tokens']):.0%} of the"
        f" {int(cell['tokens']):,} occurrences of “{cell['piece'].item()}” in {each.label} go to expert"
        f" {expert}, compared with {usual:.0%} when tokens are shuffled within their documents{sampled}."
    )
    return Finding(said=said, of=each, page=f"token/{token}?layer={layer}&expert={expert}", layer=layer)
