"""Conversations in common forms: messages, ShareGPT's turns, and pairs of a prompt and its completion."""

from collections.abc import Iterable, Mapping
from typing import Any

from jobs.sources.documents import Document, repaired_strings
from store.records import parse_json

MESSAGES, TURNS = "messages", "turns"
"""Kinds of columns: lists of objects with `role` and `content`, and with ShareGPT's `from` and `value`."""
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
"""Columns that form a conversation together: the user's text and the assistant's answer."""
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    **dict.fromkeys(("observation", "function_response", "function-response", "tool_response"), "tool"),
    **{role: role for role in ("user", "assistant", "system", "tool")},
}
"""Speaker in ShareGPT's turns → role in a chat template."""
CALLERS = ("function_call", "function-call", "tool_call")
"""Speakers whose turns are calls of the assistant, as JSON text."""


def kind_of_list(keys: Iterable[Iterable[str]]) -> str | None:
    """Return the kind of a list of objects with these keys, None if they are not messages."""
    objects = [set(names) for names in keys]
    if objects and all("role" in names for names in objects):
        return MESSAGES
    return TURNS if objects and all({"from", "value"} <= names for names in objects) else None


def as_message(turn: Any, where: str) -> dict[str, Any]:
    """Return one of ShareGPT's turns as a message; fields other than `from` and `value` are kept.

    Raises
    ------
    ValueError
        When it is not a turn, or its speaker is unknown; the message names the speaker.
    """
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        raise ValueError(f"{where}: not an object with from and value: {turn!r:.80}")
    others = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if turn["from"] in CALLERS:
        return {"role": "assistant", "tool_calls": tool_calls(turn.get("value"), where), **others}
    if turn["from"] not in SPEAKERS:
        known = ", ".join((*SPEAKERS, *CALLERS))
        raise ValueError(f"{where}: unknown speaker {turn['from']!r}; use one of {known}")
    return {"role": SPEAKERS[turn["from"]], "content": turn.get("value"), **others}


def tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls in one of ShareGPT's turns, an object or a list of them in JSON, in the form that chat templates
    expect.

    Raises
    ------
    ValueError
        When it holds anything other than names and arguments.
    """
    found = from_json(value)
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and call.keys() == {"name", "arguments"} for call in calls):
        raise ValueError(
            f'{where}: a call must be {{"name": ..., "arguments": ...}} in JSON, or a list of them: {value!r:.80}'
        )
    functions = [{"name": call["name"], "arguments": from_json(call["arguments"])} for call in calls]
    return [{"type": "function", "function": function} for function in functions]


def conversation(value: list[Any], beside: Mapping[str, Any], *, name: str, where: str, repaired: bool) -> Document:
    """Make a document from a list of messages with all their fields, and from the columns next to them."""
    messages = []
    for number, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}, message {number}: not an object with a role and content: {message!r:.80}")
        if message.get("function_call") is not None:
            raise ValueError(
                f"{where}, message {number}: holds a function_call; chat templates read tool_calls instead"
            )
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
    """Parse a list that a column holds as JSON text, as columns of a single type must; other values are unchanged."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:  # reported as not a list of objects when the conversation is rendered
        return value
