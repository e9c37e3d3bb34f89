"""How a command line names captures, STORE or STORE/DATASET, and files to write.

Does not open captures, nor load xarray before it looks.
"""

from pathlib import Path

import store


def capture_at(place: str) -> tuple[str, str]:
    """The store and the data set that STORE/DATASET names, there or not.

    Raises
    ------
    ValueError
        When it is one word.
    """
    path, slash, name = place.rstrip("/").rpartition("/")
    if not slash:
        raise ValueError(f"{place!r} is no STORE/DATASET, such as demo.zarr/demo-prose")
    return path, name


def captures_at(place: str) -> tuple[str, list[str]]:
    """The store that STORE or STORE/DATASET names, and all its data sets, or that one.

    Raises
    ------
    FileNotFoundError
        When there is no such store, or no such data set in it.
    ValueError
        When the store is empty.
    """
    around = _names(place.rstrip("/").rpartition("/")[0])
    if around is None:
        return place, datasets_of(place)
    path, name = capture_at(place)
    if name not in around:
        raise FileNotFoundError(f"no data set {name!r} in {path}; it holds: {', '.join(around) or 'none'}")
    return path, [name]


def datasets_of(path: str) -> list[str]:
    """The data sets of a store, of which there must be one.

    Raises
    ------
    FileNotFoundError
        When there is no such store.
    ValueError
        When it is empty.
    """
    names = store.dataset_names(path)
    if not names:
        raise ValueError(f"{path} holds no data set yet")
    return names


def only_one(path: str, names: list[str]) -> str:
    """The one data set that was named.

    Raises
    ------
    ValueError
        When there are several; it lists them.
    """
    if len(names) > 1:
        raise ValueError(f"{path} holds {', '.join(names)}: say which, as {path.rstrip('/')}/{names[0]}")
    return names[0]


def refuse_no_file(option: str, output: Path) -> None:
    """Refuse a path where no file can be written."""
    if not output.absolute().parent.is_dir() or output.is_dir():
        raise ValueError(f"--{option} {output}: its folder must exist, and it must not be a folder itself")


def _names(path: str) -> list[str] | None:
    """The data sets of what may be a store."""
    try:
        return store.dataset_names(path) if path else None
    except (FileNotFoundError, ValueError):  # no store, or what can be none, such as a bucket's root
        return None
