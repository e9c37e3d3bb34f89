"""Files as if they had never been read: for benchmarks of cold starts."""

import os
from pathlib import Path


def drop_from_cache(folder: Path, pattern: str) -> None:
    """So that the next reader of the files in a folder, at any depth, whose names fit reads the disk."""
    for file in folder.rglob(pattern):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
