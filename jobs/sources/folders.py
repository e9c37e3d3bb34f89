"""The files of a folder that are its data.

Promises: nothing is left out without a note. Left out are hidden files, files of tools, stores, and links except for
those in a hub's cache, which consists of links.
"""

import os
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

LEFT_BY_TOOLS = (
    *("_SUCCESS", "_committed_*", "_started_*", "_temporary", "_metadata", "_common_metadata", "_delta_log", "*.crc"),
    *("__MACOSX", "Thumbs.db", "desktop.ini", "__pycache__"),
)
"""Names of files that Spark, Hadoop, archivers and desktops leave next to data."""
STORE_MARKS = ("zarr.json", ".zgroup", ".zarray")
"""The files in the folder of a Zarr store."""
LINKED = "hidden or linked"
"""The reason in a note for entries that are left out because of their name or because they are links."""
RESULTS_SUFFIX = ".results"
"""The suffix of a folder with results of the store of that name."""


def walked(folder: Path) -> tuple[dict[str, Path], str | None]:
    """Return the data files below a folder, name → path by name, and a note about what was left out.

    Raises
    ------
    ValueError
        When a folder cannot be read, is itself a store, or has no such files; the message says what it has.
    """
    files, left_out = dict[str, Path](), Counter[str]()

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    if is_store(folder):
        raise ValueError(f"{folder} is a Zarr store or its results, not a folder of texts; use the folder of the texts")
    for root, folders, names in os.walk(folder, onerror=refuse):
        reasons = {entry: why_left_out(Path(root, entry)) for entry in folders + names}
        left_out.update(filter(None, reasons.values()))
        folders[:] = [entry for entry in folders if reasons[entry] is None]
        kept = [Path(root, entry) for entry in names if reasons[entry] is None]
        files |= {path.relative_to(folder).as_posix(): path for path in kept if path.is_file()}
    listed = ", ".join(f"{number} {reason}" for reason, number in sorted(left_out.items()))
    note = f"{listed} entries of {folder} left out" if listed else None
    if not files:
        links = "; links are followed in a glob such as 'folder/*'" if left_out[LINKED] else ""
        raise ValueError(f"the folder {folder} contains no files to read" + (f" ({note}{links})" if note else ""))
    return dict(sorted(files.items())), note


def why_left_out(path: Path) -> str | None:
    """Return the reason for leaving out an entry of a folder, or None."""
    if path.name.startswith(".") or (path.is_symlink() and not is_cached(path)):
        return LINKED
    if any(fnmatch(path.name, pattern) for pattern in LEFT_BY_TOOLS):
        return "auxiliary"
    return "store's" if path.is_dir() and is_store(path) else None


def is_store(folder: Path) -> bool:
    """Whether a folder is a Zarr store, or holds its results."""
    store = folder.name.removesuffix(RESULTS_SUFFIX)
    beside = [folder, *([folder.with_name(store)] if store not in ("", folder.name) else [])]
    return any(os.path.isfile(place / mark) for place in beside for mark in STORE_MARKS)


def is_cached(link: Path) -> bool:
    """Whether a link leads from a snapshot in a hub's cache to a file of the same repository, like all links there."""
    target = Path(os.path.realpath(link))  # Path.resolve raises a RuntimeError for a link to itself
    repository = target.parent.parent
    return (
        os.path.isfile(target)
        and target.parent.name == "blobs"
        and repository / "snapshots" in link.parent.resolve().parents
    )
