"""What a report asks of each data set: one scan for all sections, each thing counted once.

Promises: constant memory, also for large vocabularies and many experts; what is slow to count is counted over a part of
the documents, and says of how many tokens. Does not know what is asked: the sections do.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import xarray as xr

from analysis.report.section import Answers, Asked, Section
from analysis.report.sections.all import SECTIONS
from analysis.results import question
from analysis.scanning import Reducer, scan
from store import Coverage, attributes

Ask = Callable[[Sequence[Reducer]], list[xr.Dataset]]


def answer(
    data: xr.Dataset,
    state: Coverage,
    label: str,
    ask: Ask | None = None,
    sections: Sequence[Section] = SECTIONS,
) -> Answers:
    """Scan one capture once, as much of it as is there, or `ask` who knows the answers already."""
    asked = Asked(data=data, state=state, label=label)
    wanted = {section.id: section.ask(asked) for section in sections}
    reducers = _once(wanted)
    counted = dict(zip(reducers, (ask or partial(scan, data))(list(reducers.values())), strict=True))
    found: dict[str, xr.Dataset] = {}
    for section in sections:
        own = {name: counted[name] for name in wanted[section.id]}
        found |= section.answer(own, asked) if section.answer else own
    documents = int(np.unique(data["document_id"].values).size)
    return Answers(label=label, state=state, attrs=attributes(data), documents=documents, found=found)


def _once(wanted: Mapping[str, Mapping[str, Reducer]]) -> dict[str, Reducer]:
    """What is counted for all sections, by name; a ValueError where two ask for different things under one name."""
    reducers: dict[str, Reducer] = {}
    for section, asked in wanted.items():
        for name, reducer in asked.items():
            if question(reducers.setdefault(name, reducer)) != question(reducer):
                raise ValueError(f"section {section}: another section asks for something else under the name {name!r}")
    return reducers
