"""What a section of the report is: what it asks of each data set, how to read it, what it finds and draws.

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

TOKEN_MIN_COUNT = 20  # a lift of a rarer token is mostly luck (arbitrary)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One data set, as a section sees it when it asks."""

    data: xr.Dataset
    state: Coverage
    label: str
    block_tokens: int | None = None
    """Blocks of so many tokens are units in place of documents."""

    @property
    def weighed(self) -> bool:
        """Whether the routes have weights."""
        return "weight" in self.data

    @property
    def scores(self) -> Scores | None:
        """How router logits become weights; None where none were recorded, or that is not known."""
        return known_scores(self.data)


Found = Mapping[str, xr.Dataset]
"""Results by name."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What is known of one data set; `answers["load"]` is a result by its name."""

    label: str
    state: Coverage
    attrs: Mapping[str, Any]
    documents: int
    """That have a row."""
    found: Found
    notes: Sequence[str] = ()
    """What a reader must know of it: what is left out, and why."""
    store: str | None = None
    """The store, as it was named; None where the data came otherwise."""

    def __getitem__(self, name: str) -> xr.Dataset:
        return self.found[name]

    def get(self, name: str) -> xr.Dataset | None:
        """A result; None where the data set has none of this name."""
        return self.found.get(name)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence computed from the data, and the page of the explorer that shows it."""

    said: str
    of: Answers | None = None
    """The data set that it is about; None where it is about several."""
    page: str = ""
    """The explorer's page about it, within the data set: "expert/2/7"; empty for the data set's own."""
    layer: int | None = None
    """The layer that it names."""

    @property
    def place(self) -> str | None:
        """The page with its data set, as `--page` and the explorer's addresses have it."""
        if self.of is None:
            return None
        return "/".join([quote(self.of.state.dataset), *filter(None, [self.page])])

    @property
    def command(self) -> str | None:
        """The command that opens the page, quoted for a shell; None where there is none, or the store is not known."""
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
    """The charts, from the answers of all data sets and how the data sets differ; none where there is nothing to
    say."""
    ask: Callable[[Asked], Mapping[str, Reducer]]
    """What one scan counts, by name."""
    answer: Callable[[Found, Asked], Found] | None = None
    """Results made of the counts, by name; None where what was asked is drawn as it was counted."""
    findings: Callable[[Sequence[Answers]], Iterable[Finding]] | None = None
    """What is beyond chance, in sentences that stand above the charts with the command that opens them in the
    explorer."""
