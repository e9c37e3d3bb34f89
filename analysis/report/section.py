"""A section of the report: what it counts for each data set, how to read it, what it finds and what it draws.

A section is one file in `analysis/report/sections/` and one line in `sections/all.py`. Sections may ask for the same
thing under the same name: it is counted once.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import xarray as xr

from analysis.metrics.scores import Scores, known_scores
from analysis.report.figures import Figure
from analysis.scanning import Reducer
from store import Coverage

TOKEN_MIN_COUNT = 20  # the lift of a rarer token is mostly chance (arbitrary)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One data set, as a section sees it when it says what to count."""

    data: xr.Dataset
    state: Coverage
    label: str
    block_tokens: int | None = None
    """Blocks of so many tokens are units instead of documents."""

    @property
    def weighed(self) -> bool:
        """Whether the routes have weights."""
        return "weight" in self.data

    @property
    def scores(self) -> Scores | None:
        """How router logits become weights; None if no logits were recorded, or the rule is not known."""
        return known_scores(self.data)


Found = Mapping[str, xr.Dataset]
"""Results by name."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The results for one data set; `answers["load"]` is a result by name."""

    label: str
    state: Coverage
    attrs: Mapping[str, Any]
    documents: int
    """Documents that have a row."""
    found: Found
    notes: Sequence[str] = ()
    """What a reader must know about it: what is left out, and why."""
    store: str | None = None
    """The store, as it was named; None if the data did not come from a named store."""

    def __getitem__(self, name: str) -> xr.Dataset:
        return self.found[name]

    def get(self, name: str) -> xr.Dataset | None:
        """A result; None if the data set has none of this name."""
        return self.found.get(name)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence computed from the data, and the page of the explorer that shows it."""

    said: str
    of: Answers | None = None
    """The data set that it is about; None if it is about several."""
    page: str = ""
    """The explorer's page about it, within the data set: "expert/2/7"; empty for the data set's own."""
    layer: int | None = None
    """The layer that it names."""

    @property
    def place(self) -> str | None:
        """The page with its data set, in the form of `--page` and of the explorer's addresses."""
        if self.of is None:
            return None
        return "/".join([quote(self.of.state.dataset), *filter(None, [self.page])])

    @property
    def command(self) -> str | None:
        """The command that opens the page, quoted for a shell; None if there is no such page, or the store is not
        known."""
        if self.of is None or self.of.store is None:
            return None
        return shlex.join(["python", "jobs/explore.py", self.of.store, "--page", f"{self.place}"])


@dataclass(frozen=True, kw_only=True)
class Section:
    """Charts under one heading."""

    id: str
    title: str
    reading: str | Callable[[Sequence[Answers]], str]
    """How to read them."""
    draw: Callable[[Sequence[Answers], xr.Dataset | None], Iterable[Figure]]
    """The charts, from the answers of all data sets and how they differ; none if there is nothing to show."""
    ask: Callable[[Asked], Mapping[str, Reducer]]
    """What one scan counts, by name."""
    answer: Callable[[Found, Asked], Found] | None = None
    """Results computed from the counts, by name; None if the counts themselves are drawn."""
    findings: Callable[[Sequence[Answers]], Iterable[Finding]] | None = None
    """What is beyond chance, in sentences above the charts, each with the command that opens it in the explorer."""
