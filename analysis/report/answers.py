"""What a report counts for each data set: one scan for all sections, each quantity counted once.

Promises: constant memory, also for large vocabularies and many experts; what is slow to count is counted over a part of
the documents, and the report says over how many tokens. Does not know what is counted: the sections do.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import xarray as xr

from analysis.report.section import Answers, Asked, Section
from analysis.report.sections.all import SECTIONS
from analysis.results import question
from analysis.scanning import EVERYTHING, Reducer, Selection, scan
from store import Coverage, attributes

Ask = Callable[[Sequence[Reducer]], list[xr.Dataset]]


def answer(
    data: xr.Dataset,
    state: Coverage,
    label: str,
    ask: Ask | None = None,
    sections: Sequence[Section] = SECTIONS,
    block_tokens: int | None = None,
    only: Selection = EVERYTHING,
    store: str | None = None,
) -> Answers:
    """Scan the committed part of one capture once, or get the answers from `ask`.

    `block_tokens` makes blocks of so many tokens the units instead of documents; `only` says what is counted, also by
    `ask`; `store` is where the capture is, as named on the command line.
    """
    asked = Asked(data=data, state=state, label=label, block_tokens=block_tokens)
    wanted = {section.id: section.ask(asked) for section in sections}
    reducers = _once(wanted)
    counted = dict(zip(reducers, (ask or partial(scan, data, only=only))(list(reducers.values())), strict=True))
    found: dict[str, xr.Dataset] = {}
    for section in sections:
        own = {name: counted[name] for name in wanted[section.id]}
        found |= section.answer(own, asked) if section.answer else own
    return Answers(
        label=label,
        state=state,
        attrs=attributes(data),
        documents=int(np.unique(data["document_id"].values).size),
        found=found,
        notes=_notes(asked, only),
        store=store,
    )


def _notes(asked: Asked, only: Selection) -> list[str]:
    """What a reader must know about a data set before reading its numbers."""
    notes = [f"{asked.label}: {what}." for what in only.said]
    if not asked.weighed:
        left_out = "shares of weight and the routers' confidence are left out"
        notes.append(f"{asked.label}: the routes were imported without weights, so {left_out}.")
    if asked.data.attrs.get("order_of_choices") == "as given":
        notes.append(
            f"{asked.label}: the engine that returned these routes does not guarantee that a token's first expert has"
            " the largest weight; statements about first choices are about the experts that it listed first."
        )
    return notes


def _once(wanted: Mapping[str, Mapping[str, Reducer]]) -> dict[str, Reducer]:
    """What is counted for all sections, by name; a ValueError if two sections ask for different things under one
    name."""
    reducers: dict[str, Reducer] = {}
    for section, asked in wanted.items():
        for name, reducer in asked.items():
            first = reducers.setdefault(name, reducer)
            if first is not reducer and question(first) != question(reducer):
                raise ValueError(f"section {section}: another section asks for something else under the name {name!r}")
    return reducers
