"""Classes of tokens, by how their pieces read: digits, letters by case, punctuation, scripts, any regular expression.

Promises: a class is a pattern that the whole text of a piece fits, so that whoever asks for it means the same tokens.
Does not know where a token stands: a word that begins a line has no space before it, and looks like the rest of one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import regex
from numpy.typing import NDArray

COPIES = 10_000  # of a part of a regular expression, which all counts in braces make in memory (arbitrary)
PATIENCE_S = 20.0  # for all pieces: a reader's regular expression may take years for one of them (arbitrary)

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
    """Tokens whose text, from its beginning to its end, fits a pattern."""

    description: str
    pattern: str
    """Of the `regex` package, over texts as `text_of` gives them."""
    spaced: bool = True
    """Whitespace may stand before and behind, as in byte-level pieces: ");" with a line feed is punctuation."""


CLASSES: dict[str, TokenClass] = {
    "digits": TokenClass(description="decimal digits: 7, 2026", pattern=r"\p{Nd}+"),
    "letters": TokenClass(description="letters only, of any script and case", pattern=r"\p{L}[\p{L}\p{M}]*"),
    "lowercase": TokenClass(description="small letters only: the, def", pattern=r"\p{Ll}[\p{Ll}\p{M}]*"),
    "capitalized": TokenClass(description="a capital, then small letters: The", pattern=r"\p{Lu}[\p{Ll}\p{M}]+"),
    "uppercase": TokenClass(description="capitals only: I, HTTP", pattern=r"\p{Lu}[\p{Lu}\p{M}]*"),
    "mixed-case": TokenClass(
        description="small letters and capitals otherwise: getName",
        pattern=r"(?!\p{Lu}[\p{Ll}\p{M}]+$)(?=.*\p{Lu})(?=.*\p{Ll})\p{L}[\p{L}\p{M}]*",
    ),
    "punctuation": TokenClass(description="punctuation marks and symbols: , ); +=", pattern=r"[\p{P}\p{S}]+"),
    "symbols": TokenClass(description="symbols only, of mathematics, currencies and others: + = $", pattern=r"\p{S}+"),
    "whitespace": TokenClass(description="spaces, tabs and line feeds only", pattern=r"\s+", spaced=False),
    "newlines": TokenClass(description="whitespace with a line feed in it", pattern=r"\s*\n\s*", spaced=False),
    "keywords": TokenClass(
        description="keywords of Python, C, C++, Java, JavaScript, Go or Rust, in any text: for, return, struct",
        pattern=_KEYWORDS,
    ),
    "word-initial": TokenClass(description="a space, then a letter: ▁the", pattern=r" +\p{L}.*", spaced=False),
    "continuation": TokenClass(
        description="a letter with no space before it: ing, or a word that begins a line",
        pattern=r"\p{L}.*",
        spaced=False,
    ),
    "bytes": TokenClass(description="bytes of a character that takes several: <0xE2>", pattern=r"[\uDC80-\uDCFF]+"),
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
    "mixed-case": "words of mixed case",
    "word-initial": "beginnings of words",
    "continuation": "rests of words",
    **{name.lower(): f"{name} letters" for name in SCRIPTS},
}
"""What a class is called in a sentence, where it is not its name."""


def text_of(piece: str) -> str:
    """A piece as it stands in a text: ▁ is a space, <0x0A> a line feed.

    A byte of a character that takes several is what Python's "surrogateescape" makes of it: <0xE2> is U+DCE2.
    """
    return str(_BYTE.sub(lambda found: _byte(int(found[1], 16)), piece)).replace("▁", " ")


def _byte(value: int) -> str:
    return chr(value) if value < 128 else chr(0xDC00 + value)


def members_of(which: str, pieces: Iterable[str]) -> NDArray[np.bool_]:
    r"""Which tokens of a vocabulary are in a class.

    Parameters
    ----------
    which : str
        A name of `CLASSES`, or a regular expression between slashes, which is looked for anywhere in a token's text:
        `/\d/` for a digit in it, `/^ ?[A-Z]/` for a capital at its beginning.
    pieces : iterable of str
        Those of the vocabulary, or of a part of it, as a capture's `piece` has them.

    Returns
    -------
    ndarray of bool, shape (token_id)
        In the order of the pieces.

    Raises
    ------
    ValueError
        When there is no class of this name; when the regular expression is none, has counts in braces that make more
        than `COPIES` together, or does not end in `PATIENCE_S`.
    """
    return members_by_class([which], pieces)[which]


def members_by_class(classes: Iterable[str], pieces: Iterable[str]) -> dict[str, NDArray[np.bool_]]:
    """The same of several classes, by their names; the pieces are read once."""
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
        raise ValueError(f"{which}: it takes more than {PATIENCE_S:g} s; write it in another way") from None
    return np.array(found, dtype=np.bool_)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Tokens that are in the same classes, counted together: a token in five classes is counted once."""

    names: tuple[str, ...]
    """Of the classes."""
    belongs: NDArray[np.bool_]
    """Which group is in which class, (group, class)."""
    of_token: NDArray[np.int32]
    """Each token's group, (token_id)."""

    def of_classes(self, by_group: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sums by class (..., class), of sums by group (..., group)."""
        return by_group @ self.belongs.astype(np.int64)


def groups_of(members: Mapping[str, NDArray[np.bool_]]) -> Groups:
    """The groups that some classes make.

    Raises
    ------
    ValueError
        When there is no class.
    """
    if not members:
        raise ValueError("there is no class of tokens to count: name one")
    belongs, group = np.unique(np.stack([*members.values()], 1), axis=0, return_inverse=True)
    return Groups(names=tuple(members), belongs=belongs, of_token=group.astype(np.int32))


def compiled(which: str) -> regex.Pattern[str]:
    """The pattern of a class or of a regular expression between slashes; errors as `members_of`."""
    if is_expression(which):
        copies = math.prod(max(1, int(count)) for count in _COUNT.findall(which))
        if copies > COPIES:  # of {1000} in {1000} the package makes a million, and takes gigabytes
            raise ValueError(f"{which:.80}: its counts in braces make {copies:,} together; give at most {COPIES:,}")
        try:
            return regex.compile(which[1:-1])
        except regex.error as error:
            raise ValueError(f"{which} is not a regular expression: {error}") from None
    if which not in CLASSES:
        raise ValueError(
            f"no class of tokens is called {which!r}; there are {', '.join(CLASSES)}, and regular expressions between"
            r" slashes, such as /\d+/"
        )
    own = CLASSES[which]
    return regex.compile(rf"\s*(?:{own.pattern})\s*" if own.spaced else own.pattern, regex.DOTALL)


def is_expression(which: str) -> bool:
    """Whether it is a regular expression between slashes."""
    return len(which) > 1 and which.startswith("/") and which.endswith("/")
