"""
Find the speaker of each character of a rendered conversation.

A chat template is a program, and it may move, strip, divide or leave out what messages say. To find the origin of its
text, it is run a second time on a conversation whose strings are spelled with stand-ins: characters that occur nowhere
else, different ones for each string. If both texts are the same after replacing the stand-ins, each stand-in shows from
which string its character comes. Length, white space, equality of names and order within a string are preserved.

Some templates search in strings (`'</think>' in content`) or write them as JSON, and then behave differently with
stand-ins. So if the first try fails, the texts that they search for and the characters that JSON escapes keep their own
spelling; see `SPELLINGS`.

Promises, for every character: it belongs to a message if it is a character of one of the message's strings; if it lies
between two such characters as in the string itself; or if it is part of JSON made from the message's lists and objects
(`tojson`), including brackets, keys and numbers. Everything else belongs to the template: markup, numbers outside such
JSON, and the strings of tools and documents, which are not part of a message. If several messages share a name (`id`,
`name`), the first message's role counts.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from workers.text import Unrenderable

ROLES = ("system", "user", "assistant", "tool", "template")
"""The writers of tokens; `template` is text that the chat template itself adds."""
SPEAKERS = {role: role for role in ROLES[:-1]} | {
    "developer": "system",
    "model": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
"""The roles that messages may have, and which of `ROLES` each counts as."""

Conversation = Mapping[str, Any]
"""`messages`, and optionally `tools` and `documents`, as for `apply_chat_template`."""

_TEMPLATE = ROLES.index("template")
_STAND_INS = range(0x20000, 0x110000)  # the first are ideographs, which Python's repr() does not escape
_ESCAPED = r'["\\\x00-\x1f]'
_LITERAL = r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_LOOKED_FOR = re.compile(
    rf"(?:[.|]\s*\w+\(|=|\bin\b)\s*{_LITERAL}|{_LITERAL}\s*(?:[!=]=|\bin\b|\bnot\s+in\b)", re.DOTALL
)


class Spelling(NamedTuple):
    """Texts that keep their own spelling instead of stand-ins."""

    escaped: bool = False
    """What JSON escapes."""
    looked_for: bool = False
    """Strings that the template searches for, except special tokens."""
    special: bool = False
    """Special tokens among these strings too, and keys, which may be sorted; equal names are spelled equally."""


SPELLINGS = (Spelling(), Spelling(True), Spelling(True, True), Spelling(True, True, True))
"""Tried in this order; the first with which the template writes the same text is used."""


class Speakers:
    """
    Finds the speakers for one chat template.

    Parameters
    ----------
    template
        The template's text.
    special
        The special tokens of the model.
    """

    def __init__(self, template: str, special: Sequence[str]) -> None:
        found = (a or b for a, b in _LOOKED_FOR.findall(template))
        looked_for = {_unquoted(literal).strip() for literal in found} - {""}
        self._special = _any_of(special)
        words = {word for word in looked_for if not self._special.search(word)}
        as_it_is = _any_of(()), _any_of((), _ESCAPED), _any_of(words, _ESCAPED), _any_of(looked_for, _ESCAPED)
        self._as_it_is = dict(zip(SPELLINGS, as_it_is, strict=True))

    def roles(
        self, conversation: Conversation, plain: str, render: Callable[[Conversation], str]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """
        Find the speaker of each character of a rendered conversation.

        Parameters
        ----------
        conversation
            Messages with roles of `SPEAKERS`.
        plain
            The conversation as rendered by `render`.
        render
            Applies the template.

        Returns
        -------
        roles
            (character) uint8, index into `ROLES`.
        given
            (character) whether it comes from the conversation, including tools and documents.

        Raises
        ------
        Unrenderable
            The template rewrites messages, so the speakers cannot be determined; or a key, which is not replaced, holds
            a special token.
        """
        told = self._told(conversation, plain, render, None)
        if told is not None:
            return told
        fields = [(n, field) for n, message in enumerate(conversation["messages"]) for field in message]
        number, field = next((f for f in fields if self._told(conversation, plain, render, f) is None), (None, None))
        where = "" if number is None else f" (message {number}, {field!r})"
        raise Unrenderable(
            f"the chat template rewrites messages{where}, so that tokens cannot be given roles: "
            "encode the messages' text without it"
        )

    def _told(
        self,
        conversation: Conversation,
        plain: str,
        render: Callable[[Conversation], str],
        only: tuple[int, str] | None,
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
        """Try the spellings; with `only`, those of one field of one message."""
        for spelling in SPELLINGS:
            copy = _Copy(conversation, set(plain), spelling, self._as_it_is[spelling], self._special, only)
            try:
                shown = render(copy.conversation)
            except Unrenderable:
                continue
            if shown.translate(copy.meant) == plain:
                return copy.origins(shown, plain)
        return None


class _Copy:
    """A conversation spelled with stand-ins, and what they stand for."""

    def __init__(
        self,
        conversation: Conversation,
        taken: set[str],
        spelling: Spelling,
        as_it_is: re.Pattern[str],
        special: re.Pattern[str],
        only: tuple[int, str] | None = None,
    ) -> None:
        self._free = (code for code in _STAND_INS if chr(code) not in taken)
        self._spelling, self._as_it_is, self._special = spelling, as_it_is, special
        self._equal: dict[str, str] = {}
        self._strings: list[tuple[int, str]] = []
        """Role and text of each string, and of each list and object."""
        self._whole: list[tuple[str, int]] = []
        """Text that belongs to a message if it is written like this, and the number of its string."""
        self._string_of: dict[int, int] = {}
        self.meant: dict[int, str] = {}
        self.conversation = {**conversation, "messages": list(conversation["messages"])}
        for number, message in enumerate(conversation["messages"]):
            role = ROLES.index(SPEAKERS[message["role"]])
            chosen = [field for field in message if only is None or only == (number, field)]
            spelled = {field: self._spelled(message[field], role, field) for field in chosen}
            self.conversation["messages"][number] = {**message, **spelled}
        for name in conversation.keys() - {"messages"} if only is None else ():
            self.conversation[name] = self._spelled(conversation[name], _TEMPLATE)

    def _spelled(self, value: Any, role: int, key: str = "", *, data: bool = False) -> Any:
        """Spell a value; `data` means the arguments of a call, whose keys are not part of the format."""
        if isinstance(value, str):
            equal = key in ("id", "tool_call_id") or (key == "name" and self._spelling.special)
            return self._kept(value) if key in ("role", "type") and not data else self._text(value, role, equal=equal)
        if isinstance(value, list | tuple):
            spelled: Any = [self._spelled(item, role, key, data=data) for item in value]
        elif isinstance(value, Mapping):
            spelled = {}
            for name, item in value.items():
                shown = self._text(name, role) if data and not self._spelling.special else self._kept(name)
                spelled[shown] = self._spelled(item, role, name, data=data or name == "arguments")
        else:
            return value
        written = json.dumps(spelled, ensure_ascii=False, default=str)
        if role != _TEMPLATE and written.translate(self.meant) != written:
            self._strings.append((role, ""))
            self._whole.append((written, len(self._strings) - 1))
        return spelled

    def _kept(self, text: str) -> str:
        if self._special.search(text):
            raise Unrenderable(f"{text!r} is a key or a type, and holds a special token")
        return text

    def _text(self, text: str, role: int, *, equal: bool = False) -> str:
        """Spell one string: each of its characters except white space has a stand-in."""
        if equal and text in self._equal:
            return self._equal[text]
        number = len(self._strings)
        self._strings.append((role, text))
        pieces = self._as_it_is.split(text)  # odd places keep their own spelling
        nothing_left = not any(map(str.strip, pieces[::2]))  # to show where it is
        if nothing_left and (not self._spelling.special or self._special.search(text)):
            pieces = [text]
        characters = sorted({character for character in "".join(pieces[::2]) if not character.isspace()})
        stand_ins = list(islice(self._free, len(characters)))
        if len(stand_ins) < len(characters):
            raise Unrenderable("the conversation holds more different characters than can be distinguished")
        self.meant |= zip(stand_ins, characters, strict=True)
        self._string_of |= dict.fromkeys(stand_ins, number)
        table = {ord(character): code for character, code in zip(characters, stand_ins, strict=True)}
        pieces[::2] = [piece.translate(table) for piece in pieces[::2]]
        spelled = "".join(pieces)
        if len(pieces) > 1 and stand_ins:  # its ends may keep their own spelling
            self._whole += [(spelled.strip(), number), (_escaped(spelled.strip()), number)]
        if equal:
            self._equal[text] = spelled
        return spelled

    def origins(self, shown: str, plain: str) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Find the speaker, if any, of each character of the text that the template made from the copy."""
        table = np.full(max(self._string_of, default=_STAND_INS.start) - _STAND_INS.start + 2, -1, dtype=np.int64)
        table[np.array(list(self._string_of), dtype=np.int64) - _STAND_INS.start] = list(self._string_of.values())
        places = codes(shown).astype(np.int64) - _STAND_INS.start
        string = table[np.where((places >= 0) & (places < len(table)), places, -1)]  # the last belongs to no string
        known = np.flatnonzero(string >= 0)
        same = (np.diff(known) > 1) & (np.diff(string[known]) == 0)
        for start, end in zip((known[:-1][same] + 1).tolist(), known[1:][same].tolist(), strict=True):
            if self._holds(int(string[end]), plain[start:end]):
                string[start:end] = string[end]
        for written, number in self._whole:
            for start in _occurrences(written, shown):
                span = string[start : start + len(written)]
                span[span < 0] = number
        roles = np.array([role for role, _ in self._strings] + [_TEMPLATE], dtype=np.uint8)
        return roles[string], string >= 0

    def _holds(self, number: int, between: str) -> bool:
        """Whether a string holds this text, unchanged or as in JSON."""
        text = self._strings[number][1]
        return between in text or between in _escaped(text)


def codes(text: str) -> NDArray[np.uint32]:
    """Return the code point of each character."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def _any_of(words: Iterable[str], pattern: str = "(?!)") -> re.Pattern[str]:
    """Compile a pattern, of one group, that finds the longest of some words, or another pattern."""
    return re.compile("(" + "|".join([*map(re.escape, sorted(words, key=len, reverse=True)), pattern]) + ")")


def _unquoted(literal: str) -> str:
    """Return the value of a string literal in a template."""
    try:
        return str(ast.literal_eval(literal))
    except (SyntaxError, ValueError):
        return literal[1:-1]


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _occurrences(part: str, whole: str) -> Iterator[int]:
    start = whole.find(part)
    while start >= 0:
        yield start
        start = whole.find(part, start + len(part))
