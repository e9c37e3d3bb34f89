"""Read a capture back: every object that its plan counts and every object that a commit record names.

For a committed shard, this finds objects that are missing, truncated, emptied, swapped with others, or have a flipped
bit, and records that cannot be read or belong to another capture. Such a shard is noted in the store, so that the next
capture repairs it. A damaged plan cannot be repaired.

The plan has checksums inside its objects, but no record of what each object holds. Its objects are decoded and compared
with what must be true of a plan: the tokens of a committed shard are those from which it was captured; lengths match
the tokens; documents are consecutive; offsets match documents and lengths; no speaker is named without a token; and
`layer` is the layout's. An object of the plan in the place of another is not found if all this remains true:
uncommitted tokens of rows with the same lengths, or speakers of rows that are not longer. `name` and `piece` are only
decoded: nothing else in the store says what they should hold.

Of each array's `zarr.json` the parts that decide how it is read are compared, but not its attributes. Nothing is said
about uncommitted data, nor about whether the routes are right: only that they are those that were committed.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from store.group import COMMITS, VOID, CaptureGroup, object_sums, tokens_crc32c
from store.layout import MISSING_ROLE
from store.plan import Plan
from store.records import parse_record

THREADS = 8  # arbitrary: number of objects in memory at once
DESCRIBED = ("data_type", "chunk_grid", "chunk_key_encoding", "codecs", "dimension_names", "fill_value")
ROWS = ("length", "document_id", "offset")
# Defaults of fields that a description omits: versions of Zarr differ in what they write.
DEFAULTS: dict[str, dict[str, str]] = {
    "bytes": {"endian": "little"},
    "default": {"separator": "/"},
    "sharding_indexed": {"index_location": "end"},
}
SELF_DESCRIBED = ("blosc",)  # their bytes say how they were compressed

Records = Mapping[int, Mapping[str, Any]]


@dataclass(kw_only=True)
class Findings:
    """What is wrong with a capture."""

    shards: dict[int, str]
    """Committed shards that are damaged, and why; the next capture repairs them."""
    plan: list[str]
    """Faults of the plan, each starting with a key; a capture cannot repair them."""
    unnoted: str | None = None
    """Why a damaged shard could not be noted; the next capture will not know about it."""


def verify(group: CaptureGroup, progress: Callable[[int], None] = lambda tokens: None) -> Findings:
    """Read everything back and note what is damaged; safe while a capture runs.

    Parameters
    ----------
    group
        The data set: `CaptureGroup(path, name)`.
    progress
        Called with the number of tokens of each committed shard after it is read.

    Returns
    -------
    Findings
        Empty if nothing is wrong.

    Raises
    ------
    FileNotFoundError
        When the data set does not exist.
    ValueError
        When it is not a capture of a schema version that this code reads, or the plan's own record is damaged.
    """
    plan = group.plan
    records, wrong = group.commits()
    found = Findings(shards=wrong, plan=metadata_faults(group, plan))
    with _threads() as pool:
        found.plan += filter(None, pool.map(lambda part: _plan_fault(group, *part), _plan_parts(group)))
        chunks = range(0, plan.rows, group.layout.arrays()["length"].step)
        shards = range(-(-plan.rows // group.layout.rows_per_shard))
        rows = pool.map(lambda start: _row_faults(group, start, plan), chunks)
        places = pool.map(lambda shard: _place_faults(group, shard, plan, records), shards)
        found.plan += _one_an_object(chain.from_iterable(chain(rows, places)))
        for shard, reason in zip(records, pool.map(lambda shard: _fault(group, shard, records), records), strict=True):
            if reason is not None:
                found.shards[shard] = reason
                try:
                    group.note_fault(shard, records[shard], reason)
                except OSError as error:
                    found.unnoted = str(error)
            progress(records[shard]["tokens"])
    found.shards = dict(sorted(found.shards.items()))
    return found


# The shards


def verify_shard(group: CaptureGroup, shard: int) -> str | None:
    """The fault of one committed shard, which is noted in the store; None if it is undamaged or not committed."""
    data = group.objects.get(f"{group.dataset}/{COMMITS}/{shard}.json")
    if data is None or data == VOID:
        return None
    record = parse_record(data)
    reason = _fault(group, shard, {shard: record})
    if reason is not None:
        group.note_fault(shard, record, reason)
    return reason


def _fault(group: CaptureGroup, shard: int, records: Records) -> str | None:
    """What is wrong with the objects that a commit record names."""
    for name in group.layout.routes:
        data = group.objects.get(f"{group.dataset}/{name}/{group.layout.arrays()[name].key(shard)}")
        committed = records[shard][name]
        found = None if data is None else object_sums(data)
        if found != committed:
            return f"its {name} shard {_difference(name, found, committed, records)}"
    return _miscount(group, shard, records[shard])


def _miscount(group: CaptureGroup, shard: int, record: Mapping[str, Any]) -> str | None:
    """What is wrong with the counts of a commit record, which nothing else in the record protects."""
    start, stop = group.span(shard, group.plan)
    try:
        token = group.values("token", start, stop)
    except ValueError:  # reported as a fault of the plan
        return None
    counts = record.get("rows"), record["tokens"]
    if counts == (len(token), (token >= 0).sum()) or record.get("token_crc32c") != tokens_crc32c(token):
        return None
    planned = f"{len(token)} and {(token >= 0).sum()} are planned"
    return f"its record counts {counts[0]} rows and {counts[1]} tokens, but {planned}"


def _difference(name: str, found: Mapping[str, Any] | None, committed: Mapping[str, Any], records: Records) -> str:
    if found is None:
        return "is gone"
    if others := [str(shard) for shard, record in records.items() if record[name] == found]:
        return f"holds the bytes of shard {others[0]}"
    if found["bytes"] != committed["bytes"]:
        return f"has {found['bytes']} bytes, but {committed['bytes']} were committed"
    if "sha256" not in committed:
        return "was committed without its sha256 by an earlier version: its bytes cannot be compared"
    return f"is damaged: its sha256 is {found['sha256'][:12]}..., but {committed['sha256'][:12]}... was committed"


# The plan: its arrays' descriptions


def metadata_faults(group: CaptureGroup, plan: Plan) -> list[str]:
    """What is wrong with the arrays' own descriptions, which other readers use."""
    faults, sizes = [], group.plan_sizes()
    for name, spec in group.layout.arrays().items():
        key, size = f"{name}/zarr.json", sizes.get(name, sizes["token"])
        data = group.objects.get(f"{group.dataset}/{key}")
        try:
            found, wanted = parse_record(data or b""), json.loads(spec.metadata(size))
            # An array grows before the plan counts its new rows.
            grown = not plan.complete and spec.grows and found["shape"][0] >= size
            fits = found["shape"] == wanted["shape"] or (grown and found["shape"][1:] == wanted["shape"][1:])
            if not fits:
                faults.append(f"{key} says {found['shape']}, but {wanted['shape']} are planned")
            faults += [
                f"{key} says {field} {found[field]}, but the layout says {wanted[field]}"
                for field in DESCRIBED
                if _as_read(found[field]) != _as_read(wanted[field])
            ]
            if not isinstance(attributes := found.get("attributes", {}), dict):
                faults.append(f"{key} has attributes that are not a mapping: {attributes!r:.80}")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            faults.append(f"{key} {'is gone' if data is None else f'cannot be read ({error!r})'}")
    return faults


