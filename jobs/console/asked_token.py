"""Which token a user means by a text, a piece of the tokenizer or an id, and what else could be meant.

Promises: exact matches are preferred to similar ones, and frequent tokens to rare ones; the answer lists the others
with their counts. Knows the notation of pieces: ▁ is a space, <0x0A> a byte.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jobs.console.query_rows import Listed, token_answer
from jobs.console.terminal import shown

if TYPE_CHECKING:
    import xarray as xr

LISTED = 5  # other tokens to list (arbitrary)
ESCAPE = re.compile(r"\\(?:[\\nrt]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})")


@dataclass(frozen=True, kw_only=True)
class AskedToken:
    """The tokens that may be meant."""

    word: str
    """The text that was typed."""
    meant: Sequence[int]
    """Candidate ids; the answer is about one of them."""
    near: Sequence[int] = ()
    """Ids of tokens that differ from those in case or in a leading space, and the id itself if the word is a number."""

    def answer(self, capture: "xr.Dataset", layers: list[int], counts: "xr.Dataset") -> Listed:
        """The experts of the most frequent candidate, and the others that occur."""
        tokens = counts["tokens"].values.tolist()
        first, *rest = sorted(self.meant, key=lambda token: -tokens[token])
        others = sorted((token for token in (*rest, *self.near) if tokens[token]), key=lambda token: -tokens[token])
        pieces = capture["piece"].values
        rows = [{"token_id": token, "piece": pieces[token], "tokens": tokens[token]} for token in others]
        answer = token_answer(capture, first, layers, counts)
        listed = ", ".join(f"{shown(row['piece'])} (id {row['token_id']}) {row['tokens']:,}" for row in rows[:LISTED])
        more = f" and {len(rows) - LISTED} more" * (len(rows) > LISTED)
        taken = f'"{shown(self.word)}" is read as {shown(pieces[first])} (id {first})'
        note = f"{taken}; similar tokens, with their occurrences: {listed}{more}; use --token_id to select one of them"
        return replace(answer, facts={**answer.facts, "others": rows}, note=note if rows else "")


def asked_token(capture: "xr.Dataset", word: str | None, token_id: int | None) -> AskedToken:
    """The tokens that `--token` or `--token_id` names.

    Raises
    ------
    ValueError
        When there is none, or only a special token, which is not counted.
    """
    from analysis.scanning import special_tokens

    pieces: list[str] = capture["piece"].values.tolist()
    special = set(special_tokens(capture))
    asked = _by_word(word, pieces) if word is not None else AskedToken(word=str(token_id), meant=[token_id or 0])
    if not 0 <= asked.meant[0] < len(pieces):
        raise ValueError(f"--token_id {asked.meant[0]}: the vocabulary has tokens 0 to {len(pieces) - 1}")
    counted = [token for token in asked.meant if token not in special]
    if not counted:
        token = asked.meant[0]
        raise ValueError(f"token {token}, {shown(pieces[token])}, is a special token, which is not counted")
    return replace(asked, meant=counted, near=[token for token in asked.near if token not in special])


def _by_word(word: str, pieces: list[str]) -> AskedToken:
    """The tokens whose piece or text equals a word or, if there are none, whose id does."""
    if not word:
        raise ValueError('--token is empty: write " " for a space and "\\n" for a line feed')
    forms = {form: None for text in (word, ESCAPE.sub(_unescaped, word)) for form in _forms(text)}
    order = {form: number for number, form in enumerate(forms)}
    found = [number for number, piece in enumerate(pieces) if piece in forms]
    found.sort(key=lambda number: order[pieces[number]])
    plain = {_plain(form) for form in forms} - {""}
    near = [number for number, piece in enumerate(pieces) if _plain(piece) in plain]
    if word.isascii() and word.isdecimal() and len(word) < 19 and int(word) < len(pieces):  # fits in 64 bits
        if not found:
            return AskedToken(word=word, meant=[int(word)], near=near)
        near.append(int(word))
    if not found:
        raise ValueError(_none(word, pieces, near))
    return AskedToken(word=word, meant=found, near=[token for token in dict.fromkeys(near) if token not in found])


def _forms(text: str) -> list[str]:
    """Pieces that may represent a text: its own, that of a byte, and that of a word with a leading space."""
    if not text or "▁" in text:
        return [text]
    piece = text.replace(" ", "▁")
    byte = [f"<0x{ord(text):02X}>"] if len(text) == 1 and text.isascii() else []
    return [piece, *byte, *([f"▁{piece}"] * (not text.startswith(" ")))]


def _unescaped(found: re.Match[str]) -> str:
    return found[0].encode("ascii").decode("unicode_escape")


def _none(word: str, pieces: list[str], near: list[int]) -> str:
    """The error if no token has a text, with similar tokens."""
    plain: dict[str, list[int]] = {}
    for number, other in enumerate(pieces):
        plain.setdefault(_plain(other), []).append(number)
    words = difflib.get_close_matches(_plain(word), plain, n=LISTED)
    numbers = [*near, *(number for other in words for number in plain[other])]
    named = ", ".join(f"{shown(pieces[number])} ({number})" for number in list(dict.fromkeys(numbers))[:LISTED])
    return f"no token reads {shown(word)}; similar tokens, with their ids: {named or 'none'}"


def _plain(piece: str) -> str:
    """A piece in lower case and without the ▁ that stands for a space."""
    return piece.replace("▁", " ").strip().casefold()
