"""Whole objects by key under one folder: the only place that writes to disk.

A put is durable when it returns (file and folder are synced) and visible only whole: a reader sees the old object,
the new one or none, also when the writer is killed at any instruction. Keys are relative paths with `/`.

Files are written into a scratch folder first. It lies inside an array's own folder, where Zarr readers do not look:
a folder of ours anywhere else in a group makes them warn.
"""

import contextlib
import os
import shutil
import uuid
from pathlib import Path


class LocalObjects:
    """Objects in a folder of the local file system, or of a shared one that has hard links.

    Parameters
    ----------
    root : Path
        The folder. It is made by the first put.
    scratch : str
        Key of the folder for files that are not whole yet; on the same file system as `root`.
    """

    def __init__(self, root: Path, scratch: str) -> None:
        self.root = root
        self.scratch = scratch

    def get(self, key: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def size_bytes(self, key: str) -> int | None:
        """The object's length, or None where there is none."""
        try:
            return (self.root / key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def put(self, key: str, data: bytes) -> None:
        """Write an object, in place of the one that is there, if any."""
        partial = self._write_partial(data)
        target = self._parent_made(key)
        os.replace(partial, target)
        _sync_folder(target.parent)

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless there is one: False, and nothing is changed, where there is."""
        partial = self._write_partial(data)
        target = self._parent_made(key)
        try:
            os.link(partial, target)
        except FileExistsError:
            return False
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return True

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        target = self.root / key
        with contextlib.suppress(FileNotFoundError):
            target.unlink()
            _sync_folder(target.parent)

    def list(self, prefix: str) -> list[str]:
        """Names (not keys) of the objects directly under `prefix`, sorted; empty where there is no such folder."""
        try:
            return sorted(entry.name for entry in os.scandir(self.root / prefix) if entry.is_file())
        except FileNotFoundError:
            return []

    def clear(self, prefix: str) -> None:
        """Remove everything under `prefix`; only for the one who holds the lease."""
        shutil.rmtree(self.root / prefix, ignore_errors=True)

    def _write_partial(self, data: bytes) -> Path:
        partial = self._parent_made(f"{self.scratch}/{uuid.uuid4().hex}")
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # a full disk, a signal: leave nothing behind
            partial.unlink(missing_ok=True)
            raise
        return partial

    def _parent_made(self, key: str) -> Path:
        target = self.root / key
        missing = []
        folder = target.parent
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        target.parent.mkdir(parents=True, exist_ok=True)
        for made in missing:  # a new folder's name is durable only once its parent is synced
            _sync_folder(made.parent)
        return target


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
