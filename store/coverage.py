"""How much of a capture exists: what `status` prints and readers are warned about."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.group import CaptureGroup
from store.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """One data set's state, counted from its plan and its valid commit records."""

    dataset: str
    plan: Plan
    shards_total: int
    """Shards planned so far; final once `plan.complete`."""
    missing: list[int]
    """Planned shards without a valid commit."""
    wrong: dict[int, str]
    """Shards whose commit record is not valid, and why; they are included in `missing`."""
    quarantined: dict[int, dict[str, Any]]
    """Shards that were quarantined after repeated failures, with their records; they are included in `missing`."""
    lost: list[str]
    """Objects of the plan that are missing: the capture cannot be trusted, and cannot be repaired without planning
    again."""
    tokens_done: int
    bytes_done: int
    """Bytes of the routes' committed shards."""
    seconds: float
    """Sum of the seconds that workers spent on the committed shards."""
    sums: dict[int, str]
    """For each committed shard, the SHA-256 of its record's entries for tokens and objects: equal for equal bytes."""
    digest: str
    """SHA-256 of the plan and the commits, including the checksums of the shards' objects: equal for equal bytes."""

    @property
    def shards_done(self) -> int:
        """Planned shards with a valid commit."""
        return self.shards_total - len(self.missing)

    @property
    def complete(self) -> bool:
        """Whether every row of the data set is planned and committed."""
        return self.plan.complete and not self.missing and not self.lost

    def __str__(self) -> str:
        if self.complete:
            return f"{self.dataset}: complete, {self.shards_total} shards, {self.tokens_done:,} tokens"
        if self.lost:
            return (
                f"{self.dataset}: {len(self.lost)} objects of the plan are lost, first {self.lost[0]}; remove the"
                f" folder {self.dataset} and capture it again"
            )
        planned = "" if self.plan.complete else ", and its text is not completely planned"
        return (
            f"{self.dataset}: {self.shards_done} of {self.shards_total} shards are committed{planned};"
            f" missing shards: {_ranges(self.missing) or 'none'}{_set_aside(self.quarantined)}"
        )


def coverage(path: Path | str, dataset: str) -> Coverage:
    """Count what is planned and committed of one data set; safe while a capture runs.

    Parameters
    ----------
    path
        The store: a folder, or s3://bucket/prefix.
    dataset
        Its group in the store.

    Returns
    -------
    Coverage
        Counted from the plan and the commit records. The committed data are not read back; `verify` does that.

    Raises
    ------
    FileNotFoundError
        When the store or the data set does not exist.
    ValueError
        When the group is not a capture of a schema version that this code reads, or its plan is damaged.
    """
    group = CaptureGroup(path, dataset)
    valid, wrong = group.commits()
    plan, total = group.plan, group.num_shards
    done = {shard: record for shard, record in valid.items() if shard < total}
    objects = {shard: [record[name] for name in group.layout.routes] for shard, record in done.items()}
    return Coverage(
        dataset=dataset,
        plan=plan,
        shards_total=total,
        missing=[shard for shard in range(total) if shard not in valid],
        wrong=wrong,
        quarantined={
            shard: record for shard, record in group.quarantined().items() if shard < total and shard not in valid
        },
        lost=group.lost(),
        tokens_done=sum(record["tokens"] for record in done.values()),
        bytes_done=sum(each["bytes"] for found in objects.values() for each in found),
        seconds=sum(record.get("seconds", 0.0) for record in done.values()),
        sums={shard: _hash([record.get("token_crc32c"), *objects[shard]]) for shard, record in done.items()},
        digest=_hash([plan.record(), [[shard, *objects[shard]] for shard in sorted(objects)]]),
    )


def _hash(about: object) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _set_aside(quarantined: Mapping[int, Mapping[str, Any]]) -> str:
    """'; in quarantine: 3 (RoutingError: ...)', with the first line of the first error of each, at most three."""
    if not quarantined:
        return ""
    names = []
    for shard, record in list(quarantined.items())[:3]:
        lines = str(next(iter(record.get("errors") or ()), "")).splitlines()
        names.append(f"{shard} ({lines[0]})" if lines else str(shard))
    names += [f"and {len(quarantined) - 3} more"] * (len(quarantined) > 3)
    return f"; in quarantine: {', '.join(names)}"


def _ranges(shards: list[int]) -> str:
    """'0-3, 7' for [0, 1, 2, 3, 7]; at most ten ranges are named."""
    ranges: list[list[int]] = []
    for shard in shards:
        if ranges and shard == ranges[-1][1] + 1:
            ranges[-1][1] = shard
        else:
            ranges.append([shard, shard])
    names = [str(a) if a == b else f"{a}-{b}" for a, b in ranges[:10]]
    return ", ".join(names + [f"and {len(ranges) - 10} more ranges"] * (len(ranges) > 10))
