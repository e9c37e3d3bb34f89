"""A disk that loses power: unsynced data may then be present, missing or in their old state.

It watches the calls with which `store.objects` changes folders, in a folder of a real file system, and tracks what
POSIX guarantees: a file's bytes after the file is synced, and a name after its folder is synced. The caller chooses
what else is lost or kept, for each name separately, and a file's bytes also in part.

A process dies before any of its calls, not only between two objects as in `simulated`.
"""

import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from simulated import Killed

Choose = Callable[[Sequence[Any]], Any]
"""Chooses one of several possible states after a power failure; the first is always the oldest."""


@dataclass
class File:
    """A file's bytes, and whether they are safe."""

    data: bytes
    synced: bool = False


@dataclass
class Folder:
    """A folder's safe names, and the changes since then."""

    safe: "dict[str, File | Folder]" = field(default_factory=dict)
    changes: "list[tuple[str, File | Folder | None]]" = field(default_factory=list)

    def now(self) -> "dict[str, File | Folder]":
        """The names as every process sees them."""
        found: dict[str, Any] = dict(self.safe)
        for name, entry in self.changes:
            found[name] = entry
        return {name: entry for name, entry in found.items() if entry is not None}

    def sync(self) -> None:
        """Mark all names as safe."""
        self.safe, self.changes = self.now(), []

    def states(self, name: str) -> "list[File | Folder | None]":
        """The possible contents of a name, the oldest first."""
        return [self.safe.get(name), *(entry for changed, entry in self.changes if changed == name)]


class Disk:
    """The disk, mounted at an existing empty folder.

    Parameters
    ----------
    root : Path
        Where it is mounted.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.top = root, Folder()
        self.calls: list[str] = []
        self.dies_at: int | None = None
        self._files: dict[int, File] = {}

    def begin(self, dies_at: int | None = None) -> None:
        """Start a process that dies before its call with that number, counted from 0."""
        self.calls, self.dies_at = [], dies_at

    def fail(self, choose: Choose = lambda states: states[0]) -> None:
        """The power fails. The choices decide what is on the disk afterwards."""
        left = _left(self.top, choose)
        shutil.rmtree(self.root)
        self._files.clear()
        self.top = self._written(self.root, left)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Calls that change folders under the mount go through here."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "link", "replace", "unlink", "rmdir"):
                patch.setattr(os, name, self._call(name, getattr(os, name), getattr(self, f"_{name}")))
            patch.setattr(os, "fsync", self._call("fsync", lambda handle: None, self._fsync))
            yield

    def _call(self, name: str, real: Callable[..., Any], note: Callable[..., Callable[[], None]]) -> Callable[..., Any]:
        def call(first: Any, *others: Any, dir_fd: int | None = None) -> None:
            paths = [self._path(first, dir_fd), *(self._path(other) for other in others if not isinstance(other, int))]
            if not paths[0].is_relative_to(self.root):
                return real(first, *others, **({} if dir_fd is None else {"dir_fd": dir_fd}))
            if self.dies_at is not None and len(self.calls) >= self.dies_at:
                raise Killed
            self.calls.append(f"{name} {paths[-1].relative_to(self.root)}")
            noted = note(*paths)
            real(first, *others, **({} if dir_fd is None else {"dir_fd": dir_fd}))
            return noted()

        return call

    def _path(self, named: Any, dir_fd: int | None = None) -> Path:
        if isinstance(named, int):
            return Path(os.readlink(f"/proc/self/fd/{named}"))
        return Path(named) if dir_fd is None else Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / named

    # What each call does: each reads the state first and returns the effects of its success

    def _mkdir(self, path: Path) -> Callable[[], None]:
        return lambda: self._changed(path, Folder())

    def _link(self, source: Path, target: Path) -> Callable[[], None]:
        file = self._file(source)
        return lambda: self._changed(target, file)

    def _replace(self, source: Path, target: Path) -> Callable[[], None]:
        file = self._file(source)

        def moved() -> None:
            self._changed(source, None)
            self._changed(target, file)

        return moved

    def _unlink(self, path: Path) -> Callable[[], None]:
        if os.path.exists(path) and (found := os.stat(path)).st_nlink == 1:
            self._files.pop(found.st_ino, None)  # the number will be another file's
        return lambda: self._changed(path, None)

    def _rmdir(self, path: Path) -> Callable[[], None]:
        return lambda: self._changed(path, None)

    def _fsync(self, path: Path) -> Callable[[], None]:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            return self._folder(path).sync
        return lambda: self._files.update({found.st_ino: File(path.read_bytes(), synced=True)})

    def _file(self, path: Path) -> File:
        return self._files.setdefault(os.stat(path).st_ino, File(path.read_bytes()))

    def _changed(self, path: Path, entry: File | Folder | None) -> None:
        self._folder(path.parent).changes.append((path.name, entry))

    def _folder(self, path: Path) -> Folder:
        folder = self.top
        for name in path.relative_to(self.root).parts:
            found = folder.now()[name]
            assert isinstance(found, Folder), path
            folder = found
        return folder

    def _written(self, path: Path, left: dict[str, Any]) -> Folder:
        """Write what is left. All of it is safe now."""
        path.mkdir()
        folder = Folder()
        for name, entry in left.items():
            if isinstance(entry, dict):
                folder.safe[name] = self._written(path / name, entry)
            else:
                (path / name).write_bytes(entry)
                folder.safe[name] = self._files[os.stat(path / name).st_ino] = File(entry, synced=True)
        return folder


def _left(folder: Folder, choose: Choose) -> dict[str, Any]:
    """A folder's names and their contents after a power failure."""
    left: dict[str, Any] = {}
    for name in sorted(folder.safe.keys() | {name for name, _ in folder.changes}):
        states = folder.states(name)
        entry = states[0] if len(states) == 1 else choose(states)
        if isinstance(entry, Folder):
            left[name] = _left(entry, choose)
        elif entry is not None:
            half = entry.data[: len(entry.data) // 2]
            left[name] = entry.data if entry.synced else choose([b"", half, entry.data])
    return left
