"""Conversations as people keep them: messages, ShareGPT's turns, and pairs of a prompt and its completion."""

from collections.abc import Iterable, Mapping
from typing import Any

from jobs.sources.documents import Document, repaired_strings
from store.records import parse_json

MESSAGES, TURNS = "messages", "turns"
"""Kinds of columns: lists of objects with `role` and `content`, and with ShareGPT's `from` and `value`."""
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
"""Columns that together are a conversation: what a user says, and what the assistant answers."""
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    **{role: role for role in ("user", "assistant", "system", "tool")},
}
"""Who speaks in ShareGPT's turns → the role that a chat template knows."""


def kind_of_list(keys: Iterable[Iterable[str]]) -> str | None:
    """Return the kind of a list of objects with these keys, None where they are no messages."""
    objects = [set(names) for names in keys]
    if objects and all("role" in names for names in objects):
        return MESSAGES
    return TURNS if objects and all({"from", "value"} <= names for names in objects) else None


def as_message(turn: Any, where: str) -> dict[str, Any]:
    """Return one of ShareGPT's turns as a message; fields beside `from` and `value` stay.

    Raises
    ------
    ValueError
        When it is no turn, or its speaker is unknown; it names the speaker.
    """
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        raise ValueError(f"{where}: not an object with from and value: {turn!r:.80}")
    if turn["from"] not in SPEAKERS:
        raise ValueError(
            f"{where}: the speaker {turn['from']!r} is none of {', '.join(SPEAKERS)}; give it one of these names"
        )
    others = {key: item for key, item in turn.items() if key not in ("from", "value")}
    return {"role": SPEAKERS[turn["from"]], "content": turn.get("value"), **others}


def conversation(value: list[Any], beside: Mapping[str, Any], *, name: str, where: str, repaired: bool) -> Document:
    """Make a document of a list of messages, all that they hold, and what stands in the columns beside them."""
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}, message {number}: not an object with a role and content: {message!r:.80}")
        content = message.get("content")
        parts = content if isinstance(content, list) else ()
        if not isinstance(content, str | list | dict | None) or not all(isinstance(part, dict) for part in parts):
            kind = type(content).__name__
            raise ValueError(f"{where}, message {number}: content is {kind}, not text or a list of objects")
        clean, replaced = repaired_strings({key: item for key, item in message.items() if item is not None})
        messages.append(clean)
        repaired = repaired or replaced
    given, replaced = repaired_strings({key: from_json(item) for key, item in beside.items()})
    return Document(name=name, messages=messages, repaired=repaired or replaced, **given)


def from_json(value: Any) -> Any:
    """Read a list that a column holds as JSON text, as columns of one type must; all else stays."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:  # told as no list of objects, where the conversation is rendered
        return value
