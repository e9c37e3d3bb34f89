"""The result of planning: rows of tokens, and one record of how much of the text has become rows."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MOST = 2**40  # maximum of any count; a damaged record must not start a search for trillions of shards


SKIPPED_NAMED = 100  # arbitrary; all are counted
LATER = ("documents_skipped", "skipped")  # fields that plans of older versions lack


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much of the text has become rows. Every number counts durable data.

    Raises
    ------
    ValueError
        When the numbers are not possible.
    """

    complete: bool = False
    rows: int = 0
    tokens: int = 0
    documents: int = 0
    documents_empty: int = 0
    documents_repaired: int = 0
    """Documents in which invalid bytes or surrogates were replaced by U+FFFD."""
    pairs_cut: int = 0
    """Pairs of adjacent tokens that are in two rows because their document was cut into windows."""
    rows_of_next_document: int = 0
    """Rows of document number `documents` that are already planned: a document may end in a later shard."""

    documents_skipped: int = 0
    """Documents without rows because they cannot be rendered, if that was allowed; included in `documents_empty`."""
    skipped: tuple[str, ...] = ()
    """Names of the first `SKIPPED_NAMED` skipped documents."""

    def record(self) -> dict[str, Any]:
        """The record as it is stored: without the later fields if they are empty."""
        return {name: value for name, value in asdict(self).items() if name not in LATER or value}

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) for name in self.skipped):
            raise ValueError(f"says skipped {self.skipped!r:.80}, which is not possible")
        for name, value in asdict(self).items():
            if name == "skipped":
                continue
            whole = type(value) is int and 0 <= value <= MOST
            if not (type(value) is bool if name == "complete" else whole):
                raise ValueError(f"says {name} {value!r:.80}, which is not possible")
        if not (self.rows <= self.tokens and self.documents - self.documents_empty <= self.rows):
            raise ValueError(
                f"says {self.documents} documents, {self.documents_empty} of them empty, {self.rows} rows and"
                f" {self.tokens} tokens, which is not consistent"
            )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Planned rows, in order: the next rows of the group, or the parts of a shard's rows that a worker needs.

    A row is a window of a document, P positions wide.
    """

    token: np.ndarray
    """int32 (rows, P); -1 beyond the row's length"""
    length: np.ndarray
    """int32 (rows,)"""
    document_id: np.ndarray | None = None
    """int64 (rows,): the document of which each row is a window, from 0"""
    offset: np.ndarray | None = None
    """int32 (rows,): tokens of the document before the row"""
    role: np.ndarray | None = None
    """uint8 (rows, P), for conversations: index into `Layout.roles`, 255 if there is no speaker"""
    phase: np.ndarray | None = None
    """uint8 (rows, P), if phases are known: index into `Layout.phases`, 255 if not known"""
