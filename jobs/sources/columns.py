"""Rows with columns, and the documents in one of their columns.

Only the text column and the one that names documents are read. It does not know in which format rows are kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.sources.documents import Document, repaired_strings, without_surrogates
from store.records import parse_json

NAME_COLUMNS = ("id", "title", "name", "url", "path")
"""Columns that name a document, the best first."""
BESIDE_MESSAGES = ("tools", "documents")
"""Columns that a chat template takes beside the messages."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row: its values by column, where it stands (for names and errors), whether bytes were replaced."""

    place: str
    values: Mapping[str, Any]
    repaired: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows in a fixed order; `columns` maps each name to "text", "messages" or the type's own name."""

    columns: Mapping[str, str]
    rows: Callable[[int, Sequence[str]], Iterator[TableRow]]
    """Rows from the given one on, with the given columns."""


def text_column(table: Table, asked: str | None, where: str) -> str:
    """Return the column that holds the documents: `asked`, else `text`, else the only plausible one.

    Raises
    ------
    ValueError
        When `asked` is no column, or several columns could be meant; it lists them.
    """
    listed = ", ".join(f"{name} ({kind})" for name, kind in table.columns.items()) or "none"
    if asked is not None:
        if asked not in table.columns:
            raise ValueError(f"{where} has no column {asked!r}; its columns: {listed}")
        return asked
    if "text" in table.columns:
        return "text"
    texts = [name for name, kind in table.columns.items() if kind == "text"]
    conversations = [name for name, kind in table.columns.items() if kind == "messages"]
    if conversations:  # a naming column beside them is not what one would capture
        texts = [name for name in texts if name not in NAME_COLUMNS]
    if len(texts + conversations) != 1:
        raise ValueError(
            f"{where} has {len(texts + conversations)} columns that could be the text; "
            f"choose one with --text_field. Its columns: {listed}"
        )
    return (texts + conversations)[0]


def table_documents(table: Table, field: str, start: int) -> Iterator[Document]:
    """Yield one document a row, from row `start` on; a null is an empty document."""
    name_column = next((name for name in NAME_COLUMNS if name in table.columns and name != field), None)
    kind = table.columns[field]
    wanted = [field] if name_column is None else [field, name_column]
    beside = [name for name in BESIDE_MESSAGES if kind == "messages" and name in table.columns]
    for row in table.rows(start, [*wanted, *beside]):
        label = row.values.get(name_column) if name_column is not None else None
        name, _ = without_surrogates(row.place if label is None or label == "" else str(label))
        value = row.values.get(field)
        if value is None and kind == "messages":
            value = []
        if isinstance(value, list) != (kind == "messages") and value is not None:
            raise ValueError(f"{row.place}: column {field!r} holds {type(value).__name__}, in a column of {kind}")
        if isinstance(value, list):
            extra = {column: row.values.get(column) for column in beside}
            yield conversation(value, extra, name=name, where=f"{row.place}: column {field!r}", repaired=row.repaired)
            continue
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{row.place}: column {field!r} holds {type(value).__name__}, not text: {value!r:.80}")
        text, replaced = without_surrogates(value or "")
        yield Document(name=name, text=text, repaired=row.repaired or replaced)


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
