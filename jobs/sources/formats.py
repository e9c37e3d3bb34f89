"""The file formats that data sets are read from. A new one is a file beside this one, and a line in `FORMATS`."""

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
    """What is a document, for --help and errors."""
    table: Callable[[Mapping[str, Path]], Table] | None = None
    """Reads files (name → path, in order) as rows with columns; None for plain text, where a file is a document."""
    binary: bool = False
    """Whether files are no text, and never compressed as a whole."""

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.suffixes)}: {self.about})"


FORMATS = [
    Format("JSON lines", (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl"), "an object a line", json_table),
    Format("CSV", (".csv", ".tsv"), "a row a document, below the columns' names", separated_table),
    Format("parquet", (".parquet",), "a row a document", parquet_table, binary=True),
    Format("arrow", (".arrow", ".feather"), "a row a document", arrow_table, binary=True),
]
TEXT = Format("text", (".txt", ".md", ".py"), "and every other file of text, as one document")


def format_of(path: Path) -> Format:
    """The format of a file, by its name."""
    return next((form for form in FORMATS if suffixes(path)[0] in form.suffixes), TEXT)


def check_format(path: Path) -> None:
    """Refuse what is known not to be what its name says, before anything is captured; it says what to do.

    Raises
    ------
    ValueError
        When the file is of a kind that is not read, or is named as another kind is.
    """
    form, compressed = format_of(path), suffixes(path)[1]
    if form.binary and compressed:
        raise ValueError(f"{path} is {form.name} inside {compressed}, which is not read; decompress it")
    if compressed:  # a pointer, or a page, in its place
        with path.open("rb") as packed:
            refuse_kinds(path, packed.read(HEAD_BYTES), named=False, binary=True)
    with opened(path) as stream:
        head = stream.read(HEAD_BYTES)
    refuse_kinds(path, head, named=form is TEXT, binary=form.binary)
    if form is TEXT:
        refuse_json_lines(path, head)


def is_file_name(spec: str) -> bool:
    """Whether a specification is meant as a path by its ending, also where it could be a hub id."""
    known = {suffix for form in (*FORMATS, TEXT) for suffix in form.suffixes}
    return Path(spec).suffix.lower() in known | set(OPENERS)


def described() -> str:
    """The formats in one line."""
    return ", ".join(map(str, (*FORMATS, TEXT))) + f"; those of text also compressed ({', '.join(OPENERS)})"
