"""Parquet files as rows. Memory is bounded by one batch of rows."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.sources.arrow import BATCH_ROWS, arrow_columns, batch_rows, refuse_repeated
from jobs.sources.columns import Table, TableRow


def parquet_table(files: Mapping[str, Path]) -> Table:
    """Return the rows of parquet files (name → path, in order) with the columns of the first."""
    with parquet_file(next(iter(files.values()))) as first:
        return Table(columns=arrow_columns(first.schema_arrow), rows=partial(parquet_rows, files))


def parquet_file(path: Path) -> pq.ParquetFile:
    """Open a parquet file and check that its column names can be read."""
    try:
        file = pq.ParquetFile(path)
        _ = file.schema_arrow.names
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as parquet: {error}") from error
    return file


def parquet_rows(files: Mapping[str, Path], start: int, columns: Sequence[str]) -> Iterator[TableRow]:
    """Yield the rows of parquet files; files and row groups before `start` are not read."""
    for name, path in files.items():
        with parquet_file(path) as file:
            if missing := [column for column in columns if column not in file.schema_arrow.names]:
                listed = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path} has no column {missing[0]!r}; its columns: {listed}")
            refuse_repeated(file.schema_arrow, columns, path)
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
    if not groups:  # pyarrow 18 fails
        return
    try:
        yield from file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