def _as_read(described: Any) -> Any:
    """A field of a description with its defaults filled in, without parts that only affect how bytes are written."""
    if isinstance(described, list):
        return [_as_read(part) for part in described]
    if not isinstance(described, dict | str):
        return described
    # Zarr allows just the name.
    named: dict[str, Any] = {"name": described} if isinstance(described, str) else described
    name = named["name"]
    if name in SELF_DESCRIBED:
        return name, {}
    configuration = {**DEFAULTS.get(name, {}), **(named.get("configuration") or {})}
    return name, {key: _as_read(value) for key, value in configuration.items()}


# The plan: what its arrays hold


def _plan_parts(group: CaptureGroup) -> Iterator[tuple[str, int, int]]:
    """The array, the first entry and the entry after the last, for every object of the plan that has no rows."""
    sizes = group.plan_sizes()
    for name in ("name", "piece", "layer"):
        step = group.layout.arrays()[name].step
        yield from ((name, start, min(start + step, sizes[name])) for start in range(0, sizes[name], step))


def _plan_fault(group: CaptureGroup, name: str, start: int, stop: int) -> str | None:
    try:
        values = group.values(name, start, stop)
    except ValueError as error:
        return str(error)
    if name == "layer" and tuple(values.tolist()) != group.layout.layers:
        return f"{_key(group, name, start)} says {values.tolist()}, but the layout says {list(group.layout.layers)}"
    return None


def _row_faults(group: CaptureGroup, start: int, plan: Plan) -> list[str]:
    """What is wrong with lengths, documents and offsets of one chunk of rows, read with the row before it."""
    first, stop = max(0, start - 1), min(start + group.layout.arrays()["length"].step, plan.rows)
    columns, faults = {}, []
    for name in ROWS:
        try:
            columns[name] = group.values(name, first, stop).astype(np.int64)
        except ValueError as error:
            faults.append(str(error))
    fault = None if faults else _document_fault(group, first, columns["document_id"], plan)
    if not faults and fault is None:
        fault = _offset_fault(group, first, **columns)
    return faults if fault is None else [fault]


