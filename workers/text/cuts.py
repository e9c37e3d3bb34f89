"""
Cut long texts into parts whose joined ids are those of the whole text, so that memory is bounded.

Promises: a text is cut only at white space, and only in ways that change no id. A tokenizer must meet two conditions
for each way to cut. No piece of its vocabulary spans such a place, so no merge does. And for short texts around such a
place the ids of the parts are those of the whole, which shows how it splits texts before it merges.

A part other than the first is encoded after a `lead`, a short text whose ids are then dropped: anything that a
tokenizer adds before a text, such as ▁, is added before the lead.

Does not cut inside words. A text without white space is one part, and needs about 100 bytes per character.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import product
from typing import NamedTuple

from tokenizers import Tokenizer

SPACE = "▁"
CUT_CHARACTERS = 1 << 16
"""Longest text that is encoded at once, in characters (arbitrary; the ids do not depend on it)."""
_LETTER, _STRAY = r"[^\W_]", "<0x[89A-F][0-9A-F]>"  # a byte of a letter may be a piece by itself
_BEFORE = ("a", "x word", "7", "é", "日", "ꙮ", "B's")
_AFTER = ("b", " b", "  b", "\n b", "\n\nb", "\t\tb", "7 7", "日本", "ꙮ", "'s", ".x", "\u0301e", "🙂 \t🙂", "")


class Part(NamedTuple):
    """A part of a text: it starts at `start` and is encoded after `lead`."""

    start: int
    lead: str
    text: str


class _Way(NamedTuple):
    """A way to cut, with `lead` before the rest."""

    place: str
    """Finds the white space with which the rest begins; if it is a group, it ends the part before."""
    lead: str
    crossing: str
    """A pattern for pieces that span such a place."""
    before: Sequence[str]
    after: Sequence[str]


def _ways() -> Iterator[_Way]:
    """Ways to cut: before a space, before other white space after a letter, after line feeds before a letter."""
    marks = (*_BEFORE, "word.", "🙂", "(x)")
    after = [f" {text}" for text in _AFTER]
    yield _Way(rf"(?<=[^\s{SPACE}]) ", "a", rf"[^\s{SPACE}][ {SPACE}]", marks, after)
    for white in "\n\r\t\x0b\x0c\x85\xa0\u2028\u3000":
        after = [f"{white}{text}" for text in _AFTER]
        yield _Way(f"(?<={_LETTER}){white}", "a", f"(?:{_LETTER}|{_STRAY}){white}", _BEFORE, after)
    after = [text for text in _AFTER if re.match(_LETTER, text)]
    for feeds in ("\n", "\n\n", "\n\n\n"):  # GPT-2's pattern separates the last line feed of a run if a letter follows
        before = [text + feeds for text in (*marks, "日。", "x )")]
        yield _Way(rf"(?<=\S)({feeds})(?={_LETTER})", "\n", f"\n(?:{_LETTER}|{_STRAY})", before, after)


class Cuts:
    """
    The places at which texts can be cut for one tokenizer.

    Parameters
    ----------
    backend
        The tokenizer.
    pieces
        Returns its readable pieces, ▁ for a space: `TextTokenizer.pieces`. Called when a text is first cut.
    """

    def __init__(self, backend: Tokenizer, pieces: Callable[[], Sequence[str]]) -> None:
        self._backend = backend
        self._pieces = pieces
        added = backend.get_added_tokens_decoder().values()
        self._matched = tuple(t.content for t in added if not (t.special and backend.encode_special_tokens))
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}

    def parts(self, text: str, limit: int) -> Iterator[Part]:
        """Yield the parts of a text, each but the last at least `limit` characters long."""
        start, lead = 0, ""
        while len(text) - start > limit and self._places is not None:
            found = self._next(text, start + limit)
            if found is None:
                break
            place, following = found
            yield Part(start, lead, text[start:place])
            start, lead = place, following
        yield Part(start, lead, text[start:])

    def lead_tokens(self, lead: str) -> int:
        """The number of ids of a part that belong to its lead."""
        return len(self._backend.encode(lead, add_special_tokens=False).ids) if lead else 0

    def _next(self, text: str, position: int) -> tuple[int, str] | None:
        """Find the next place to cut and the lead of the next part; never directly after an added token."""
        assert self._places is not None
        for found in self._places.finditer(text, position):
            place, lead = (found.end(), "\n") if found.lastindex else (found.start(), "a")
            if not any(text.endswith(self._matched, 0, end) for end in (found.start(), place)):
                return place, lead
        return None

    @cached_property
    def _places(self) -> re.Pattern[str] | None:
        """The places at which texts can be cut; None if there are none."""
        if any(re.search(r"\S\s", token) for token in self._matched):
            return None
        white = re.compile(rf"[\s{SPACE}].|.[\s{SPACE}]", re.DOTALL)
        pieces = [piece for i, piece in enumerate(self._pieces()) if i not in self._special and white.search(piece)]
        ways = [way.place for way in _ways() if self._is_exact(way, pieces)]
        return re.compile("|".join(ways)) if ways else None

    def _is_exact(self, way: _Way, pieces: Sequence[str]) -> bool:
        crossing = re.compile(way.crossing)
        if any(map(crossing.search, pieces)):
            return False
        probes = list(product(way.before, way.after))
        texts = [text for a, b in probes for text in (a + b, a, way.lead + b)]
        ids = [e.ids for e in self._backend.encode_batch(texts, add_special_tokens=False)]
        lead = self.lead_tokens(way.lead)
        return all(
            whole == left + right[lead:] for whole, left, right in zip(ids[::3], ids[1::3], ids[2::3], strict=True)
        )
