"""What a data set is to the rest of the project: a name, an identity and documents in a fixed order.

It promises that every text handed on is valid Unicode, and says of each document whether something had to be
replaced for that. It does not know where documents come from; `jobs/sources/resolve.py` finds that out.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

TextIdentity = Mapping[str, str | int | None]
"""What makes two texts the same: a content hash or a resolved revision, and how documents are cut."""

LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of a data set. An empty one is a document too: it has a name and no tokens."""

    name: str
    """Title, path or id; valid Unicode."""
    text: str = ""
    """Valid Unicode: what was not has become U+FFFD."""
    messages: list[dict[str, str]] | None = None
    """Instead of `text`, a conversation: `role` and `content` of each message."""
    repaired: bool = False
    """Whether something in the text or the messages was replaced by U+FFFD."""

    @property
    def characters(self) -> int:
        """Length of the text, or of what the messages say."""
        return len(self.text) + sum(len(message["content"]) for message in self.messages or ())


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set that was found and can be read, as often as needed, always in the same order."""

    name: str
    """The default name of its group in the store, of `[a-z0-9._-]`."""
    read: Callable[[int], Iterator[Document]]
    """Documents from the given one on."""
    identify: Callable[[], TextIdentity]
    """Computes the identity; for local files that reads all their bytes."""
    conversations: bool = False
    """Whether its documents are conversations; never some of them."""
    note: str | None = None
    """What is logged before planning, such as files left out."""
    published_documents: int | None = None
    """How many documents its makers say it has; None if they do not say."""

    @cached_property
    def identity(self) -> TextIdentity:
        """The identity, computed when first asked for."""
        return self.identify()

    def documents(self, start: int = 0) -> Iterator[Document]:
        """Yield the documents in their fixed order, without the first `start`."""
        return self.read(start)


def decode(data: bytes) -> tuple[str, bool]:
    """Decode UTF-8; invalid bytes become U+FFFD, and the second value says whether there were any."""
    try:
        return data.decode("utf-8"), False
    except UnicodeDecodeError:
        return data.decode("utf-8", errors="replace"), True


def without_surrogates(text: str) -> tuple[str, bool]:
    """Replace each lone surrogate by U+FFFD; the second value says whether there were any."""
    clean, replaced = LONE_SURROGATE.subn("\ufffd", text)
    return clean, replaced > 0
