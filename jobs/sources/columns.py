"""Rows with columns, and the documents in one of their columns, or in the two of a prompt and its completion.

Only the columns of the text and the one that names documents are read. Does not know the format of the rows.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.sources.conversations import MESSAGES, PAIRS, TURNS, as_message, conversation
from jobs.sources.documents import Document, without_surrogates

NAME_COLUMNS = ("id", "title", "name", "url", "path")
"""Columns that name a document, the best first."""
NAMING_WORDS = {
    *("id", "ids", "uid", "uuid", "guid", "idx", "index", "key", "number", "no", "row", "doi"),
    *("sha", "sha1", "sha256", "md5", "hash", "digest", "checksum", "version", "revision", "commit"),
    *("url", "urls", "uri", "link", "links", "href", "domain", "host", "repo", "repository"),
    *("path", "filepath", "file", "filename", "dir", "folder", "extension", "ext", "mime", "mimetype"),
    *("title", "name", "source", "src", "origin", "dataset", "split", "subset", "config", "author", "model"),
    *("date", "datetime", "time", "timestamp", "created", "updated", "at", "year"),
    *("lang", "language", "locale", "license", "licence", "label", "category", "type", "tag"),
    *("encoding", "charset"),
}
"""A column whose name ends in one of these words names, links, numbers or sorts rows; it is not their text."""
CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns of messages that take precedence over all others."""
BESIDE_MESSAGES = ("tools", "documents")
"""Columns that a chat template uses in addition to the messages."""
SYSTEM_COLUMNS = ("system", "system_prompt")
"""Columns next to messages whose text is the system message, which comes first."""
REPEATED = "several of this name"
"""The kind of a column whose name is not unique."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row: its values by column, its place (for names and errors), and whether bytes were replaced."""

    place: str
    values: Mapping[str, Any]
    repaired: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows in a fixed order; `columns` maps each name to "text", "messages", "turns" or the type's own name."""

    columns: Mapping[str, str]
    rows: Callable[[int, Sequence[str]], Iterator[TableRow]]
    """Rows from the given one on, with the given columns."""


@dataclass(frozen=True, kw_only=True)
class TextField:
    """The columns that hold the documents: one, or a prompt's and its completion's."""

    columns: tuple[str, ...]
    conversations: bool
    """Whether a document is a conversation."""

    @property
    def name(self) -> str:
        """The name in the identity and in --text_field: `text`, `prompt+completion`."""
        return "+".join(self.columns)


def text_field(table: Table, asked: str | None, where: str) -> TextField:
    """Return the columns of the documents: `asked`, otherwise `text`, otherwise the only plausible column or pair of
    columns.

    Raises
    ------
    ValueError
        When `asked` is not a column, or no column or several could be meant; the message lists them.
    """
    columns = asked_columns(table, asked, where) if asked is not None else plausible_columns(table, where)
    kinds = {table.columns[column] for column in columns}
    conversations = len(columns) > 1 or bool(kinds & {MESSAGES, TURNS})
    for column in (*columns, *(BESIDE_MESSAGES + SYSTEM_COLUMNS if conversations else ())):
        if table.columns.get(column) == REPEATED:
            raise ValueError(f"{where} has several columns named {column!r}; rename or remove all but one of them")
    return TextField(columns=columns, conversations=conversations)


def asked_columns(table: Table, asked: str, where: str) -> tuple[str, ...]:
    """Return the column of this name, or the two columns joined by a `+`."""
    before, _, after = asked.partition("+")
    columns = (asked,) if asked in table.columns else (before, after)
    if not set(columns) <= set(table.columns):
        raise ValueError(f"{where} has no column {asked!r}; its columns: {listed(table)}")
    return columns


def plausible_columns(table: Table, where: str) -> tuple[str, ...]:
    """Return the only plausible column or pair of columns."""
    if "text" in table.columns:
        return ("text",)
    chats = [name for name in CHAT_COLUMNS if table.columns.get(name) in (MESSAGES, TURNS)]
    kinds = {name: kind for name, kind in table.columns.items() if kind in (MESSAGES, TURNS)}
    kinds |= {name: kind for name, kind in table.columns.items() if kind == "text" and not is_naming(name)}
    for pair in PAIRS:
        if set(kinds) == set(pair) and len(set(kinds.values())) == 1:
            return pair
    found = chats if len(chats) == 1 else list(kinds)
    if len(found) != 1:
        raise ValueError(
            f"{where} has {len(found) or 'no'} columns that could be the text; choose one with --text_field, or two "
            "as --text_field PROMPT+COMPLETION. A column that names or sorts rows is only used if named. "
            f"Its columns: {listed(table)}"
        )
    return (found[0],)