def _document_fault(group: CaptureGroup, first: int, document_id: np.ndarray, plan: Plan) -> str | None:
    documents = plan.documents + (plan.rows_of_next_document > 0)
    if (index := _first(document_id != document_id.clip(0, documents - 1))) is not None:
        key = _key(group, "document_id", first + index)
        return f"{key} says document {document_id[index]} for row {first + index}, but {documents} are planned"
    if (index := _first(np.diff(document_id) < 0)) is not None:
        key, (before, after) = _key(group, "document_id", first + index + 1), document_id[index : index + 2]
        return f"{key} says document {after} for row {first + index + 1}, but the previous row is of document {before}"
    return None


def _offset_fault(
    group: CaptureGroup, first: int, length: np.ndarray, document_id: np.ndarray, offset: np.ndarray
) -> str | None:
    """Offsets count a document's tokens before the row, without any BOS: see `workers.text.rows.document_rows`."""
    rule = group.identity.get("bos")
    has_bos = (rule == "row") | ((rule == "document") & (offset == 0))
    wanted = np.where(np.diff(document_id) > 0, 0, (offset + length - has_bos)[:-1])
    wanted = np.concatenate([offset[:1] if first else [0], wanted])  # the row before the chunk belongs to another check
    if (index := _first(offset != wanted)) is None:
        return None
    row = first + index
    return (
        f"{_key(group, 'offset', row)} does not match {_key(group, 'document_id', row)}, {_key(group, 'length', row)}:"
        f" it says {offset[index]} for row {row}, but {wanted[index]} follows from them"
    )


def _place_faults(group: CaptureGroup, shard: int, plan: Plan, records: Records) -> list[str]:
    """What is wrong with a shard's tokens, lengths and speakers.

    If tokens are not those of the commit, or lengths do not match uncommitted tokens, it is not known which of the two
    is wrong; the tokens are named first.
    """
    start, stop = group.span(shard, plan)
    try:
        token = group.values("token", start, stop)
    except ValueError as error:
        return [str(error)]
    if shard in records and records[shard].get("token_crc32c") != tokens_crc32c(token):
        return [f"{_key(group, 'token', start)} holds other tokens than those from which shard {shard} was captured"]
    faults = [_length_fault(group, start, token, shard in records)]
    faults += [_label_fault(group, name, start, token) for name in group.layout.labels]
    return [fault for fault in faults if fault is not None]


def _length_fault(group: CaptureGroup, start: int, token: np.ndarray, committed: bool) -> str | None:
    try:
        length = group.values("length", start, start + len(token))
    except ValueError as error:
        return str(error)
    filled = np.arange(group.layout.sequence_length) < length[:, None]
    wrong = (length < 1) | (length > group.layout.sequence_length) | ((token >= 0) != filled).any(axis=1)
    if (index := _first(wrong)) is None:
        return None
    keys = [_key(group, "token", start + index), _key(group, "length", start + index)]
    one, other = reversed(keys) if committed else keys
    tokens = (token[index] >= 0).sum()
    return f"{one} does not match {other}: row {start + index} has {tokens} tokens, but its length is {length[index]}"


def _label_fault(group: CaptureGroup, name: str, start: int, token: np.ndarray) -> str | None:
    try:
        label = group.values(name, start, start + len(token))
    except ValueError as error:
        return str(error)
    if (index := _first(((token < 0) & (label != MISSING_ROLE)).any(axis=1))) is None:
        return None
    own_key, token_key = (_key(group, each, start + index) for each in (name, "token"))
    what = "a speaker" if name == "role" else "a phase"
    return f"{own_key} does not match {token_key}: it names {what} in row {start + index} where there is no token"


def _first(wrong: np.ndarray) -> int | None:
    return int(wrong.argmax()) if wrong.any() else None


def _key(group: CaptureGroup, name: str, entry: int) -> str:
    """Key of the object that holds an entry of an array."""
    spec = group.layout.arrays()[name]
    return f"{name}/{spec.key(entry // spec.step)}"


def _one_an_object(faults: Iterable[str]) -> list[str]:
    """The first fault of each object: a fault of one chunk of rows is found again by each of its shards."""
    first: dict[str, str] = {}
    for fault in faults:
        first.setdefault(fault.partition(" ")[0], fault)
    return list(first.values())


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # when interrupted, only reads that have started are finished
