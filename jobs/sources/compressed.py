"""Files that may be compressed, by the ending of their name; they are read decompressed."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def open_plain(path: Path) -> IO[bytes]:
    """Open a file that is not compressed."""
    return path.open("rb")


def open_zstd(path: Path) -> IO[bytes]:
    """Open a file compressed with Zstandard; Python's standard library supports it from 3.14 on."""
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": open_zstd,
}
"""The function that opens a file, by the ending of its name in lower case."""


def suffixes(path: Path) -> tuple[str, str]:
    """Return the ending that names the format and the one that names the compression, in lower case, or empty."""
    last = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), last) if last in OPENERS else (last, "")


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, decompressed; any error while reading becomes a ValueError that names the file."""
    try:
        with OPENERS.get(suffixes(path)[1], open_plain)(path) as stream:
            yield stream
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, decompressed, without a byte order mark."""
    with opened(path) as stream:
        for number, line in enumerate(stream):
            yield line.removeprefix(BYTE_ORDER_MARK) if number == 0 else line
