"""What planning leaves behind: rows of tokens, and one record of how far the text has become rows."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

MOST = 2**40  # of anything; a record that was damaged must not have millions of millions of shards looked for


SKIPPED_NAMED = 100  # arbitrary: all are counted
LATER = ("documents_skipped", "skipped")  # fields that plans of older versions do not have


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How far the text has become rows; every number counts what is durable.

    Raises
    ------
    ValueError
        When no text can have become that.
    """

    complete: bool = False
    rows: int = 0
    tokens: int = 0
    documents: int = 0
    documents_empty: int = 0
    documents_repaired: int = 0
    """Documents in which bytes or surrogates that are no Unicode text were replaced by U+FFFD."""
    pairs_cut: int = 0
    """Neighbouring token pairs that lie in two rows because their document was cut into windows."""
    rows_of_next_document: int = 0
    """Rows of document number `documents` that are planned already: a document may end in a later shard."""

    documents_skipped: int = 0
    """Documents without a row because they cannot be rendered, where that was allowed; among `documents_empty`."""
    skipped: tuple[str, ...] = ()
    """Names of the first `SKIPPED_NAMED` of them."""

    def record(self) -> dict[str, Any]:
        """What is kept of it: without the fields that came later, where they say nothing."""
        return {name: value for name, value in asdict(self).items() if name not in LATER or value}

    def __post_init__(self) -> None:
        if not all(isinstance(name, str) for name in self.skipped):
            raise ValueError(f"says skipped {self.skipped!r:.80}, which it cannot be")
        for name, value in asdict(self).items():
            if name == "skipped":
                continue
            whole = type(value) is int and 0 <= value <= MOST
            if not (type(value) is bool if name == "complete" else whole):
                raise ValueError(f"says {name} {value!r:.80}, which it cannot be")
        if not (self.rows <= self.tokens and self.documents - self.documents_empty <= self.rows):
            raise ValueError(
                f"says {self.documents} documents, {self.documents_empty} of them empty, {self.rows} rows and"
                f" {self.tokens} tokens, which do not go together"
            )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Planned rows, in order: the next ones of the group, or what a worker needs of a shard's.

    A row is a window of a document, P positions wide.
    """

    token: np.ndarray
    """int32 (rows, P); -1 beyond the row's length"""
    length: np.ndarray
    """int32 (rows,)"""
    document_id: np.ndarray | None = None
    """int64 (rows,): the document that each row is a window of, from 0"""
    offset: np.ndarray | None = None
    """int32 (rows,): tokens of the document before the row"""
    role: np.ndarray | None = None
    """uint8 (rows, P), for conversations: index into `Layout.roles`, 255 where there is no speaker"""
    phase: np.ndarray | None = None
    """uint8 (rows, P), where it is known: index into `Layout.phases`, 255 where it is not"""
