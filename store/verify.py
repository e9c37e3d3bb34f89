"""Reading a capture back: every object that its plan counts, and every one that a commit record names.

Found is what is gone, cut, emptied, put in the place of another, or has a bit flipped, and a record that cannot be read
or is of another capture. A damaged shard is noted in the store, so that the next capture heals it; a damaged plan is
beyond healing. Nothing is known here of what is not committed, nor whether the routes are right: only that they are
those that were committed.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from store.group import CaptureGroup, object_sums, tokens_crc32c
from store.plan import Plan
from store.planned import ROUTES, parse_record

THREADS = 8  # arbitrary: so many objects are held in memory at once
DESCRIBED = ("data_type", "chunk_grid", "dimension_names", "fill_value")

Records = Mapping[int, Mapping[str, Any]]


@dataclass(kw_only=True)
class Findings:
    """What is wrong with a capture."""

    shards: dict[int, str]
    """Committed shards that do not hold, and why: the next capture heals them."""
    plan: list[str]
    """What is wrong with the plan, each beginning with a key: no capture heals it."""
    unnoted: str | None = None
    """Why a damaged shard could not be noted: the next capture will not know of it."""


def verify(group: CaptureGroup, progress: Callable[[int], None] = lambda tokens: None) -> Findings:
    """Read everything back, and note what is damaged; safe while a capture runs.

    Parameters
    ----------
    progress
        Told of the tokens of each committed shard when it was read.
    """
    plan = group.plan
    records, wrong = group.commits()
    found = Findings(shards=wrong, plan=_metadata_faults(group))
    with _threads() as pool:
        found.plan += filter(None, pool.map(lambda part: _plan_fault(group, *part), _plan_parts(group)))
        planned = range(-(-plan.rows // group.layout.rows_per_shard))
        found.plan += filter(None, pool.map(lambda shard: _token_fault(group, shard, plan, records), planned))
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


def _fault(group: CaptureGroup, shard: int, records: Records) -> str | None:
    """What is wrong with the objects that a commit record names."""
    for name in ROUTES:
        data = group.objects.get(f"{group.dataset}/{name}/{group.layout.arrays()[name].key(shard)}")
        committed = records[shard][name]
        found = None if data is None else object_sums(data)
        if found != committed:
            return f"its {name} shard {_difference(name, found, committed, records)}"
    return None


def _difference(name: str, found: Mapping[str, Any] | None, committed: Mapping[str, Any], records: Records) -> str:
    if found is None:
        return "is gone"
    if others := [str(shard) for shard, record in records.items() if record[name] == found]:
        return f"holds the bytes of shard {others[0]}"
    if found["bytes"] != committed["bytes"]:
        return f"has {found['bytes']} bytes, {committed['bytes']} were committed"
    if "sha256" not in committed:
        return "was committed without its sha256, by an earlier version: its bytes cannot be compared"
    return f"is damaged: its sha256 is {found['sha256'][:12]}..., {committed['sha256'][:12]}... was committed"


# The plan


def _metadata_faults(group: CaptureGroup) -> list[str]:
    """What is wrong with the arrays' own descriptions."""
    faults, sizes = [], group.plan_sizes()
    for name, spec in group.layout.arrays().items():
        key, size = f"{name}/zarr.json", sizes.get(name, sizes["token"])
        data = group.objects.get(f"{group.dataset}/{key}")
        try:
            found, wanted = parse_record(data or b""), json.loads(spec.metadata(size))
            # An array grows before the plan counts its new rows.
            if found["shape"][0] < size or found["shape"][1:] != wanted["shape"][1:]:
                faults.append(f"{key} says {found['shape']}, {wanted['shape']} are planned")
            faults += [
                f"{key} says {field} {found[field]}, and the layout {wanted[field]}"
                for field in DESCRIBED
                if found[field] != wanted[field]
            ]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            faults.append(f"{key} {'is gone' if data is None else f'cannot be read ({error!r})'}")
    return faults


def _plan_parts(group: CaptureGroup) -> Iterator[tuple[str, int, int]]:
    """Array, first entry and the one after the last, of every object that planning fills; tokens apart."""
    for name, size in group.plan_sizes().items():
        step = group.layout.arrays()[name].step
        if name != "token":
            yield from ((name, start, min(start + step, size)) for start in range(0, size, step))


def _plan_fault(group: CaptureGroup, name: str, start: int, stop: int) -> str | None:
    try:
        group.values(name, start, stop)
    except ValueError as error:
        return str(error)
    return None


def _token_fault(group: CaptureGroup, shard: int, plan: Plan, records: Records) -> str | None:
    """What is wrong with a shard's tokens; if they are not those of its commit, which of the two cannot be told."""
    try:
        token = group.values("token", *group.span(shard, plan))
    except ValueError as error:
        return str(error)
    if shard in records and records[shard].get("token_crc32c") != tokens_crc32c(token):
        key = group.layout.arrays()["token"].key(shard)
        return f"token/{key} holds other tokens than shard {shard} was captured from"
    return None


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # when interrupted, only what has begun is read to its end
