"""Arrow record batches as rows, from parquet files, saved data sets and the hub. Memory is bounded by one batch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs.sources.columns import REPEATED, Table, TableRow
from jobs.sources.conversations import MESSAGES, kind_of_list
from jobs.sources.documents import decode

BATCH_ROWS = 256
"""Rows decoded at once (arbitrary; long documents make large batches)."""


def arrow_columns(schema: pa.Schema) -> dict[str, str]:
    """Return the kind of every column of an arrow schema."""
    repeated = {name for name, times in Counter(schema.names).items() if times > 1}
    return {column.name: REPEATED if column.name in repeated else arrow_kind(column.type) for column in schema}


def refuse_repeated(schema: pa.Schema, columns: Sequence[str], path: Path) -> None:
    """Raise if a file has several columns of one of these names."""
    for column in columns:
        if schema.names.count(column) > 1:
            raise ValueError(f"{path} has several columns named {column!r}; rename or remove all but one of them")


def arrow_kind(kind: pa.DataType) -> str:
    """Return "text", "messages", "turns" or the arrow type's own name."""
    if is_text(kind):
        return "text"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        item = kind.value_type
        if pa.types.is_struct(item):
            names = [item.field(i).name for i in range(item.num_fields)]
            found = kind_of_list([names])
            return str(kind) if found is None or (found == MESSAGES and "content" not in names) else found
    return str(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether an arrow type is one of the string types."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def batch_rows(batch: pa.RecordBatch | pa.Table, name: str, first: int) -> Iterator[TableRow]:
    """Yield the rows of a batch whose first row has this number (from 1) in the file or split `name`."""
    columns = {}
    for column in batch.schema.names:
        values = batch.column(column)
        # Parquet readers do not check that strings are UTF-8; reading them as bytes allows repairing them here.
        plain = values.cast(pa.large_binary()) if is_text(values.type) else values
        columns[column] = without_nulls(plain.to_pylist())
    for index in range(batch.num_rows):
        decoded = {column: values[index] for column, values in columns.items()}
        repaired = False
        for column, value in decoded.items():
            if isinstance(value, bytes) and is_text(batch.schema.field(column).type):
                decoded[column], replaced = decode(value)
                repaired = repaired or replaced
        yield TableRow(place=f"{name}:{first + index}", values=decoded, repaired=repaired)


def without_nulls(value: Any) -> Any:
    """Remove the nulls from arrow's objects: in arrow, each object of a column has all fields that any of them has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def dataset_table(data: Any, name: str) -> Table:
    """Return the rows of a `datasets.Dataset`; `name` precedes the row's number in names and errors."""
    return Table(columns=arrow_columns(data.features.arrow_schema), rows=partial(dataset_rows, data, name))


def dataset_rows(data: Any, name: str, start: int, columns: Sequence[str]) -> Iterator[TableRow]:
    """Yield the rows of a `datasets.Dataset`; those before `start` are not read."""
    chosen = data.select_columns(list(columns)).with_format("arrow")
    for first in range(start, len(chosen), BATCH_ROWS):
        yield from batch_rows(chosen[first : first + BATCH_ROWS], name, first + 1)
