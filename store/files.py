"""Files and folders that are either complete or absent."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """A place to write a file that appears as `path` when the block ends, or not at all if the block raises an error.

    An existing file is replaced. A killed process leaves a hidden file that ends in ".partial".
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
    """A place to create the folder that appears as `path` when the block ends, or not at all if the block raises an
    error.

    An existing folder is removed then. A killed process leaves a hidden folder that ends in ".partial".
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
