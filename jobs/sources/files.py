"""Data sets from local files: a file in one of the `jobs.sources.formats`, a folder of them, a glob, or a folder that
the library `datasets` saved.

Promises: an order that depends only on names (sorted by path), an identity that depends only on names and bytes, and
that nothing is left out without a note. Files of different formats are not mixed.
"""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from jobs.sources.arrow import dataset_table
from jobs.sources.columns import table_documents, text_field
from jobs.sources.compressed import BYTE_ORDER_MARK, opened
from jobs.sources.documents import Document, Source, TextIdentity, decode, without_surrogates
from jobs.sources.folders import walked
from jobs.sources.formats import check_format, format_of
from jobs.sources.splits import DEFAULT_SPLIT, of_split

BLOCK_BYTES = 1 << 20
"""Bytes read at a time while hashing (arbitrary)."""
SAVED_MARKS = ("state.json", "dataset_dict.json")
"""The files that `Dataset.save_to_disk` and `DatasetDict.save_to_disk` write to a folder."""


def is_glob(spec: str) -> bool:
    """Whether a specification is a pattern and not an existing path."""
    return glob.has_magic(spec) and not os.path.lexists(spec)


def local_source(spec: str, *, name: str, split: str | None, field: str | None) -> Source:
    """Return the source for a path or a glob.

    Raises
    ------
    ValueError
        When nothing can be read there, kinds are mixed, or an option does not apply; the message names the path.
    """
    path = Path(spec)
    if any((path / mark).is_file() for mark in SAVED_MARKS):
        return saved_source(path, name=name, split=split, field=field)
    files, note = found(spec)
    if not path.is_file():
        files = of_split(files, split, spec, asked_for=is_glob(spec))
    elif split not in (None, DEFAULT_SPLIT):
        raise ValueError(f"{spec} has no splits, so --split {split} does not apply; leave it out")
    for file in files.values():
        check_readable(file)
    formats = Counter(map(format_of, files.values()))
    if len(formats) > 1:
        counts = ", ".join(f"{count} {form.name}" for form, count in sorted(formats.items(), key=lambda of: of[0].name))
        raise ValueError(f"{spec} mixes kinds of files ({counts}); choose one with a glob such as 'folder/**/*.txt'")
    [form] = formats
    if form.table is None:
        if field is not None:
            raise ValueError(f"{spec} is plain text without columns, so --text_field {field} does not apply")
        return Source(name=name, read=partial(text_documents, files), identify=partial(identity, files), note=note)
    table = form.table(files)
    column = text_field(table, field, spec)
    return Source(
        name=name,
        read=partial(table_documents, table, column),
        conversations=column.conversations,
        identify=partial(identity, files, field=column.name),
        note=note,
    )


def found(spec: str) -> tuple[dict[str, Path], str | None]:
    """Return the files of a path or glob, name → path in order, and a note about what was left out."""
    if is_glob(spec):
        return matched(spec), None
    path = Path(spec)
    return walked(path) if path.is_dir() else ({path.name: path}, None)


def check_readable(path: Path) -> None:
    """Raise for anything that is not a regular file, is not readable, or has an unsupported format."""
    if not path.is_file():
        raise ValueError(f"{path} is neither a regular file nor a folder, nor a link to one")
    try:
        path.open("rb").close()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check its mode and owner") from error
    check_format(path)


def matched(pattern: str) -> dict[str, Path]:
    """Return the files that a glob names, name → path sorted; links are followed, because the glob names them."""
    paths = [path for path in sorted(set(glob.glob(pattern, recursive=True))) if os.path.isfile(path)]
    if not paths:
        raise ValueError(
            f"no file matches {pattern!r} (from {os.getcwd()}); quote it, and use ** for subfolders; "
            "a bracket or star that is part of a name is written [[] or [*]"
        )
    top = os.path.commonpath([os.path.dirname(path) for path in paths]) or "."
    return {Path(os.path.relpath(path, top)).as_posix(): Path(path) for path in paths}


def identity(files: Mapping[str, Path], **also: str | int | None) -> TextIdentity:
    """Return the identity of these texts: one SHA-256 over all names and bytes, in order."""
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(os.fsencode(name) + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        try:
            with path.open("rb") as stream:
                while block := stream.read(BLOCK_BYTES):
                    digest.update(block)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
    return {"data": "files", "sha256": digest.hexdigest(), "split": None, "field": None} | also


def text_documents(files: Mapping[str, Path], start: int) -> Iterator[Document]:
    """Yield one document per file; files before `start` are not opened."""
    for name, path in islice(files.items(), start, None):
        text, repaired = read_text(path)
        yield Document(name=without_surrogates(name)[0], text=text, repaired=repaired)


def read_text(path: Path) -> tuple[str, bool]:
    """Return a file's text, decompressed and without its byte order mark, and whether invalid UTF-8 was replaced."""
    with opened(path) as stream:
        data = stream.read()
    return decode(data.removeprefix(BYTE_ORDER_MARK))


def saved_source(folder: Path, *, name: str, split: str | None, field: str | None) -> Source:
    """Return the source for a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets  # takes a second, and only needed here

    try:
        data: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises many types for a damaged folder
        raise ValueError(f"cannot read {folder} as a saved data set: {error}") from error
    if isinstance(data, datasets.DatasetDict):
        split = split or DEFAULT_SPLIT
        if split not in data:
            raise ValueError(f"{folder} has no split {split!r}; choose with --split from: {', '.join(data)}")
        data = data[split]
    elif split not in (None, DEFAULT_SPLIT):
        raise ValueError(f"{folder} was saved without splits, so --split {split} does not apply")
    else:
        split = None
    files = {Path(file["filename"]).name: Path(file["filename"]) for file in data.cache_files}
    table = dataset_table(data, split or folder.name)
    column = text_field(table, field, str(folder))
    return Source(
        name=name,
        read=partial(table_documents, table, column),
        conversations=column.conversations,
        identify=partial(identity, files, split=split, field=column.name),
    )