def is_naming(column: str) -> bool:
    """Whether a column's name (snake_case, kebab-case or camelCase) says that it names, links or numbers rows."""
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", column).lower().strip("_"))
    return words[-1] in NAMING_WORDS or (words[-1].isdigit() and words[0] in NAMING_WORDS)


def listed(table: Table) -> str:
    """All columns with their kinds, for errors."""
    return ", ".join(f"{name} ({kind})" for name, kind in table.columns.items()) or "none"


def table_documents(table: Table, field: TextField, start: int) -> Iterator[Document]:
    """Yield one document per row, from row `start` on; a null is an empty document, and a row of a different form has a
    fault."""
    single = {name for name, kind in table.columns.items() if kind != REPEATED}
    name_column = next((name for name in NAME_COLUMNS if name in single and name not in field.columns), None)
    beside = (*BESIDE_MESSAGES, *SYSTEM_COLUMNS) if field.conversations else ()
    wanted = dict.fromkeys(filter(None, [*field.columns, name_column, *(name for name in beside if name in single)]))
    for row in table.rows(start, list(wanted)):
        label = row.values.get(name_column) if name_column is not None else None
        name, _ = without_surrogates(row.place if label is None or label == "" else str(label))
        try:
            document = row_document(row, field, table, name)
        except ValueError as error:
            document = Document(name=name, fault=str(error))
        yield document


def row_document(row: TableRow, field: TextField, table: Table, name: str) -> Document:
    """Make a document from a row; a ValueError says where the row differs in form from the others."""
    check_values(row, field, table)
    if field.conversations:
        extra = {column: row.values.get(column) for column in BESIDE_MESSAGES if column not in field.columns}
        messages = with_system(row_messages(row, field, table), row, field)
        where = f"{row.place}: column {field.name!r}"
        return conversation(messages, extra, name=name, where=where, repaired=row.repaired)
    text, replaced = without_surrogates(row.values[field.columns[0]] or "")
    return Document(name=name, text=text, repaired=row.repaired or replaced)


def check_values(row: TableRow, field: TextField, table: Table) -> None:
    """Raise for a row without the field's columns, and for values of a different kind than their column."""
    for column in field.columns:
        if column not in row.values:
            raise ValueError(
                f"{row.place}: has no {column!r}, which holds the text; its keys: {', '.join(row.values)}. Give "
                "the row that key (null for an empty document), remove the row, or choose another --text_field"
            )
        value, kind = row.values[column], table.columns[column]
        wanted: type = list if kind in (MESSAGES, TURNS) else str
        if value is not None and not isinstance(value, wanted):
            expected = "text" if wanted is str else f"a list of {kind}"
            raise ValueError(
                f"{row.place}: column {column!r} holds {type(value).__name__}, not {expected}: {value!r:.80}; give "
                "all rows the same kind of value, or choose another column with --text_field"
            )


def row_messages(row: TableRow, field: TextField, table: Table) -> list[Any]:
    """Return the messages of all columns of the field, joined; of two texts, the first is the user's."""
    messages = list[Any]()
    for column, role in zip(field.columns, ("user", "assistant"), strict=False):
        value = row.values[column]
        if table.columns[column] == TURNS:
            where = f"{row.place}: column {column!r}, message "
            messages += [as_message(turn, f"{where}{number}") for number, turn in enumerate(value or [])]
        elif table.columns[column] == MESSAGES:
            messages += value or []
        else:
            messages.append({"role": role, "content": value or ""})
    return messages


def with_system(messages: list[Any], row: TableRow, field: TextField) -> list[Any]:
    """Put the text of a system message's column before the messages, if there are any.

    Raises
    ------
    ValueError
        When it is not text, or there is another system message.
    """
    given = {name: row.values.get(name) for name in SYSTEM_COLUMNS if name not in field.columns}
    given = {name: text for name, text in given.items() if text not in (None, "")}
    for name, text in given.items() if messages else ():
        if not isinstance(text, str):
            raise ValueError(f"{row.place}: column {name!r} holds {type(text).__name__}, not text: {text!r:.80}")
        message = {"role": "system", "content": text}
        first = messages[0] if isinstance(messages[0], dict) else {}
        if first.get("role") == "system" and first.get("content") != text:
            raise ValueError(f"{row.place}: column {name!r} is not its only system message: {text!r:.40}; keep one")
        messages = messages if first.get("role") == "system" else [message, *messages]
    return messages
