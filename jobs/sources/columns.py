"""Rows with columns (JSON lines, parquet, arrow data sets) and the documents in one of their columns.

Memory is bounded by one line or one batch of rows, never by the file. Only the text column and the one that
names documents are read. It does not know how files were found, nor what a hub is.
"""

import gzip
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.sources.documents import Document, decode, repaired_strings, without_surrogates
from store.records import parse_json

NAME_COLUMNS = ("id", "title", "name", "url", "path")
"""Columns that name a document, the best first."""
BESIDE_MESSAGES = ("tools", "documents")
"""Columns that a chat template takes beside the messages."""
SAMPLED_ROWS = 100
"""JSON lines have no schema: their columns are those of this many first rows (arbitrary)."""
BATCH_ROWS = 256
"""Rows decoded at once (arbitrary; long documents make large batches)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: its values by column, where it stands (for names and errors), whether bytes were replaced."""

    place: str
    values: Mapping[str, Any]
    repaired: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows in a fixed order; `columns` maps each name to "text", "messages" or the type's own name."""

    columns: Mapping[str, str]
    rows: Callable[[int, Sequence[str]], Iterator[Row]]
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


def without_nulls(value: Any) -> Any:
    """Leave the nulls out of arrow's objects: there each object of a column has all fields that one of them has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


# --- JSON lines -------------------------------------------------------------------------------------------


def json_table(files: Mapping[str, Path]) -> Table:
    """Return the rows of JSON-lines files (name → path, in order); `.gz` ones are decompressed."""
    columns: dict[str, str] = {}
    for row in islice(json_rows(files, 0), SAMPLED_ROWS):
        for name, value in row.values.items():
            kind = json_kind(value)
            known = columns.get(name, "null")
            if {known, kind} == {"messages", "list"}:  # told as a broken message, where it is read
                kind = known = "messages"
            columns[name] = kind if known == "null" else known if kind in (known, "null") else "mixed"
    return Table(columns=columns, rows=partial(json_rows, files))


def json_kind(value: object) -> str:
    """Return the kind of column that would hold this value."""
    if value is None or value == []:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and value and all(isinstance(item, dict) and "role" in item for item in value):
        return "messages"
    return type(value).__name__


def json_rows(files: Mapping[str, Path], start: int, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield a row for each line that is not blank; skipped lines are not parsed."""
    skipped = 0
    for name, path in files.items():
        for number, line in enumerate(lines(path), 1):
            if not line.strip():  # blank, or nothing but a byte order mark
                continue
            if skipped < start:
                skipped += 1
                continue
            text, repaired = decode(line)
            yield Row(place=f"{name}:{number}", values=json_object(text, path, number), repaired=repaired)


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed if its name ends in `.gz`, without a byte order mark."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream):
                yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def json_object(text: str, path: Path, number: int) -> dict[str, Any]:
    """Parse one line, which must hold one JSON object."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not JSON ({error}); one object a line is expected") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{path}, line {number}: holds a {kind}; one JSON object a line is expected")
    return values


# --- Parquet and arrow ------------------------------------------------------------------------------------


def arrow_columns(schema: pa.Schema) -> dict[str, str]:
    """Return the kind of every column of an arrow schema."""
    return {column.name: arrow_kind(column.type) for column in schema}


def arrow_kind(kind: pa.DataType) -> str:
    """Return "text", "messages" or the arrow type's own name."""
    if is_text(kind):
        return "text"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = kind.value_type
        if pa.types.is_struct(item) and {"role", "content"} <= {item.field(i).name for i in range(item.num_fields)}:
            return "messages"
    return str(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether an arrow type is one of the string types."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def batch_rows(batch: pa.RecordBatch | pa.Table, name: str, first: int) -> Iterator[Row]:
    """Yield the rows of a batch whose first row has this number (from 1) in the file or split `name`."""
    columns = {}
    for column in batch.schema.names:
        values = batch.column(column)
        # Parquet readers do not check that strings are UTF-8; as bytes they can be repaired here.
        columns[column] = without_nulls(
            (values.cast(pa.large_binary()) if is_text(values.type) else values).to_pylist()
        )
    for index in range(batch.num_rows):
        decoded = {column: values[index] for column, values in columns.items()}
        repaired = False
        for column, value in decoded.items():
            if isinstance(value, bytes) and is_text(batch.schema.field(column).type):
                decoded[column], replaced = decode(value)
                repaired = repaired or replaced
        yield Row(place=f"{name}:{first + index}", values=decoded, repaired=repaired)


def parquet_table(files: Mapping[str, Path]) -> Table:
    """Return the rows of parquet files (name → path, in order) with the columns of the first."""
    with parquet_file(next(iter(files.values()))) as first:
        return Table(columns=arrow_columns(first.schema_arrow), rows=partial(parquet_rows, files))


def parquet_file(path: Path) -> pq.ParquetFile:
    """Open a parquet file, the names of whose columns can be read."""
    try:
        file = pq.ParquetFile(path)
        _ = file.schema_arrow.names
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as parquet: {error}") from error
    return file


def parquet_rows(files: Mapping[str, Path], start: int, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of parquet files; files and row groups before `start` are not read."""
    for name, path in files.items():
        with parquet_file(path) as file:
            if missing := [column for column in columns if column not in file.schema_arrow.names]:
                listed = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path} has no column {missing[0]!r}; its columns: {listed}")
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            group, first = 0, 0
            while group < len(sizes) and first + sizes[group] <= start:
                first += sizes[group]
                group += 1
            groups = list(range(group, len(sizes)))
            for batch in parquet_batches(file, path, groups, columns):
                skip = min(max(start - first, 0), batch.num_rows)
                yield from batch_rows(batch.slice(skip), name, first + skip + 1)
                first += batch.num_rows
            start = max(start - sum(sizes), 0)


def parquet_batches(
    file: pq.ParquetFile, path: Path, groups: list[int], columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield the given row groups of a parquet file in batches."""
    try:
        yield from file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def dataset_table(data: Any, name: str) -> Table:
    """Return the rows of a `datasets.Dataset`; `name` stands before the row's number in names and errors."""
    return Table(columns=arrow_columns(data.features.arrow_schema), rows=partial(dataset_rows, data, name))


def dataset_rows(data: Any, name: str, start: int, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a `datasets.Dataset`; those before `start` are not read."""
    chosen = data.select_columns(list(columns)).with_format("arrow")
    for first in range(start, len(chosen), BATCH_ROWS):
        yield from batch_rows(chosen[first : first + BATCH_ROWS], name, first + 1)
