"""Pieces as they read in a text: "▁the" is " the", "<0x0A>" a line feed.

Promises: nothing is dropped: what is no text of its own (a byte of a longer character) is shown as ⟨E2⟩, and what
cannot be seen as `\\uXXXX`. Does not know whole texts: each piece is read alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from analysis.escaping import visible

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def readable(pieces: Sequence[str]) -> list[str]:
    """Each piece of a vocabulary as it reads; the store's are SentencePiece's, and those of byte-level BPE alike."""
    return [visible(_text(piece), keep="\n") for piece in pieces]


def _text(piece: str) -> str:
    found = _BYTE.fullmatch(piece)
    if found is None:
        return piece.replace("▁", " ")
    value = int(found[1], 16)
    return chr(value) if value < 128 else f"⟨{value:02X}⟩"
