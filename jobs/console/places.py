"""How a command line names captures: STORE, or STORE/DATASET. Does not open them, nor load xarray before it looks."""

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
    """
    around = _names(place.rstrip("/").rpartition("/")[0])
    if around is None:
        return place, store.dataset_names(place)
    path, name = capture_at(place)
    if name not in around:
        raise FileNotFoundError(f"no data set {name!r} in {path}; it holds: {', '.join(around) or 'none'}")
    return path, [name]


def _names(path: str) -> list[str] | None:
    """The data sets of what may be a store."""
    try:
        return store.dataset_names(path) if path else None
    except FileNotFoundError:
        return None
