"""Files and folders that are whole or absent."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Where to write what appears as `path` when the block ends, and not at all if something is raised in it.

    A file that is there is replaced. A killed process leaves a hidden one that ends in ".partial".
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """Where to make what becomes the folder `path` when the block ends, and not at all if something is raised in it.

    A folder that is there is removed then. A killed process leaves a hidden one that ends in ".partial".
    """
    path = Path(path).resolve()
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield unfinished
        if path.exists():
            shutil.rmtree(path)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
