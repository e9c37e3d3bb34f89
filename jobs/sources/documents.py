"""Data sets as the rest of the project sees them: a name, an identity and documents in a fixed order.

Promises: every text is valid Unicode, and each document says whether something was replaced for that. Does not know
where documents come from: see `jobs/sources/resolve.py`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

TextIdentity = Mapping[str, str | int | None]
"""The identity of a text: a content hash or a resolved revision, and how documents are split."""

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of a data set. An empty one is also a document: it has a name and no tokens."""

    name: str
    """Title, path or id; valid Unicode."""
    text: str = ""
    """Valid Unicode: invalid parts are replaced by U+FFFD."""
    messages: list[dict[str, Any]] | None = None
    """Instead of `text`, a conversation: for each message, `role` and all other fields that are not null."""
    tools: Any = None
    """The tools that a conversation may use; None if there are none."""
    documents: Any = None
    """The documents that a conversation refers to; None if there are none."""
    repaired: bool = False
    """Whether something in the text or the messages was replaced by U+FFFD."""
    fault: str | None = None
    """Why it has no text, or cannot be rendered: such a document stops a capture, or is skipped."""

    @property
    def characters(self) -> int:
        """Length of the text, or of the messages."""
        return len(self.text) + sum(map(_characters, (self.messages, self.tools, self.documents)))


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set that can be read repeatedly, always in the same order."""

    name: str
    """The default name of its group in the store, of `[a-z0-9._-]`."""
    read: Callable[[int], Iterator[Document]]
    """Documents from the given one on, including those with a fault."""
    identify: Callable[[], TextIdentity]
    """Computes the identity; for local files this reads all bytes."""
    conversations: bool = False
    """Whether its documents are conversations: all of them or none."""
    note: str | None = None
    """What is logged before planning, such as files left out."""
    published_documents: int | None = None
    """The published number of documents; None if there is none."""

    @cached_property
    def identity(self) -> TextIdentity:
        """The identity, computed at the first access."""
        return self.identify()

    def documents(self, start: int = 0, *, faulty: bool = False) -> Iterator[Document]:
        """Yield the documents in their fixed order, without the first `start`.

        Raises
        ------
        ValueError
            At a document with a fault, unless `faulty` is set.
        """
        for document in self.read(start):
            if document.fault is not None and not faulty:
                raise ValueError(document.fault)
            yield document


def decode(data: bytes) -> tuple[str, bool]:
    """Decode UTF-8; invalid bytes become U+FFFD, and the second value says whether there were any."""
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace"), True


def _characters(value: Any) -> int:
    """Characters of the strings in a value."""
    if isinstance(value, str):
        return len(value)
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_characters, values))


def repaired_strings(value: Any) -> tuple[Any, bool]:
    """Replace lone surrogates in all strings of a JSON value; the second value says whether there were any."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, Mapping):
        keys, values = repaired_strings(list(value)), repaired_strings(list(value.values()))
        return dict(zip(keys[0], values[0], strict=True)), keys[1] or values[1]
    if isinstance(value, list | tuple):
        items = [repaired_strings(item) for item in value]
        return [item for item, _ in items], any(replaced for _, replaced in items)
    return value, False


def without_surrogates(text: str) -> tuple[str, bool]:
    """Replace each lone surrogate by U+FFFD; the second value says whether there were any."""
    clean, replaced = LONE_SURROGATE.subn("\ufffd", text)
    return clean, replaced > 0
