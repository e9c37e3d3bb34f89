"""What a search finds: tokens, places in the text, and documents.

Promises: an exact match comes first among the tokens, and tokens that do not occur are left out; a phrase is found
however it is split into tokens. Does not know HTML.
"""

from __future__ import annotations

import re
from typing import Any

from analysis.explorer.dataset import documents
from analysis.explorer.token_class import classes_named
from analysis.explorer.view import View, refuse_page

PLACES, TOKENS = 20, 20  # rows of a page's lists
GLANCE = 3  # of each, when all data sets are searched (arbitrary)


def search_page(view: View, text: str, page: int = 1, *, tokens: int = TOKENS, places: int = PLACES) -> dict[str, Any]:
    """What a data set holds for a text: the `expert` and the token `classes` of that name, `tokens`, a page (counted
    from 1) of `places`, and `documents`.

    Raises
    ------
    ValueError
        When there is no such page.
    """
    text = text.replace("↵", "\n")
    found: dict[str, Any] = {
        "dataset": view.dataset,
        "expert": expert_named(view, text),
        "classes": classes_named(view, text),
        "tokens": find_tokens(view, text, tokens),
        "places": find_places(view, text, page, places),
        "documents": documents(view, containing=text),
    }
    named = bool(found["expert"] or found["classes"])
    return found | {"anything": named or any(found[kind]["number"] for kind in ("tokens", "places", "documents"))}


def expert_named(view: View, text: str) -> tuple[int, int] | None:
    """The layer and the expert that a text such as 6:0 names; None if there is none."""
    named = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip(), re.ASCII)
    layer, expert = (int(number) for number in named.groups()) if named else (-1, -1)
    return (layer, expert) if layer in view.layers and expert < view.experts and view.now.tokens else None


def find_tokens(view: View, text: str, most: int = TOKENS) -> dict[str, Any]:
    """The tokens that occur and contain a text, in their piece or in readable form: exact matches first, then by
    frequency."""
    count, exactly = view.token_counts, {text, f" {text}", f"▁{text}"}
    found = [at for at in view.tokens_containing(text) if count[at]]
    found.sort(key=lambda at: (view.texts[at] not in exactly and view.pieces[at] not in exactly, -count[at], at))
    rows = [
        {"id": number, "text": view.texts[number], "piece": view.pieces[number], "count": int(count[number])}
        for number in found[:most]
    ]
    return {"rows": rows, "number": len(found)}


def find_places(view: View, text: str, page: int = 1, rows: int = PLACES) -> dict[str, Any]:
    """A page, counted from 1, of the places of a text; `complete` says whether all places were found.

    Raises
    ------
    ValueError
        When there is no such page.
    """
    skip = max(0, page - 1) * rows
    found = view.phrases.find(text, view.now.parts.values(), view.token_counts, skip=skip, limit=rows)
    refuse_page(page, found.number, rows)
    places = [view.place(each.part, each.row, each.position, tokens=each.tokens) for each in found.places]
    pages = -(-found.number // rows)
    return {"rows": places, "number": found.number, "complete": found.complete, "page": page, "pages": pages}
