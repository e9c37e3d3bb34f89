"""Find a phrase, however it is split into tokens: "the Congress" over " the" and " Congress".

Each byte of a phrase is covered by one token. The search picks the byte that only rare tokens can cover, looks up their
places in the index, and compares the text around each with the phrase.

Promises: every place is found once, ignoring case; the number of comparisons per answer is limited, and the answer says
whether the limit was reached. A phrase spans neither a special token nor two rows. If tokens are selected, a phrase is
found if the token that was looked up is one of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.explorer.parts import Part
from analysis.scanning import Array, kernel
from analysis.token_classes import text_of

COMPARED = 2**21  # most places compared for one answer: 0.1 s (measured)
LONGEST = 200  # characters of a phrase (arbitrary)
BARRIER = b"\xff"  # no UTF-8 text holds this byte; it stands for special tokens, so no phrase contains them


@dataclass(frozen=True)
class Place:
    """A phrase in a row: the tokens that it touches."""

    part: Part
    row: int
    position: int
    tokens: int


@dataclass(frozen=True)
class Found:
    """The places of a phrase."""

    number: int
    """Places."""
    complete: bool
    """Whether these are all places, not only those before the limit on comparisons."""
    places: list[Place]
    """The places that were asked for."""


class Phrases:
    """The bytes of a vocabulary, for finding phrases.

    Parameters
    ----------
    pieces
        The vocabulary's pieces, as in a capture's `piece`.
    special
        Ids of the tokens that are not text.
    """

    def __init__(self, pieces: Sequence[str], special: Collection[int]) -> None:
        self.pieces, self.special = pieces, frozenset(special)

    @cached_property
    def spelled(self) -> tuple[Array, Array]:
        """The bytes of all tokens, concatenated, uint8; and the start of each, int64 (token_id + 1)."""
        texts = [BARRIER if at in self.special else spelled(text_of(piece)) for at, piece in enumerate(self.pieces)]
        return np.frombuffer(b"".join(texts), np.uint8), np.cumsum([0, *map(len, texts)])

    def find(self, text: str, parts: Collection[Part], count: Array, *, skip: int, limit: int) -> Found:
        """How often a phrase occurs in some parts, and some of its places.

        Parameters
        ----------
        text
            The phrase.
        parts
            Where to look.
        count : array, shape (token_id,), int64
            How often each token occurs in them.
        skip, limit
            Places to skip, and the most places to return, in the order of the text.
        """
        letters, starts = self.spelled
        phrase = np.frombuffer(spelled(text), np.uint8)
        tokens, ats = _lookups(phrase, letters, starts, count)
        number, compared, found = 0, 0, list[Place]()
        for part in parts:
            if compared >= COMPARED:
                return Found(number=number, complete=False, places=found)
            here = int((part.bounds[tokens + 1].astype(np.int64) - part.bounds[tokens]).sum())
            compared += here
            ends = np.empty((here, 2), np.int64)
            ends = ends[: _compare(phrase, letters, starts, part.token, part.order, part.bounds, tokens, ats, ends)]
            ends = _in_one_row(part, ends)
            first = max(0, skip - number)
            found += _places(part, ends[first : first + limit - len(found)]) if skip < number + len(ends) else []
            number += len(ends)
        return Found(number=number, complete=True, places=found)


def spelled(text: str) -> bytes:
    """Text in the form that is compared: case-folded UTF-8; a single byte that is a token of its own stays that
    byte."""
    return text.casefold().encode("utf-8", "surrogateescape")


def _lookups(phrase: Array, letters: Array, starts: Array, count: Array) -> tuple[Array, Array]:
    """The tokens whose places are looked up, and where in the phrase each begins; negative if before the phrase."""
    places, tokens = np.zeros((2, phrase.size), np.int64)
    _over_each_byte(phrase, letters, starts, count, places, tokens)
    byte = int(places.argmin())
    found = np.empty((int(tokens[byte]), 2), np.int64)
    _over_one_byte(phrase, letters, starts, count, byte, found)
    return found[:, 0], found[:, 1]


def _in_one_row(part: Part, ends: Array) -> Array:
    """Phrases by the first and last token that they touch, in order, without those that cross a row's end."""
    row = np.searchsorted(part.start, ends, side="right")
    ends = ends[row[:, 0] == row[:, 1]]
    return ends[np.argsort(ends[:, 0], kind="stable")]


def _places(part: Part, ends: Array) -> list[Place]:
    """The same as places of the capture."""
    row = np.searchsorted(part.start, ends[:, 0], side="right") - 1
    columns = part.first_row + row, ends[:, 0] - part.start[row], ends[:, 1] - ends[:, 0] + 1
    return [Place(part, *each) for each in zip(*(column.tolist() for column in columns), strict=True)]


@kernel
def _fits(phrase: Array, letters: Array, at: int) -> bool:
    """Whether a token that begins at a byte of the phrase, or before the phrase, matches it."""
    for index in range(max(0, -at), min(len(letters), len(phrase) - at)):
        if letters[index] != phrase[at + index]:
            return False
    return True


@kernel
def _over_each_byte(phrase: Array, letters: Array, starts: Array, count: Array, places: Array, tokens: Array) -> None:
    """Add up, for each byte of the phrase, the tokens that can cover it, and their places."""
    for token in range(len(count)):
        own = letters[starts[token] : starts[token + 1]]
        if count[token]:
            for at in range(1 - len(own), len(phrase)):
                if _fits(phrase, own, at):
                    for byte in range(max(0, at), min(len(phrase), at + len(own))):
                        places[byte] += count[token]
                        tokens[byte] += 1


@kernel
def _over_one_byte(phrase: Array, letters: Array, starts: Array, count: Array, byte: int, found: Array) -> None:
    """Collect the tokens that can cover a byte of the phrase, and where each begins."""
    number = 0
    for token in range(len(count)):
        own = letters[starts[token] : starts[token + 1]]
        if count[token]:
            for at in range(byte - len(own) + 1, byte + 1):
                if _fits(phrase, own, at):
                    found[number, 0], found[number, 1] = token, at
                    number += 1


@kernel
def _compare(
    phrase: Array,
    letters: Array,
    starts: Array,
    token: Array,
    order: Array,
    bounds: Array,
    tokens: Array,
    ats: Array,
    ends: Array,
) -> int:
    """Compare the text around the places of some tokens with the phrase, and collect where the phrase begins and
    ends."""
    number = 0
    for asked in range(len(tokens)):
        for index in range(bounds[tokens[asked]], bounds[tokens[asked] + 1]):
            first = last = np.int64(order[index])
            at, same = ats[asked], True
            while same and at > 0 and first > 0:
                first -= 1
                own = letters[starts[token[first]] : starts[token[first] + 1]]
                at -= len(own)
                same = _fits(phrase, own, at)
            end = ats[asked] + starts[tokens[asked] + 1] - starts[tokens[asked]]
            while same and end < len(phrase) and last + 1 < len(token):
                last += 1
                own = letters[starts[token[last]] : starts[token[last] + 1]]
                same = _fits(phrase, own, end)
                end += len(own)
            if same and at <= 0 and end >= len(phrase):
                ends[number, 0], ends[number, 1] = first, last
                number += 1
    return number
