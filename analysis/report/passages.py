"""A paragraph from each data set, with the tokens shaded that choose its specialist or busiest expert."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from analysis.escaping import visible
from analysis.report.headline import busiest, specialist
from analysis.report.section import Answers, Finding
from analysis.token_classes import text_of

SAMPLED = 8_192  # tokens of whole documents, from which paragraphs and the tokens of windows are taken (arbitrary)
SHOWN = 140  # tokens of a paragraph (arbitrary)


@dataclass(frozen=True, kw_only=True)
class Shaded:
    """Neighbouring tokens with the same shading."""

    text: str
    choice: int
    """The rank of the expert among their choices: 1 is the first; 0 if they did not choose it."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Tokens of one row."""

    label: str
    finding: Finding
    """The expert, with its page."""
    why: str
    """Why this expert is shown, in words."""
    chosen: int
    tokens: int
    """How many of the passage's tokens choose it, and the number of tokens."""
    shaded: Sequence[Shaded]


def passages(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[Passage]:
    """One for each data set that has tokens, about its specialist or, without one, its busiest expert."""
    having = [each for each in answers if (sample := each.get("sample")) is not None and sample.sizes["token"]]
    return [_passage(each, apart) for each in having]


def _passage(each: Answers, apart: xr.Dataset | None) -> Passage:
    compared = apart is not None and each.label in apart["data_set"].values
    found = specialist(each, apart) if compared and apart is not None else None
    finding = found[0] if found else busiest([each])
    layer, expert = map(int, finding.page.split("/")[1:])
    row = _longest_row(each["sample"]).isel(token=slice(SHOWN))
    among = (row["expert"].sel(layer=layer) == expert).transpose("token", "k").values
    choices = np.where(among.any(axis=1), among.argmax(axis=1) + 1, 0)
    return Passage(
        label=each.label,
        finding=finding,
        why="the data set's specialist" if found else "the data set's busiest expert",
        chosen=int((choices > 0).sum()),
        tokens=int(choices.size),
        shaded=_runs([_readable(piece) for piece in row["piece"].values], choices.tolist()),
    )


def _longest_row(sample: xr.Dataset) -> xr.Dataset:
    """The first of the longest rows of a sample, whose tokens are in row order."""
    position, document = sample["position"].values, sample["document_id"].values
    begins = np.flatnonzero(np.r_[True, (np.diff(position) <= 0) | (np.diff(document) != 0)])
    ends = np.r_[begins[1:], position.size]
    longest = int(np.argmax(ends - begins))
    return sample.isel(token=slice(int(begins[longest]), int(ends[longest])))


def _runs(texts: Sequence[str], choices: Sequence[int]) -> list[Shaded]:
    """Merge neighbours with the same shading."""
    runs: list[Shaded] = []
    for text, choice in zip(texts, choices, strict=True):
        if runs and runs[-1].choice == choice:
            runs[-1] = Shaded(text=runs[-1].text + text, choice=choice)
        else:
            runs.append(Shaded(text=text, choice=choice))
    return runs


def _readable(piece: str) -> str:
    """A piece as readable text; a byte of a longer character is �."""
    return visible(text_of(piece).encode("utf-8", "surrogateescape").decode("utf-8", "replace"), keep="\n\t")
