"""The JSON lines that `analysis.write_replay` writes for a capture, in the form of any engine.

A line has `tokens`, `dtype`, `shape` and `meta_info.routed_experts`, the array's bytes in base64; see
`analysis/exports/replay.py`.
"""

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from workers.imports.files import integers, json_lines
from workers.imports.sequence import Asked, Routed

SUFFIXES = (".jsonl",)


def read(path: Path, asked: Asked) -> Iterator[Routed]:
    """The sequences of a file."""
    for where, line, size in json_lines(path):
        try:
            data = base64.b64decode(line["meta_info"]["routed_experts"], validate=True)
            dtype = np.dtype(line["dtype"]).newbyteorder("<")
            expert = np.frombuffer(data, dtype).reshape(line["shape"])
            name = f"document {line['document']}"
            if dtype.kind not in "iu":
                raise ValueError(f"dtype {line['dtype']} is not an integer type")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{where} is not a line of a replay ({error!r})") from error
        yield Routed(name=name, token=integers(line["tokens"], where), expert=expert, size_bytes=size)
