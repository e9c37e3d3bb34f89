"""How unusual each document's use of the experts is for its data set.

Promises: covers all that is indexed; a document is compared with all others, excluding itself; the value expected by
chance for few tokens is subtracted, and a document with too few tokens has no number. One pass over the parts, which
hold each row's counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from analysis.explorer.view import View
from analysis.scanning import Array

LEAST = 200  # choices at a layer; with fewer, a document has no number (arbitrary)


@dataclass(frozen=True)
class Unusual:
    """The results of `unusual_documents`, by document."""

    bits: Array
    """How far its shares of the choices are from the other documents', shape (document), float64, in bits a choice: the
    Kullback-Leibler divergence, averaged over layers, minus the value expected by chance, (E - 1) / (2 n ln 2) for n
    choices; NaN if the document is too short, or the only one."""
    layer: Array
    """The layer where it differs most, by index, int64 (document)."""
    expert: Array
    """The expert that it uses more there, int64 (document)."""
    share: Array
    """That expert's share of its choices at that layer, float64 (document)."""
    others: Array
    """The same share in the other documents."""

    @property
    def order(self) -> Array:
        """Documents, the most unusual first; those without a number come last, in their original order."""
        return np.argsort(-np.nan_to_num(self.bits, nan=-np.inf), kind="stable")


def unusual_documents(view: View) -> Unusual:
    """Compare each document with the others of its data set.

    The divergence is that of Kullback and Leibler (1951), its bias correction that of Miller (1955).
    """
    documents = len(view.names)
    total = sum((part.load.sum(0, dtype=np.int64) for part in view.now.parts.values()), np.int64(0))
    bits = np.full(documents, np.nan)
    layer, expert = np.zeros((2, documents), np.int64)
    share, others = np.full((2, documents), np.nan)
    for document, count in _counts(view):
        of, rest = count.sum(-1, keepdims=True), total - count
        known = (of[:, :, 0].min(1) >= LEAST) & (rest.sum(-1).min(1) > 0)
        document, count, of, rest = (values[known] for values in (document, count, of, rest))
        own, other = count / of, (rest + 0.5) / (rest.sum(-1, keepdims=True) + 0.5 * view.experts)
        each = own * np.log2(np.where(count, own / other, 1))  # (document, layer, expert)
        chance = (view.experts - 1) / (2 * np.log(2) * of[:, :, 0])
        bits[document] = (each.sum(-1) - chance).mean(-1)
        most = np.unravel_index(each.reshape(len(each), -1).argmax(1), each.shape[1:]) if len(each) else (0, 0)
        layer[document], expert[document] = most
        at = np.arange(len(each)), *most
        share[document], others[document] = own[at], other[at]
    return Unusual(bits, layer, expert, share, others)


def _counts(view: View) -> Iterator[tuple[Array, Array]]:
    """Documents, and their choices (document, layer, expert), int64, part by part; each document once. A document with
    rows in several parts comes with the last of them.
    """
    of_row = view.rows["document_id"]
    parts = [*view.now.parts.values()]
    last = np.zeros(len(view.names), np.int64)
    for number, part in enumerate(parts):
        last[of_row[part.first_row : part.first_row + len(part.load)]] = number
    begun: dict[int, Array] = {}
    for number, part in enumerate(parts):
        own = of_row[part.first_row : part.first_row + len(part.load)]
        order = np.argsort(own, kind="stable")
        documents, first = np.unique(own[order], return_index=True)
        count = np.add.reduceat(part.load[order], first, axis=0, dtype=np.int64)
        for at, document in enumerate(documents.tolist()):
            count[at] += begun.pop(document, 0)
            if last[document] > number:
                begun[document] = count[at].copy()
        whole = last[documents] == number
        yield documents[whole], count[whole]
