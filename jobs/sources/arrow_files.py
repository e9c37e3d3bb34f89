"""Arrow files of both kinds (file and stream) as rows. Memory is bounded by one of the file's batches."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa

from jobs.sources.arrow import BATCH_ROWS, arrow_columns, batch_rows, refuse_repeated
from jobs.sources.columns import Table, TableRow

FILE_MARK = b"ARROW1"
"""The first bytes of an arrow file, but not of a stream."""


def arrow_table(files: Mapping[str, Path]) -> Table:
    """Return the rows of arrow files (name → path, in order) with the columns of the first."""
    with arrow_file(next(iter(files.values()))) as (schema, _):
        return Table(columns=arrow_columns(schema), rows=partial(arrow_rows, files))


@contextmanager
def arrow_file(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Open an arrow file or stream: its schema, and its batches."""
    try:
        with pa.OSFile(str(path)) as stream:
            start = stream.read(len(FILE_MARK))
            stream.seek(0)
            if start == FILE_MARK:
                file = pa.ipc.open_file(stream)
                yield file.schema, map(file.get_batch, range(file.num_record_batches))
            else:
                reader = pa.ipc.open_stream(stream)
                yield reader.schema, iter(reader)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path} as arrow: {error}") from error


def arrow_rows(files: Mapping[str, Path], start: int, columns: Sequence[str]) -> Iterator[TableRow]:
    """Yield the rows of arrow files from `start` on; the batches before it are not decoded."""
    for name, path in files.items():
        with arrow_file(path) as (schema, batches):
            if missing := [column for column in columns if column not in schema.names]:
                raise ValueError(f"{path} has no column {missing[0]!r}; its columns: {', '.join(schema.names)}")
            refuse_repeated(schema, columns, path)
            passed = 0
            for batch in batches:
                for first in range(max(start - passed, 0), batch.num_rows, BATCH_ROWS):
                    piece = batch.select(list(columns)).slice(first, BATCH_ROWS)
                    yield from batch_rows(piece, name, passed + first + 1)
                passed += batch.num_rows
            start = max(start - passed, 0)
