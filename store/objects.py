"""Whole objects by key. Only two modules write: this one to disk, and `store.s3` to a bucket.

A put is durable when it returns (file and folder are synced), and only complete objects are visible: a reader sees the
old object, the new one or none, even if the writer is killed at any instruction. Keys are relative paths with `/`.

Files are first written into a scratch folder. It is inside an array's own folder, where Zarr readers do not look; an
additional folder elsewhere in a group makes them warn.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from zarr.abc.store import Store
from zarr.storage import LocalStore

PLACE_TRIES = 5  # arbitrary: in a race, one job clears the scratch folder once
WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # what file systems say that have no hard links
LOCK_TRIES, LOCK_PAUSE_S = 200, 0.05  # arbitrary: a lock is held for a read and a rename
MOST_NAMED = 1000  # remembered folders (arbitrary): those of a shard are used once, and forgetting one costs a sync
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(.*)", re.DOTALL | re.IGNORECASE)  # a Path turns two slashes into one


class Objects(Protocol):
    """The objects of a store."""

    scratch: str
    """Key of the folder for incomplete files."""

    @property
    def root(self) -> Path | str:
        """The place of the objects, as accepted by `open_objects`."""

    def get(self, key: str) -> bytes | None:
        """The object's bytes, or None if there is no object."""

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The bytes of the existing objects; these are small, and all in memory at once."""

    def size_bytes(self, key: str) -> int | None:
        """The object's length, or None if there is no object."""

    def sizes(self, prefix: str, keys: Sequence[str]) -> Sequence[int | None]:
        """The length of each object, or None if there is none; all are under `prefix`."""

    def put(self, key: str, data: bytes) -> None:
        """Write an object and replace an existing one."""

    def put_new(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists; if it does, return False and change nothing.

        Over a network, False may also mean that this call itself wrote the object, but the answer to its first try was
        lost.
        """

    def put_over(self, key: str, old: bytes, data: bytes) -> bool:
        """Replace an object that has exactly the bytes `old`; False if it has other bytes. See `put_new`."""

    def delete(self, key: str) -> None:
        """Remove an object. A missing one is not an error."""

    def list(self, prefix: str) -> list[str]:
        """Names (not keys) of the objects directly under `prefix`, sorted; empty if there is no such folder."""

    def folders(self, prefix: str) -> Sequence[str]:
        """Names of the folders directly under `prefix`, sorted; empty if there is no such folder."""

    def clear(self, prefix: str) -> None:
        """Remove everything under `prefix`; only for the holder of the lease."""

    def settle(self, prefix: str) -> None:
        """Make durable what others have put or removed directly under `prefix`; they may have died before it was
        durable."""

    def zarr_store(self) -> Store:
        """The same objects as a read-only store for Zarr."""


def open_objects(path: Path | str, scratch: str) -> Objects:
    """The objects of a store. Nothing is read or written yet.

    Parameters
    ----------
    path
        A folder, or s3://bucket/prefix.
    scratch
        Key of the folder for incomplete files.

    Raises
    ------
    ValueError
        For a URL of another kind or without a bucket, and for an invalid path.
    """
    _refuse_no_path(str(path))
    url = _URL.fullmatch(str(path))
    if url is None:
        return LocalObjects(Path(path), scratch)
    if url[1].lower() != "s3":
        raise ValueError(f"the store {path}: {url[1]}:// is not supported; use a folder or s3://bucket/prefix")
    from store.s3 import S3Objects  # reading a folder does not need its packages

    return S3Objects(url[2], scratch)


def _refuse_no_path(path: str) -> None:
    """Reject an invalid path: Python's own error names neither the path nor what is wrong with it."""
    try:
        named = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise ValueError(f"the store {path!r} is not a valid path: a path holds no NUL and no lone surrogate")


class LocalObjects:
    """Objects in a folder of the local file system, or of a shared one that has hard links.

    Parameters
    ----------
    root : Path
        The folder. It is made by the first put.
    scratch : str
        Key of the folder for incomplete files, on the same file system as `root`.
    """

    def __init__(self, root: Path, scratch: str) -> None:
        self.root = root
        self.scratch = scratch
        self._named: set[Path] = set()
        """Folders whose names, and those of all above them in the store, are known to be durable."""

    def get(self, key: str) -> bytes | None:
        """See `Objects`, also for the other methods."""
        try:
            return (self.root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        found = {key: self.get(key) for key in keys}
        return {key: data for key, data in found.items() if data is not None}

    def size_bytes(self, key: str) -> int | None:
        try:
            return os.stat(f"{self.root}/{key}").st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self, prefix: str, keys: Sequence[str]) -> Sequence[int | None]:
        """One call for each object: a shard has its own folder, so listing would be slower."""
        return [self.size_bytes(key) for key in keys]

    def put(self, key: str, data: bytes) -> None:
        self._place(key, data, os.replace)

    def put_new(self, key: str, data: bytes) -> bool:
        try:
            self._place(key, data, _link)
        except FileExistsError:
            _sync_folder((self.root / key).parent)  # the writer may have died before this
            return False
        return True

    def put_over(self, key: str, old: bytes, data: bytes) -> bool:
        """Atomic if the file system has locks; otherwise two concurrent calls may both return True, and one object
        remains."""
        try:
            self._place(key, data, lambda unfinished, target: _replace(unfinished, target, old))
        except FileExistsError:
            return False
        return True

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)
        self.settle(str(Path(key).parent))

    def list(self, prefix: str) -> list[str]:
        return list(self._names(prefix, folders=False))

    def folders(self, prefix: str) -> Sequence[str]:
        return self._names(prefix, folders=True)

    def clear(self, prefix: str) -> None:
        shutil.rmtree(self.root / prefix, ignore_errors=True)

    def settle(self, prefix: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            _sync_folder(self.root / prefix)

    def zarr_store(self) -> Store:
        return LocalStore(self.root, read_only=True)

    def _names(self, prefix: str, *, folders: bool) -> Sequence[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.root / prefix) if entry.is_dir() == folders)
        except FileNotFoundError:
            return []

    def _place(self, key: str, data: bytes, place: Callable[[Path, Path], None]) -> None:
        """Write a file in the scratch folder and move it to its place.

        Try again if it is gone before that: of two jobs that start at once, the one that gets the lease clears the
        folder in which the other one writes its own.
        """
        for tries_left in reversed(range(PLACE_TRIES)):
            try:
                partial = self._write_partial(data)
                target = self._parent_made(key)
                place(partial, target)
                _sync_folder(target.parent)
                return
            except FileNotFoundError:
                if not tries_left:
                    raise

    def _write_partial(self, data: bytes) -> Path:
        partial = self._parent_made(f"{self.scratch}/{uuid.uuid4().hex}")
        try:
            with _naming(partial), partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # a full disk or a signal: leave nothing behind
            partial.unlink(missing_ok=True)
            raise
        return partial

    def _parent_made(self, key: str) -> Path:
        """The place of an object, in an existing folder whose name is durable."""
        target = self.root / key
        folder, unknown = target.parent, []
        while not folder.is_dir() or (folder not in self._named and self._is_ours(folder)):
            unknown.append(folder)
            folder = folder.parent
        target.parent.mkdir(parents=True, exist_ok=True)
        for each in unknown:  # a name is durable once its folder is synced, and its creator may have died before that
            _sync_folder(each.parent)
        if len(self._named) > MOST_NAMED:
            self._named.clear()
        self._named.update(unknown)
        return target

    def _is_ours(self, folder: Path) -> bool:
        """Whether a folder is the store or lies in it. A folder that contains the store cannot be synced without read
        permission."""
        return folder.is_relative_to(self.root) and os.access(folder.parent, os.R_OK)


