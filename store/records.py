"""Convert JSON records to an object's bytes and back.

JSON that someone else may have written or damaged is always read here: any fault is a ValueError.
"""

import json
from collections.abc import Mapping
from typing import Any


def as_json(record: Mapping[str, Any]) -> bytes:
    """A record as an object's bytes."""
    return json.dumps(record, indent=1, sort_keys=True).encode()


def parse_json(data: bytes | str) -> Any:
    """A value from JSON.

    Raises
    ------
    ValueError
        When it is not JSON, or is nested too deeply for Python.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_record(data: bytes) -> dict[str, Any]:
    """A record from an object's bytes.

    Raises
    ------
    ValueError
        When they do not hold a record; the message is meant to follow the object's name.
    """
    try:
        record = parse_json(data)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"holds {type(record).__name__}, not a record")
    return record
