"""What is kept as JSON, to an object's bytes and back.

Whoever reads JSON that somebody else may have written, or damaged, reads it here: whatever is wrong is a ValueError.
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
        When it is none, or one list in another for so long that Python cannot follow.
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
        When they hold none; the message is to follow the object's name.
    """
    try:
        record = parse_json(data)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"holds {type(record).__name__}, not a record")
    return record
