"""Pieces as they read in a text: "▁the" is " the", "<0x0A>" a line feed, "Ġthe" of byte-level vocabularies " the".

Promises: nothing is dropped: what is no text of its own (a byte of a longer character) is shown as ⟨E2⟩, and what
cannot be seen as `\\uXXXX`. Does not know whole texts: each piece is read alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from analysis.escaping import visible

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SEEN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in GPT-2's alphabet


def readable(pieces: Sequence[str]) -> list[str]:
    """Each piece of a vocabulary as it reads: SentencePiece's, or those of byte-level BPE (Radford et al. 2019)."""
    if any(piece.startswith("Ġ") for piece in pieces) and not any("▁" in piece for piece in pieces):
        alphabet = _alphabet()
        return [_shown(_of_bytes(piece, alphabet)) for piece in pieces]
    return [_shown(_of_byte(int(found[1], 16)) if (found := _BYTE.fullmatch(piece)) else piece.replace("▁", " "))
            for piece in pieces]  # fmt: skip


def _of_byte(value: int) -> str:
    return chr(value) if value < 128 else f"⟨{value:02X}⟩"


def _alphabet() -> dict[str, int]:
    """The byte of each character of GPT-2's alphabet: those that cannot be seen were moved behind the others."""
    unseen = [value for value in range(256) if value not in _SEEN]
    return {chr(value): value for value in _SEEN} | {chr(256 + at): value for at, value in enumerate(unseen)}


def _of_bytes(piece: str, alphabet: dict[str, int]) -> str:
    """Text of a piece in that alphabet; a special token's, which is not in it, as it is."""
    if any(character not in alphabet for character in piece):
        return piece
    data = bytes(alphabet[character] for character in piece)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "".join(_of_byte(value) for value in data)


def _shown(text: str) -> str:
    return "\n".join(visible(line) for line in text.split("\n"))
