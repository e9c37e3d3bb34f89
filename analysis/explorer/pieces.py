"""Pieces as they read in a text: "▁the" is " the", "<0x0A>" a line feed.

Promises: nothing is dropped: what is no text of its own (a byte of a longer character) is shown as ⟨E2⟩, and what
cannot be seen as `\\uXXXX`. Does not know whole texts: each piece is read alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from analysis.escaping import visible
from analysis.token_classes import text_of

_BYTES = {0xDC00 + byte: f"⟨{byte:02X}⟩" for byte in range(128, 256)}


def readable(pieces: Sequence[str]) -> list[str]:
    """Each piece of a vocabulary as it reads; the store's are SentencePiece's, and those of byte-level BPE alike."""
    return [visible(text_of(piece).translate(_BYTES), keep="\n") for piece in pieces]


def inline(text: object) -> str:
    """A text on one line, where everything can be seen: a line feed is ↵, and blanks alone are ␣."""
    line = visible(str(text).replace("\n", "↵"))
    return line if line.strip() else "␣" * len(line)
