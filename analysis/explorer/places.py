"""A token in its context; each token is shaded by its weight for an expert.

Promises: the focused token is in the same column at all places. Indented text, such as code, keeps its lines. Does not
know HTML or the width of the screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

COLUMN = 40  # characters before the token where lines are kept (arbitrary)


class Word(NamedTuple):
    """One token, or several that are not shaded."""

    text: str
    share: float = 0.0
    """How strongly it is shaded: 0 to 1."""
    focus: bool = False


def words_around(texts: Sequence[str], at: int, shares: Sequence[float] | None = None) -> list[Word]:
    """The tokens of a text, with token `at` as the focus; neighbours without shading are merged into one word."""
    shares = [0.0] * len(texts) if shares is None else shares
    words = [Word(text, share, number == at) for number, (text, share) in enumerate(zip(texts, shares, strict=True))]
    joined: list[Word] = []
    for plain, group in groupby(words, lambda word: not (word.share or word.focus)):
        some = [*group]
        joined += [Word("".join(word.text for word in some))] if plain else some
    return joined


def in_one_line(words: Sequence[Word]) -> dict[str, Any]:
    """The words `before` and `after` the `focus`, with line feeds as ↵; `lines` is None."""
    words = [word._replace(text=word.text.replace("\n", "↵")) for word in words]
    at = _focus(words)
    return {"before": words[:at], "focus": words[at], "after": words[at + 1 :], "lines": None}


def in_lines(words: Sequence[Word]) -> dict[str, Any]:
    """`lines` of words, shifted so that the focus begins at `COLUMN`; text left of column 0 is cut off."""
    lines: list[list[Word]] = [[]]
    for word in words:
        first, *others = word.text.split("\n")
        shown = first + ("↵" if others and (word.share or word.focus) else "")
        lines[-1].append(word._replace(text=shown))
        lines += [[word._replace(text=other, focus=False)] for other in others]
    [own] = [line for line in lines if any(word.focus for word in line)]
    column = sum(len(word.text) for word in own[: _focus(own)])
    while lines[0] is not own and _blank(lines[0]):
        lines.pop(0)
    while lines[-1] is not own and _blank(lines[-1]):
        lines.pop()
    return {"lines": [[word for word in _moved(line, COLUMN - column) if word.text] for line in lines]}


def _blank(line: Sequence[Word]) -> bool:
    """Whether nothing in a line is visible."""
    return not any(word.text.strip() for word in line)


def _focus(words: Sequence[Word]) -> int:
    """The index of the focused word."""
    return next(at for at, word in enumerate(words) if word.focus)


def _moved(line: Sequence[Word], by: int) -> list[Word]:
    """A line with `by` spaces before it or, if negative, without its first characters."""
    if by >= 0 or not line:
        return [Word(" " * by), *line] if line else []
    kept, left = [], -by
    for word in line:
        kept.append(word._replace(text=word.text[left:]))
        left = max(0, left - len(word.text))
    return kept
