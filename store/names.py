"""The data sets of a store, and the place of what is derived from it. Imports nothing that only readers need."""

from pathlib import Path

from store.objects import open_objects
from store.records import parse_json


def dataset_names(path: Path | str) -> list[str]:
    """Names of the data sets in a store, sorted.

    Parameters
    ----------
    path
        The store: a folder, or s3://bucket/prefix.

    Returns
    -------
    list of str
        The groups' names.

    Raises
    ------
    FileNotFoundError
        When there is no store at `path`.
    """
    objects = open_objects(path, scratch="")
    if objects.get("zarr.json") is None:
        gone = isinstance(objects.root, Path) and not objects.root.exists()
        raise FileNotFoundError(f"no store at {objects.root} ({'no such folder' if gone else 'it has no zarr.json'})")
    found = objects.get_many([f"{name}/zarr.json" for name in objects.folders("")])
    return [key.removesuffix("/zarr.json") for key, data in found.items() if not _is_array(data)]


def _is_array(metadata: bytes) -> bool:
    try:
        return bool(parse_json(metadata)["node_type"] == "array")
    except (ValueError, KeyError, TypeError):
        return False  # opening it reports what is wrong


def beside(path: Path | str) -> str:
    """The place of what is derived from a store: next to the store, in a folder or a bucket."""
    return f"{str(path).rstrip('/')}.results"
