"""A token's page: the experts it goes to, layer by layer, and the places where it occurs.

Promises: numbers and places cover what is indexed; for a token that is too frequent to count while a visitor waits, the
page says how many occurrences were counted. Does not know HTML.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.explorer.view import View, refuse_page
from analysis.scanning import Array

CONTEXTS = 20  # rows of its list
MAPPED = 2**25  # most choices counted for a token's map if there are no tables: 50 ms (measured)


def token_page(view: View, token: int) -> dict[str, Any]:
    """A token's occurrences, and how many of them chose each expert, layer by layer.

    Returns
    -------
    dict
        `count`: its occurrences; `of`: how many of them are counted in `counts` [layer][expert], the first ones if it
        is too frequent to count all.

    Raises
    ------
    ValueError
        When there is no such token.
    """
    if not 0 <= token < len(view.texts):
        raise ValueError(f"token {token}: the vocabulary of {view.dataset} has tokens 0 to {len(view.texts) - 1}")
    of, counts = _map(view, token)
    return {
        "id": token,
        "text": view.texts[token],
        "piece": view.pieces[token],
        "special": token in view.capture.attrs["special_token_ids"],
        "count": int(view.token_counts[token]),
        "of": of,
        "counts": counts.tolist(),
    }


def _map(view: View, token: int) -> tuple[int, Array]:
    """How many occurrences were counted, and their choices (layer, expert)."""
    if len(view.tables) == len(view.layers):
        return int(view.token_counts[token]), np.stack([view.tables[at][token] for at in range(len(view.layers))])
    counts, of = np.zeros((len(view.layers), view.experts), np.int64), 0
    most = max(1, MAPPED // (len(view.layers) * view.choices))
    for part in view.now.parts.values():
        if of < most:
            of += part.add_map(token, most - of, counts)
    return of, counts


def contexts(view: View, token: int, layer: int | None, expert: int | None, page: int) -> dict[str, Any]:
    """A page, counted from 1, of the places of a token: all, or those where it went to an expert at a layer.

    Raises
    ------
    ValueError
        When there is no such layer, expert or page.
    """
    at = view.chosen_layer(layer, expert)
    number, found = view.now.occurrences(token, at, expert, skip=max(0, page - 1) * CONTEXTS, limit=CONTEXTS)
    refuse_page(page, number, CONTEXTS)
    rows = []
    for part, index in found:
        [row], [position] = part.places(np.array([index]))
        chosen = [] if at is None else part.expert[at, index].tolist()
        rows.append(view.place(part, int(row), int(position)) | {"experts": chosen})
    return {"rows": rows, "number": number, "page": page, "pages": -(-number // CONTEXTS)}