def _link(partial: Path, target: Path) -> None:
    """Give a file its name, if the name is free. Its name in the scratch folder is removed in any case."""
    try:
        os.link(partial, target)
    except OSError as error:
        if error.errno in WITHOUT_LINKS:
            text = "this file system has no hard links, which a store needs: use another one, or s3://bucket/prefix"
            raise OSError(error.errno, text, str(target)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def _replace(unfinished: Path, target: Path, old: bytes) -> None:
    """Give a file the name of another one that holds `old`; FileExistsError if that is another file by now.

    The replaced file is locked from the read until the rename, so that another process that wants to replace it waits
    and then finds another file. A lock disappears when its process dies.
    """
    try:
        with open(target, "r+b" if os.access(target, os.W_OK) else "rb") as file:  # over NFS, a lock needs write access
            _lock(file.fileno(), target)
            with open(target, "rb") as now:  # over NFS, a server is asked for a name when it is opened
                same = os.path.samestat(os.fstat(file.fileno()), os.fstat(now.fileno()))
            if not same or file.read() != old:
                raise FileExistsError(f"{target} has changed")
            os.replace(unfinished, target)
    except FileNotFoundError:
        if unfinished.exists():
            raise FileExistsError(f"{target} is gone") from None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def _lock(handle: int, path: Path) -> None:
    """Lock an open file until it is closed, if its file system has locks."""
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        except OSError:  # this file system has no locks
            return
        else:
            return
    raise TimeoutError(
        f"{path}: another process has locked this file and does not continue: stop it, then run this again"
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with _naming(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the name of the file: the kernel's errors for an open file do not name it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
