"""The file formats of data sets. A new format is a file next to this one, and a line in `FORMATS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.sources.arrow_files import arrow_table
from jobs.sources.columns import Table
from jobs.sources.compressed import OPENERS, opened, suffixes
from jobs.sources.json_lines import json_table
from jobs.sources.parquet import parquet_table
from jobs.sources.refused import HEAD_BYTES, refuse_json_lines, refuse_kinds
from jobs.sources.separated import separated_table


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    name: str
    suffixes: tuple[str, ...]
    about: str
    """What a document is, for --help and errors."""
    table: Callable[[Mapping[str, Path]], Table] | None = None
    """Reads files (name → path, in order) as rows with columns; None for plain text, where each file is a document."""
    binary: bool = False
    """Whether files are binary, and never compressed as a whole."""

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.suffixes)}: {self.about})"


FORMATS = [
    Format("JSON lines", (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl"), "one object per line", json_table),
    Format("CSV", (".csv", ".tsv"), "one row per document, below the column names", separated_table),
    Format("parquet", (".parquet",), "one row per document", parquet_table, binary=True),
    Format("arrow", (".arrow", ".feather"), "one row per document", arrow_table, binary=True),
]
TEXT = Format("text", (".txt", ".md", ".py"), "and any other text file, as one document")


def format_of(path: Path) -> Format:
    """The format of a file, by its name."""
    return next((form for form in FORMATS if suffixes(path)[0] in form.suffixes), TEXT)


def check_format(path: Path) -> None:
    """Raise for a file that is known not to be what its name says, before anything is captured; the message says what
    to do.

    Raises
    ------
    ValueError
        When the file is of an unsupported kind, or its name is that of another kind.
    """
    form, compressed = format_of(path), suffixes(path)[1]
    if form.binary and compressed:
        raise ValueError(f"{path} is {form.name} inside {compressed}, which is not supported; decompress it")
    if compressed:  # it may be a pointer or a page instead
        with path.open("rb") as packed:
            refuse_kinds(path, packed.read(HEAD_BYTES), named=False, binary=True)
    with opened(path) as stream:
        head = stream.read(HEAD_BYTES)
    refuse_kinds(path, head, named=form is TEXT, binary=form.binary)
    if form is TEXT:
        refuse_json_lines(path, head)


def is_file_name(spec: str) -> bool:
    """Whether a specification is a path because of its ending, even if it could be a hub id."""
    known = {suffix for form in (*FORMATS, TEXT) for suffix in form.suffixes}
    return Path(spec).suffix.lower() in known | set(OPENERS)


def described() -> str:
    """The formats in one line."""
    return ", ".join(map(str, (*FORMATS, TEXT))) + f"; text formats may be compressed ({', '.join(OPENERS)})"
