"""Token classes by the text of their pieces: digits, letters by case, punctuation, scripts, any regular expression.

Promises: a class is a pattern that matches the whole text of a piece, so it always means the same tokens. Does not know
the context of a token: a word at the start of a line has no space before it and looks like a continuation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import regex
from numpy.typing import NDArray

COPIES = 10_000  # of a part of a regular expression, made in memory by counts in braces (arbitrary)
PATIENCE_S = 20.0  # for all pieces: a user's regular expression may take years for one of them (arbitrary)

_BYTE = regex.compile(r"<0x([0-9A-F]{2})>")
_COUNT = regex.compile(r"\{(\d{1,9})")
_KEYWORDS = (
    "and|as|assert|async|await|boolean|break|case|catch|chan|char|class|const|continue|def|default|defer|del|do|"
    "double|elif|else|enum|except|export|extends|extern|false|False|final|finally|float|fn|for|from|func|function|"
    "global|goto|if|impl|implements|import|in|instanceof|int|interface|is|lambda|let|long|loop|match|mod|mut|"
    "namespace|new|None|nonlocal|not|null|nullptr|or|package|pass|private|protected|pub|public|raise|range|return|"
    "self|short|signed|sizeof|static|struct|super|switch|synchronized|template|this|throw|throws|trait|true|True|"
    "try|typedef|typename|typeof|union|unsafe|unsigned|use|using|var|virtual|void|volatile|where|while|with|yield"
)
SCRIPTS = (
    *("Latin", "Greek", "Cyrillic", "Armenian", "Georgian", "Hebrew", "Arabic", "Devanagari", "Bengali", "Tamil"),
    *("Telugu", "Thai", "Han", "Hiragana", "Katakana", "Hangul"),
)


@dataclass(frozen=True, kw_only=True)
class TokenClass:
    """Tokens whose whole text matches a pattern."""

    description: str
    pattern: str
    """A pattern of the `regex` package, for texts from `text_of`."""
    spaced: bool = True
    """Whether whitespace may precede and follow, as in byte-level pieces: ");" with a line feed is punctuation."""


CLASSES: dict[str, TokenClass] = {
    "digits": TokenClass(description="decimal digits: 7, 2026", pattern=r"\p{Nd}+"),
    "letters": TokenClass(description="letters only, of any script and case", pattern=r"\p{L}[\p{L}\p{M}]*"),
    "lowercase": TokenClass(description="lowercase letters only: the, def", pattern=r"\p{Ll}[\p{Ll}\p{M}]*"),
    "capitalized": TokenClass(description="a capital, then lowercase letters: The", pattern=r"\p{Lu}[\p{Ll}\p{M}]+"),
    "uppercase": TokenClass(description="capitals only: I, HTTP", pattern=r"\p{Lu}[\p{Lu}\p{M}]*"),
    "mixed-case": TokenClass(
        description="other mixtures of lowercase letters and capitals: getName",
        pattern=r"(?!\p{Lu}[\p{Ll}\p{M}]+$)(?=.*\p{Lu})(?=.*\p{Ll})\p{L}[\p{L}\p{M}]*",
    ),
    "punctuation": TokenClass(description="punctuation marks and symbols: , ); +=", pattern=r"[\p{P}\p{S}]+"),
    "symbols": TokenClass(
        description="symbols only, such as mathematical or currency symbols: + = $", pattern=r"\p{S}+"
    ),
    "whitespace": TokenClass(description="spaces, tabs and line feeds only", pattern=r"\s+", spaced=False),
    "newlines": TokenClass(description="whitespace with a line feed in it", pattern=r"\s*\n\s*", spaced=False),
    "keywords": TokenClass(
        description="keywords of Python, C, C++, Java, JavaScript, Go or Rust, in any text: for, return, struct",
        pattern=_KEYWORDS,
    ),
    "word-initial": TokenClass(description="a space, then a letter: ▁the", pattern=r" +\p{L}.*", spaced=False),
    "continuation": TokenClass(
        description="a letter without a space before it: ing, or a word at the start of a line",
        pattern=r"\p{L}.*",
        spaced=False,
    ),
    "bytes": TokenClass(description="single bytes of a multi-byte character: <0xE2>", pattern=r"[\uDC80-\uDCFF]+"),
    **{
        name.lower(): TokenClass(
            description=f"letters of the script {name}", pattern=rf"(?=\p{{L}})[\p{{Script={name}}}\p{{M}}]+"
        )
        for name in SCRIPTS
    },
}
"""By name; a token may be in several."""

SAID = {
    "letters": "words",
    "lowercase": "lowercase words",
    "capitalized": "capitalized words",
    "uppercase": "words in capitals",
    "mixed-case": "mixed-case words",
    "word-initial": "beginnings of words",
    "continuation": "continuations of words",
    **{name.lower(): f"{name} letters" for name in SCRIPTS},
}
"""The name of a class in a sentence, if it differs from its key."""


def text_of(piece: str) -> str:
    """A piece as text: ▁ is a space, <0x0A> a line feed.

    A single byte of a multi-byte character is decoded as by Python's "surrogateescape": <0xE2> is U+DCE2.
    """
    return str(_BYTE.sub(lambda found: _byte(int(found[1], 16)), piece)).replace("▁", " ")


def _byte(value: int) -> str:
    return chr(value) if value < 128 else chr(0xDC00 + value)


def members_of(which: str, pieces: Iterable[str]) -> NDArray[np.bool_]:
    r"""Which tokens of a vocabulary are in a class.

    Parameters
    ----------
    which : str
        A name in `CLASSES`, or a regular expression between slashes, which is searched anywhere in a token's text:
        `/\d/` for a digit in it, `/^ ?[A-Z]/` for a capital at its start.
    pieces : iterable of str
        The pieces of the vocabulary or of a part of it, as in a capture's `piece`.

    Returns
    -------
    ndarray of bool, shape (token_id)
        In the order of the pieces.

    Raises
    ------
    ValueError
        When there is no class of this name; when the regular expression is invalid, has counts in braces that multiply
        to more than `COPIES`, or does not finish in `PATIENCE_S`.
    """
    return members_by_class([which], pieces)[which]


def members_by_class(classes: Iterable[str], pieces: Iterable[str]) -> dict[str, NDArray[np.bool_]]:
    """The same for several classes, by name; the pieces are read once."""
    texts = list(map(text_of, pieces))
    return {which: _members(which, texts) for which in classes}


def _members(which: str, texts: Sequence[str]) -> NDArray[np.bool_]:
    fits = compiled(which)
    if not is_expression(which):
        return np.array([fits.fullmatch(text) is not None for text in texts], dtype=np.bool_)
    end = time.monotonic() + PATIENCE_S
    try:
        found = [fits.search(text, timeout=max(0.0, end - time.monotonic())) is not None for text in texts]
    except TimeoutError:
        raise ValueError(f"{which}: matching takes more than {PATIENCE_S:g} s; simplify the expression") from None
    return np.array(found, dtype=np.bool_)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Groups of tokens that are in the same classes: a token in five classes is counted once."""

    names: tuple[str, ...]
    """The names of the classes."""
    belongs: NDArray[np.bool_]
    """Whether a group belongs to a class, (group, class)."""
    of_token: NDArray[np.int32]
    """Each token's group, (token_id)."""

    def of_classes(self, by_group: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sums by class (..., class), from sums by group (..., group)."""
        return by_group @ self.belongs.astype(np.int64)


def groups_of(members: Mapping[str, NDArray[np.bool_]]) -> Groups:
    """The groups formed by some classes.

    Raises
    ------
    ValueError
        When there is no class.
    """
    if not members:
        raise ValueError("no token class to count: name at least one")
    belongs, group = np.unique(np.stack([*members.values()], 1), axis=0, return_inverse=True)
    return Groups(names=tuple(members), belongs=belongs, of_token=group.astype(np.int32))


def compiled(which: str) -> regex.Pattern[str]:
    """The pattern of a class or of a regular expression between slashes; raises like `members_of`."""
    if is_expression(which):
        copies = math.prod(max(1, int(count)) for count in _COUNT.findall(which))
        if copies > COPIES:  # {1000} inside {1000} makes a million copies and takes gigabytes
            raise ValueError(f"{which:.80}: its counts in braces multiply to {copies:,}; the limit is {COPIES:,}")
        try:
            return regex.compile(which[1:-1])
        except regex.error as error:
            raise ValueError(f"{which} is not a regular expression: {error}") from None
    if which not in CLASSES:
        raise ValueError(
            f"unknown token class {which!r}: choose from {', '.join(CLASSES)}, or a regular expression between"
            r" slashes, such as /\d+/"
        )
    own = CLASSES[which]
    return regex.compile(rf"\s*(?:{own.pattern})\s*" if own.spaced else own.pattern, regex.DOTALL)


def is_expression(which: str) -> bool:
    """Whether it is a regular expression between slashes."""
    return len(which) > 1 and which.startswith("/") and which.endswith("/")
