"""Cut documents into rows: windows of at most P tokens, with one document per row, never two packed into one.

Documents are not packed because attention with packed positions silently mixes documents (measured: 40 % of choices
agree).
"""

from typing import Literal

import numpy as np

from store.layout import MISSING_TOKEN

BosRule = Literal["none", "document", "row"]


def document_rows(
    ids: np.ndarray, sequence_length: int, *, bos: BosRule = "none", bos_id: int | None = None
) -> list[tuple[int, np.ndarray, bool]]:
    """Cut one document into windows.

    Parameters
    ----------
    ids : int32 array, shape (tokens,)
    sequence_length
        P: maximum number of tokens in a row, including a BOS.
    bos
        Where a beginning-of-sequence token is added: nowhere, before each document, or before each row.
    bos_id
        The tokenizer's; needed unless `bos` is "none".

    Returns
    -------
    list of (offset, tokens, has_bos)
        `offset` counts the document's tokens before the row, without any BOS. Empty for an empty document.

    Raises
    ------
    ValueError
        When a BOS is requested but the tokenizer has none, or a BOS leaves no room for a token.
    """
    if bos != "none" and (bos_id is None or sequence_length < 2):
        reason = "the tokenizer has no BOS token" if bos_id is None else "a row of 1 token has no room for it"
        raise ValueError(f"--bos {bos}: {reason}; use --bos none")
    rows = []
    start = 0
    while start < len(ids):
        has_bos = bos == "row" or (bos == "document" and start == 0)
        window = ids[start : start + sequence_length - has_bos]
        tokens = np.concatenate([[bos_id], window]).astype(np.int32) if has_bos else window
        rows.append((start, tokens, has_bos))
        start += len(window)
    return rows


def padded(rows: list[np.ndarray], sequence_length: int, fill: int = MISSING_TOKEN) -> np.ndarray:
    """Rows as one array (rows, P), padded on the right, with the dtype of the first row."""
    array = np.full((len(rows), sequence_length), fill, dtype=rows[0].dtype if rows else np.int32)
    for row, tokens in zip(array, rows, strict=True):
        row[: len(tokens)] = tokens
    return array
