"""Read files a piece at a time: JSON lines and arrays of npz files. Nothing in them is unpickled."""

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The place of each line as text, its object, and its size in bytes. Empty lines are skipped.

    Raises
    ------
    ValueError
        When a line does not hold a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                found = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error}): each line must hold one response") from error
            if not isinstance(found, dict):
                raise ValueError(f"{where} holds a JSON {type(found).__name__} instead of an object")
            yield where, found, len(line)


@contextmanager
def arrays_of(path: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays of an npz file by name, each read when it is used.

    Raises
    ------
    ValueError
        When it is not an npz file, or a requested array holds Python objects.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an npz file ({error})") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} is a single array: save named arrays with numpy.savez")
    with archive:
        yield archive


def rows_of(path: Path, name: str, rows: int) -> Iterator[NDArray[Any]]:
    """An array of an npz file, a number of entries of its first dimension at a time; it is never in memory as a whole.

    Raises
    ------
    ValueError
        When it is missing, or holds Python objects.
    """
    with zipfile.ZipFile(path) as archive:
        try:
            file = archive.open(f"{name}.npy")
        except KeyError as error:
            raise ValueError(f"{path} has no array {name}") from error
        with file:
            shape, fortran, dtype = _header(path, name, file)
            if fortran and len(shape) > 1:
                raise ValueError(f"{path}: the array {name} is in Fortran order: save numpy.ascontiguousarray of it")
            a_row = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            for start in range(0, shape[0], rows):
                some = min(rows, shape[0] - start)
                data = file.read(some * a_row)
                if len(data) != some * a_row:
                    raise ValueError(f"{path}: the array {name} is cut short")
                yield np.frombuffer(data, dtype).reshape(some, *shape[1:])


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of an npz file's arrays by name, read from their headers.

    Raises
    ------
    ValueError
        When it is not an npz file, or an array holds Python objects or a single value.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for entry in archive.namelist():
                with archive.open(entry) as file:
                    found[entry.removesuffix(".npy")] = _header(path, entry, file)[0]
            return found
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"{path} is not an npz file ({error})") from error


def _header(path: Path, name: str, file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)  # type: ignore[no-untyped-call]
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)  # type: ignore[no-untyped-call]
    if dtype.hasobject or not shape:
        raise ValueError(f"{path}: the array {name} is {dtype} of the shape {shape}, but must be numbers in rows")
    return shape, fortran, dtype


def size_bytes(path: Path) -> int:
    """The bytes to read from a file; for an npz file, the size of its decompressed arrays."""
    if path.suffix == ".npz" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    return path.stat().st_size


def integers(value: Any, where: str) -> NDArray[Any]:
    """An array of integers from nested lists; a ValueError if they hold other values or have unequal lengths."""
    try:
        found = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{where}: lists of unequal lengths ({error})") from error
    if found.size and found.dtype.kind not in "iu":
        raise ValueError(f"{where}: {found.dtype}, but must be integers")
    return found.astype(np.int64) if not found.size else found
