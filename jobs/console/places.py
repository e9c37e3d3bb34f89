"""How captures, and files to write, are named on the command line.

A place is STORE/DATASET, or STORE for all data sets of a store; if one capture is needed, STORE is sufficient if it has
only one. Does not open captures or load xarray.
"""

from collections.abc import Iterable
from pathlib import Path

import store


def captures_at(place: str) -> tuple[str, list[str]]:
    """The store of a place, without a trailing slash, and all its data sets or the named one.

    Raises
    ------
    FileNotFoundError
        When there is no such store, or no such data set in it.
    ValueError
        When the store is empty.
    """
    place = place.rstrip("/") or place
    path, slash, name = place.rpartition("/")
    path = path.rstrip("/") or path
    around = _names(path)
    if around is None:
        return place, _all(place, f", and {path} is not a store" * bool(slash))
    if name not in around:
        raise FileNotFoundError(f"no data set {name!r} in {path}; it has: {', '.join(around) or 'none'}")
    return path, [name]


def capture_at(place: str) -> tuple[str, str]:
    """The store and the one data set that a place names.

    Raises
    ------
    FileNotFoundError
        Like `captures_at`.
    ValueError
        When there are several (the message lists them) or none.
    """
    path, names = captures_at(place)
    if len(names) > 1:
        raise ValueError(f"{path} has several data sets ({', '.join(names)}): name one, such as {path}/{names[0]}")
    return path, names[0]


def by_store(places: Iterable[str]) -> dict[str, list[str]]:
    """The data sets that some places name, by store, each once and in the given order; raises like `captures_at`."""
    found: dict[str, list[str]] = {}
    for path, names in map(captures_at, places):
        known = found.setdefault(path, [])
        known += [name for name in names if name not in known]
    return found


def refuse_no_file(option: str, output: Path) -> None:
    """Raise for a path where no file can be written."""
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise ValueError(f"--{option} {output}: its folder must exist, and it must not be a folder itself")


def _all(path: str, beside: str) -> list[str]:
    """The data sets of a store, which must have at least one."""
    try:
        names = store.dataset_names(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{beside}") from error
    if not names:
        raise ValueError(f"{path} has no data set yet")
    return names


def _names(path: str) -> list[str] | None:
    """The data sets at a path that may be a store."""
    try:
        return store.dataset_names(path) if path else None
    except (FileNotFoundError, ValueError):  # not a store, or a path that cannot be one, such as a bucket's root
        return None
