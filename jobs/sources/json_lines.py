"""JSON lines: one object per line, whose keys are the columns. Memory is bounded by one line."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.sources.columns import Table, TableRow
from jobs.sources.compressed import lines
from jobs.sources.conversations import MESSAGES, TURNS, kind_of_list
from jobs.sources.documents import decode
from store.records import parse_json

SAMPLED_ROWS = 100
"""JSON lines have no schema: the columns are those of this many first rows (arbitrary)."""


def json_table(files: Mapping[str, Path]) -> Table:
    """Return the rows of JSON-lines files (name → path, in order)."""
    columns: dict[str, str] = {}
    for row in islice(json_rows(files, 0), SAMPLED_ROWS):
        for name, value in row.values.items():
            kind = json_kind(value)
            known = columns.get(name, "null")
            if {known, kind} in ({MESSAGES, "list"}, {TURNS, "list"}):  # reported as a broken message when it is read
                kind = known = known if kind == "list" else kind
            columns[name] = kind if known == "null" else known if kind in (known, "null") else "mixed"
    return Table(columns=columns, rows=partial(json_rows, files))


def json_kind(value: object) -> str:
    """Return the kind of column that would hold this value."""
    if value is None or value == []:
        return "null"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return kind_of_list(value) or "list"
    return type(value).__name__


def json_rows(files: Mapping[str, Path], start: int, columns: Sequence[str] = ()) -> Iterator[TableRow]:
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
            yield TableRow(place=f"{name}:{number}", values=json_object(text, path, number), repaired=repaired)


def json_object(text: str, path: Path, number: int) -> dict[str, Any]:
    """Parse one line, which must hold one JSON object."""
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"{path}, line {number}: not JSON ({error}); one object per line is expected{remedy(text)}"
        ) from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise ValueError(f"{path}, line {number}: holds a {kind}; one JSON object per line is expected{remedy(text)}")
    return values


def remedy(text: str) -> str:
    """Explain how to convert a file to JSON lines if this line is part of one array, or of one object."""
    if text.lstrip().startswith("["):
        return ". Convert a file that is one array to JSON lines: jq -c '.[]' FILE > FILE.jsonl"
    if text.strip() == "{":
        return ". Convert objects that span several lines to JSON lines: jq -c . FILE > FILE.jsonl"
    return ""
