"""The file formats that data sets are read from. A new one is a file beside this one, and a line in `FORMATS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.sources.columns import Table
from jobs.sources.json_lines import json_table
from jobs.sources.parquet import parquet_table


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    name: str
    suffixes: tuple[str, ...]
    about: str
    """What is a document, for --help and errors."""
    table: Callable[[Mapping[str, Path]], Table] | None = None
    """Reads files (name → path, in order) as rows with columns; None for plain text, where a file is a document."""

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.suffixes)}: {self.about})"


FORMATS = [
    Format("JSON lines", (".jsonl", ".json", ".ndjson"), "an object a line, also .gz", json_table),
    Format("parquet", (".parquet",), "a row a document", parquet_table),
]
TEXT = Format("text", (".txt", ".md", ".py", ".csv"), "and every other file, as one document")


def format_of(path: Path) -> Format:
    """The format of a file, by its name."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return next((form for form in FORMATS if suffix in form.suffixes), TEXT)


def is_file_name(spec: str) -> bool:
    """Whether a specification is meant as a path by its ending, also where it could be a hub id."""
    known = {suffix for form in (*FORMATS, TEXT) for suffix in form.suffixes}
    return Path(spec).suffix in known | {".gz", ".arrow"}


def described() -> str:
    """The formats in one line."""
    return ", ".join(map(str, (*FORMATS, TEXT)))
