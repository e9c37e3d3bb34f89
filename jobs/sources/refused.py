"""Files that are recognized and rejected by the ending of their name or their first bytes, with what to do instead."""

import codecs
import re
from dataclasses import dataclass
from pathlib import Path

from jobs.sources.compressed import BYTE_ORDER_MARK, suffixes
from jobs.sources.documents import decode
from store.records import parse_json

HEAD_BYTES = 8192
"""A NUL byte among this many first bytes marks a file as binary (git's rule, with git's number)."""
EXTRACT = "extract its text into a .txt file"
UNPACK = "unpack it, and use the folder or the file in it"
CONVERT = "write the text into a .jsonl, .csv or .parquet file"


@dataclass(frozen=True)
class Refused:
    """One kind of file that is not read."""

    name: str
    remedy: str
    suffixes: tuple[str, ...] = ()
    starts: tuple[bytes, ...] = ()
    """The first bytes of such a file, with which no text begins."""


REFUSED = [
    Refused(
        "a Git LFS pointer, not the data",
        "run `git lfs pull` in its repository",
        starts=(b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/"),
    ),
    Refused("a git-annex pointer, not the data", "run `git annex get` in its repository", starts=(b"/annex/objects/",)),
    Refused("a PDF document", EXTRACT, (".pdf",), (b"%PDF-",)),
    Refused(
        "a word processor's document",
        EXTRACT,
        (".doc", ".docx", ".odt", ".rtf", ".epub", ".ppt", ".pptx"),
        (b"{\\rtf", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
    ),
    Refused("a spreadsheet", "save it as .csv", (".xls", ".xlsx", ".xlsm", ".xlsb", ".ods")),
    Refused(
        "a numpy or tensor file", CONVERT, (".npy", ".npz", ".safetensors", ".gguf", ".h5", ".hdf5"), (b"\x93NUMPY",)
    ),
    Refused(
        "a pickle, which may execute code when it is read",
        CONVERT,
        (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib"),
        tuple(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5)),
    ),
    Refused(
        "an archive",
        UNPACK,
        (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".jar", ".whl"),
        (b"PK\x03\x04", b"PK\x05\x06", b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c"),
    ),
    Refused(
        "an image",
        "leave it out with a glob",
        (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ico"),
        (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a"),
    ),
    Refused(
        "audio or video", "leave it out with a glob", (".mp3", ".wav", ".flac", ".ogg", ".mp4", ".mkv", ".avi", ".mov")
    ),
    Refused(
        "a database",
        "export the table with the text as .csv or .parquet",
        (".sqlite", ".sqlite3", ".db", ".duckdb", ".mdb"),
        (b"SQLite format 3\0",),
    ),
    Refused("a table in an unsupported format", CONVERT, (".orc", ".avro", ".tfrecord", ".mds"), (b"Obj\x01",)),
    Refused("compressed in an unsupported way", "decompress it", (".z", ".lz4", ".lzma", ".br", ".snappy", ".lz")),
]
COMPRESSED = {".gz": b"\x1f\x8b", ".bz2": b"BZh91AY&SY", ".xz": b"\xfd7zXZ\0", ".zst": b"\x28\xb5\x2f\xfd"}
TABLES = {".parquet": b"PAR1\x15", ".arrow": b"ARROW1\0\0"}
"""Supported formats, by the right ending, and their first bytes."""
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32LE",
    codecs.BOM_UTF32_BE: "UTF-32BE",
    codecs.BOM_UTF16_LE: "UTF-16LE",
    codecs.BOM_UTF16_BE: "UTF-16BE",
}


def refuse_kinds(path: Path, head: bytes, *, named: bool, binary: bool) -> None:
    """Raise for a file by its first (decompressed) bytes, or by its name.

    Parameters
    ----------
    named
        Whether to check the ending of its name too, if that is not one of a supported format.
    binary
        Whether its format is binary, with a reader that reports the format's own faults.
    """
    for kind in REFUSED:
        if head.startswith(kind.starts) or (named and suffixes(path)[0] in kind.suffixes):
            raise ValueError(f"{path} is {kind.name}; {kind.remedy}")
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")) and suffixes(path)[0] in PROMISED:
        raise ValueError(f"{path} contains an HTML page, perhaps from a failed download; download the file again")
    if binary:
        return
    for suffix, start in (COMPRESSED | TABLES).items():
        if head.startswith(start):
            raise ValueError(f"{path} contains {suffix[1:]} data; rename it so that it ends in {suffix}")
    if encoding := wide_encoding(head):
        raise ValueError(
            f"{path} is text in {encoding}, but only UTF-8 is supported; convert it: iconv -f {encoding} -t UTF-8 OLD"
            " > NEW"
        )
    if b"\0" in head:
        raise ValueError(f"{path} is a binary file (a NUL byte at {head.index(0)}), not text; leave it out with a glob")


PROMISED = (".txt", ".jsonl", ".jsonlines", ".jl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
"""Endings of files that are not HTML pages."""


def wide_encoding(head: bytes) -> str | None:
    """Return UTF-16 or UTF-32 if a file begins with their mark, or if its NUL bytes allow only one of them."""
    if marked := next((name for mark, name in MARKS.items() if head.startswith(mark)), None):
        return marked
    zeros = {at % 4 for at, byte in enumerate(head) if byte == 0}
    for name, where in (("UTF-16LE", {1, 3}), ("UTF-16BE", {0, 2}), ("UTF-32LE", {1, 2, 3}), ("UTF-32BE", {0, 1, 2})):
        if zeros and zeros <= where and is_printable(head, name):
            return name
    return None


def is_printable(head: bytes, encoding: str) -> bool:
    """Whether these bytes, perhaps truncated within a character, are text in this encoding."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(character.isprintable() or character in "\t\n\r\f" for character in text)


def refuse_json_lines(path: Path, head: bytes) -> None:
    """Raise for a file that would be read as one text but contains JSON lines."""
    first, _, after = head.removeprefix(BYTE_ORDER_MARK).lstrip().partition(b"\n")
    second = after.lstrip().partition(b"\n")[0]
    begins = re.compile(rb'\{\s*"')
    if begins.match(first) and (not second or begins.match(second)) and (cut(head, first) or is_object(first)):
        compressed = suffixes(path)[1]
        raise ValueError(
            f"{path} contains JSON lines but would be read as one text; rename it so that it ends in .jsonl{compressed}"
        )


def cut(head: bytes, line: bytes) -> bool:
    """Whether the head of a file ends within this line."""
    return len(head) >= HEAD_BYTES and head.endswith(line)


def is_object(line: bytes) -> bool:
    """Whether a line is a JSON object."""
    try:
        return isinstance(parse_json(decode(line)[0]), dict)
    except ValueError:
        return False
