"""A data set's page: its experts' loads, and its documents, the most unusual first.

Promises: numbers cover what is indexed; until anything is, documents come in the order of their ids. Does not know
HTML.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from analysis.explorer.unusual import Unusual
from analysis.explorer.view import View, refuse_page
from analysis.scanning import Array

DOCUMENTS = 50  # rows of a page's list

Order = Literal["unusual", "id", "tokens"]


def documents(
    view: View, unusual: Unusual | None = None, *, containing: str = "", by: Order = "id", page: int = 1
) -> dict[str, Any]:
    """A page, counted from 1, of the documents whose names contain a text; case is ignored.

    Parameters
    ----------
    view : View
        The data set.
    unusual : Unusual, optional
        What is known about its documents.
    containing
        A part of their names.
    by
        The order; for "unusual" and "tokens", the largest come first.
    page
        Which page.

    Raises
    ------
    ValueError
        When there is no such page.
    """
    found = _ordered(view, unusual, by)
    if containing:
        wanted = containing.casefold()
        there = np.array([wanted in name for name in view.folded_names], bool)
        found = found[there[found]]
    refuse_page(page, len(found), DOCUMENTS)
    rows = [_row(view, unusual, int(number)) for number in found[(page - 1) * DOCUMENTS : page * DOCUMENTS]]
    return {"rows": rows, "number": len(found), "page": page, "pages": -(-len(found) // DOCUMENTS), "by": by}


def _ordered(view: View, unusual: Unusual | None, by: Order) -> Array:
    if by == "unusual" and unusual is not None:
        return unusual.order
    return np.argsort(-view.document_tokens[0], kind="stable") if by == "tokens" else np.arange(len(view.names))


def _row(view: View, unusual: Unusual | None, number: int) -> dict[str, Any]:
    """A document's row in a list; `most` says where it differs most from the others, None if that is not known."""
    tokens, captured = view.document_tokens[:, number]
    row = {"id": number, "name": view.names[number], "tokens": int(tokens), "captured": int(captured), "most": None}
    if unusual is None or np.isnan(unusual.bits[number]):
        return row
    most = {name: float(getattr(unusual, name)[number]) for name in ("bits", "share", "others")}
    at = {"layer": view.layers[unusual.layer[number]], "expert": int(unusual.expert[number])}
    return row | {"most": most | at}
