"""What a search finds: the tokens and the documents that contain a text.

Promises: what is asked for exactly comes first. Does not know HTML.
"""

from __future__ import annotations

from typing import Any

from analysis.explorer.view import View, refuse_page

DOCUMENTS, TOKENS = 50, 50  # rows of a page's lists


def find_tokens(view: View, text: str) -> dict[str, Any]:
    """The tokens that contain a text, in their piece or as they read: the same ones first, then by frequency."""
    text = text.replace("↵", "\n")
    wanted, count = text.casefold(), view.token_counts
    both = zip(view.pieces, view.texts, strict=True)
    found = [at for at, names in enumerate(both) if any(wanted in name.casefold() for name in names)]
    exactly = {text, f" {text}", f"▁{text}"}
    found.sort(key=lambda at: (view.texts[at] not in exactly and view.pieces[at] not in exactly, -count[at], at))
    rows = [
        {"id": number, "text": view.texts[number], "piece": view.pieces[number], "count": int(count[number])}
        for number in found[:TOKENS]
    ]
    return {"rows": rows, "number": len(found)}


def documents(view: View, containing: str = "", page: int = 1) -> dict[str, Any]:
    """A page, from 1 on, of the documents whose names contain a text, whatever its case.

    Raises
    ------
    ValueError
        When there is no such page.
    """
    wanted, found = containing.casefold(), list(range(len(view.names)))
    if wanted:
        found = [number for number, name in enumerate(view.folded_names) if wanted in name]
    refuse_page(page, len(found), DOCUMENTS)
    shown = found[(page - 1) * DOCUMENTS : page * DOCUMENTS]
    tokens, captured = view.document_tokens
    rows = [
        {"id": number, "name": view.names[number], "tokens": int(tokens[number]), "captured": int(captured[number])}
        for number in shown
    ]
    return {"rows": rows, "number": len(found), "page": page, "pages": -(-len(found) // DOCUMENTS)}
