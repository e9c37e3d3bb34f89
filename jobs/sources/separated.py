"""Tables of values separated by commas, semicolons or tabs, with a header line. Memory is bounded by a row."""

import csv
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from jobs.sources.columns import REPEATED, Table, TableRow
from jobs.sources.compressed import lines, suffixes
from jobs.sources.documents import decode

SAMPLED_ROWS = 100
"""There is no schema: a column is numeric if its values in this many first rows are all numbers (arbitrary)."""

csv.field_size_limit(sys.maxsize)  # documents may be longer than the library's limit of 128 KiB


def separated_table(files: Mapping[str, Path]) -> Table:
    """Return the rows of CSV and TSV files (name → path, in order) with the columns of the first."""
    name, path = next(iter(files.items()))
    _, head, _ = next(records(path), (1, [], False))
    if not head or not all(head):
        raise ValueError(f"{path}, line 1: a line with the names of all columns is expected, but it contains {head}")
    sample = list(islice(separated_rows({name: path}, 0), SAMPLED_ROWS))
    times = Counter(head)
    values = {column: [row.values[column] for row in sample if row.values[column]] for column in head}
    kinds = {column: "number" if found and all(map(is_number, found)) else "text" for column, found in values.items()}
    return Table(
        columns={column: REPEATED if times[column] > 1 else kind for column, kind in kinds.items()},
        rows=partial(separated_rows, files),
    )


def is_number(value: str) -> bool:
    """Whether a value is a number."""
    try:
        float(value)
    except ValueError:
        return False
    return True


def separated_rows(files: Mapping[str, Path], start: int, columns: Sequence[str] = ()) -> Iterator[TableRow]:
    """Yield a row for each record below the header line; a row's place has the number of its last line."""
    skipped = 0
    for name, path in files.items():
        found = records(path)
        _, head, _ = next(found, (1, [], False))
        if missing := [column for column in columns if column not in head]:
            raise ValueError(f"{path} has no column {missing[0]!r}; its columns: {', '.join(head) or 'none'}")
        for number, values, repaired in found:
            if len(values) != len(head):
                raise ValueError(
                    f"{path}, line {number}: has {len(values)} values, but line 1 names {len(head)} columns; "
                    "put quotes around values that hold a separator"
                )
            if skipped < start:
                skipped += 1
                continue
            yield TableRow(place=f"{name}:{number}", values=dict(zip(head, values, strict=True)), repaired=repaired)


def records(path: Path) -> Iterator[tuple[int, list[str], bool]]:
    """Yield the number of each record's last line, its values, and whether invalid UTF-8 was replaced in it."""
    repaired = False

    def decoded() -> Iterator[str]:
        nonlocal repaired
        for line in lines(path):
            text, replaced = decode(line)
            repaired = repaired or replaced
            yield text

    reader = csv.reader(decoded(), delimiter=separator(path), strict=True)
    try:
        for values in reader:
            if values:
                yield reader.line_num, values, repaired
            repaired = False
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; quotes inside a value must be doubled") from error


def separator(path: Path) -> str:
    """Return the separator of values: a tab in TSV, otherwise the first of comma, semicolon and tab in the first
    line."""
    head, _ = decode(next(lines(path), b""))
    return "\t" if suffixes(path)[0] == ".tsv" else next((mark for mark in ",;\t" if mark in head), ",")
