"""Pieces as readable text: "▁the" is " the", "<0x0A>" a line feed.

Promises: nothing is dropped: a byte of a longer character is shown as ⟨E2⟩, and an invisible character as `\\uXXXX`.
Does not know whole texts: each piece is decoded alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.escaping import visible
from analysis.token_classes import text_of

_BYTES = {0xDC00 + byte: f"⟨{byte:02X}⟩" for byte in range(128, 256)}


def readable(pieces: Sequence[str]) -> list[str]:
    """Each piece of a vocabulary as readable text, for pieces of SentencePiece and of byte-level BPE."""
    return [visible(text_of(piece).translate(_BYTES), keep="\n") for piece in pieces]


def inline(text: object) -> str:
    """A text on one line with everything visible: a line feed is ↵, and a text of spaces alone is ␣."""
    line = visible(str(text).replace("\n", "↵"))
    return line if line.strip() else "␣" * len(line)
