"""What planning leaves behind: rows of tokens, and one record of how far the text has become rows."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How far the text has become rows; every number counts what is durable."""

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


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Planned rows, in order: the next ones of the group, or what a worker needs of a shard's."""

    token: np.ndarray
    """int32 (rows, P); -1 beyond the row's length"""
    length: np.ndarray
    """int32 (rows,)"""
    document_id: np.ndarray | None = None
    offset: np.ndarray | None = None
    role: np.ndarray | None = None
    """uint8 (rows, P), for conversations"""
