"""The plain form, which can be written from any arrays of tokens and experts: JSON lines, Parquet or npz.

One sequence has

- `token`: ids (tokens); or `text`, which needs a tokenizer;
- `expert`: ids (tokens, layers, k), the largest weight first if that is known; -1 in all layers if a token's experts
  are not known. Those of the last token may be missing;
- `weight`, optional: like `expert`;
- `document`, optional: its name;
- `phase`, optional: "prompt" or "generated" for each token, or 0 and 1; or one number, the number of prompt tokens;
- `start`, optional: the number of tokens before the first one that has routes.

In **JSON lines** a sequence is an object, in **Parquet** a row with nested lists. In **npz** sequences are rows of
arrays: `token` (rows, P) with -1 after the last token, `expert` (rows, P, layers, k), optional `weight` like it,
`document` (rows) text, `phase` (rows, P). Values after a row's tokens are ignored.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.layout import MISSING_ROLE, PHASES
from workers.imports.files import integers, json_lines, rows_of, shapes_of
from workers.imports.sequence import Asked, Routed

SUFFIXES = (".jsonl", ".json", ".parquet", ".npz")
KNOWN = {"token", "text", "expert", "weight", "document", "phase", "start"}
ROWS_AT_ONCE = 64


def read(path: Path, asked: Asked) -> Iterator[Routed]:
    """The sequences of a file."""
    readers = {".parquet": _parquet, ".npz": _npz}
    yield from readers.get(path.suffix, _json)(path)


def _json(path: Path) -> Iterator[Routed]:
    for number, (where, line, size) in enumerate(json_lines(path)):
        yield _routed(line, f"{path.stem} {number}", where, size)


def _parquet(path: Path) -> Iterator[Routed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is not a Parquet file ({error})") from error
    size, number = path.stat().st_size // max(1, file.metadata.num_rows), 0
    with file:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            for index in range(batch.num_rows):
                row = {name: _nested(batch.column(name), index) for name in batch.schema.names}
                known = {name: value for name, value in row.items() if value is not None}
                yield _routed(known, f"{path.stem} {number}", f"{path}, row {number}", size)
                number += 1


def _nested(column: Any, index: int) -> Any:
    """A row of a column: nested lists of equal lengths as an array, without a Python object for each value."""
    value, shape = column[index], list[int]()
    if not value.is_valid:
        return None
    if not hasattr(value, "values") or value.values is None:
        return value.as_py()
    values, outer = value.values, 1
    while hasattr(values, "flatten") and hasattr(values.type, "value_type"):
        shape.append(len(values))
        values = values.flatten()
    if str(values.type) in ("string", "large_string"):
        return value.as_py()
    lengths = []
    for total in shape:
        lengths.append(total // outer if outer else 0)
        outer = total
    flat = values.to_numpy(zero_copy_only=False)
    lengths.append(len(flat) // outer if outer else 0)
    return flat.reshape(lengths)


def _npz(path: Path) -> Iterator[Routed]:
    names = set(shapes_of(path))
    if wrong := sorted(names - KNOWN) or sorted({"token", "expert"} - names):
        raise ValueError(f"{path} has {', '.join(sorted(names))}: {wrong[0]} is unknown or missing")
    parts = {name: rows_of(path, name, ROWS_AT_ONCE) for name in sorted(names)}
    number = 0
    for some in zip(*parts.values(), strict=True):
        columns = dict(zip(parts, some, strict=True))
        for index, token in enumerate(columns["token"]):
            tokens = int((token < 0).argmax()) if (token < 0).any() else len(token)
            row = {
                name: values[index][:tokens] if name in ("token", "expert", "weight", "phase") else values[index]
                for name, values in columns.items()
            }
            yield _routed(row, f"{path.stem} {number}", f"{path}, row {number}", sum(v[index].nbytes for v in some))
            number += 1


def _routed(row: Mapping[str, Any], name: str, where: str, size: int) -> Routed:
    """One sequence, from its fields."""
    if unknown := sorted(row.keys() - KNOWN):
        raise ValueError(f"{where} has {unknown[0]!r}; the plain form knows {', '.join(sorted(KNOWN))}")
    if "expert" not in row or not {"token", "text"} & row.keys():
        raise ValueError(f"{where} has {', '.join(row)}: expert, and token or text, are needed")
    phase = row.get("phase")
    single = phase is not None and np.ndim(phase) == 0
    return Routed(
        name=str(row.get("document", name)),
        token=integers(row["token"], f"{where}, token") if "token" in row else None,
        text=row.get("text"),
        expert=integers(row["expert"], f"{where}, expert"),
        weight=None if row.get("weight") is None else np.asarray(row["weight"], dtype=np.float32),
        start=int(row.get("start", 0)),
        prompt=int(phase) if single and phase is not None else None,
        phase=None if phase is None or single else _phases(phase, where),
        size_bytes=size,
    )


def _phases(phase: Any, where: str) -> NDArray[np.integer]:
    """Phases as numbers, from names or numbers."""
    found = np.asarray(phase)
    if found.dtype.kind in "iu":
        return found
    places = {name: number for number, name in enumerate(PHASES)} | {None: MISSING_ROLE}
    try:
        return np.array([places[label] for label in phase], dtype=np.int64)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: phase holds {error}, but must hold {' or '.join(PHASES)}") from error
