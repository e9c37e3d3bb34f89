"""How much better or worse another capture predicts the tokens of a page of text.

Promises: tokens are compared, not assumed to be equal: if they differ, there is an error and no number. Does not know
what was changed between the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from analysis.explorer.document import in_float32
from analysis.explorer.view import View
from store.layout import CHUNK_POSITIONS


def comparable(own: View, others: Iterable[View]) -> list[View]:
    """The other captures with equal rows whose predictions were recorded; none if its own were not."""
    with_it = [each for each in others if each is not own and "logprob" in each.capture]
    return [each for each in with_it if same_rows(own, each)] if "logprob" in own.capture else []


def same_rows(one: View, other: View) -> bool:
    """Whether two captures have rows of the same documents, parts and lengths, one vocabulary, and an equal first row.
    Whether all tokens are equal is only known once they are read."""
    names = ("document_id", "offset", "length")
    alike = one.pieces == other.pieces and all(np.array_equal(one.rows[name], other.rows[name]) for name in names)
    return alike and np.array_equal(one.first_row, other.first_row)


def effect_page(own: View, other: View, row: int, start: int) -> dict[str, Any]:
    """The effect on the tokens of a page of text that begins at a position of a row.

    Returns
    -------
    dict
        `effect`: base64 of float32 (token), the log-probability of each token in the other capture minus that in its
        own, in nats; NaN where not known, as for a row's first token.

    Raises
    ------
    ValueError
        When the captures cannot be compared, hold different tokens there, or there is no such page.
    """
    if not comparable(own, [other]):
        raise ValueError(f"{own.dataset} and {other.dataset} have no equal rows with log-probabilities")
    own.page_at(row, start)
    stop = min(int(own.rows["length"][row]), start + CHUNK_POSITIONS)
    first = max(0, start - 1)
    tokens, logprob = ([each.read(name, row, first, stop) for each in (own, other)] for name in ("token", "logprob"))
    if not np.array_equal(tokens[0], tokens[1]):
        raise ValueError(f"{own.dataset} and {other.dataset} hold different tokens in row {row}")
    effect = np.full(stop - start, np.nan, np.float32)
    if own.rows["captured"][row] and other.rows["captured"][row]:
        effect[first + 1 - start :] = (logprob[1].astype(float) - logprob[0])[: stop - first - 1]
    return {"effect": in_float32(effect)}
