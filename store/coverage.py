"""How much of a capture is there: what `status` prints and what a reader is told."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
    """Shards whose commit record does not hold, and why; they are among `missing`."""
    quarantined: dict[int, dict[str, Any]]
    """Shards that were set aside after they failed again and again, with their records; they are among `missing`."""
    lost: list[str]
    """Objects of the plan that are gone: the capture cannot be trusted, nor healed without planning again."""
    tokens_done: int
    bytes_done: int
    """Bytes of the committed `expert` and `weight` shards."""
    seconds: float
    """Sum of the seconds that workers spent on the committed shards."""
    sums: dict[int, str]
    """Of each committed shard, SHA-256 of what its record says of its tokens and objects: equal for equal bytes."""
    digest: str
    """SHA-256 of what is planned and committed, to the checksums of the shards' objects: equal for equal bytes."""

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
        planned = "" if self.plan.complete else ", and its text is not planned to the end"
        return (
            f"{self.dataset}: {self.shards_done} of {self.shards_total} shards are committed{planned};"
            f" missing shards: {_ranges(self.missing) or 'none'}{_set_aside(self.quarantined)}"
        )


def coverage(path: Path | str, dataset: str) -> Coverage:
    """Count what is planned and committed of one data set; safe while a capture runs.

    Parameters
    ----------
    path
        The store.
    dataset
        Its group in the store.

    Returns
    -------
    Coverage
        What is there now.

    Raises
    ------
    FileNotFoundError
        When the store or the data set does not exist.
    """
    group = CaptureGroup(path, dataset)
    valid, wrong = group.commits()
    plan, total = group.plan, group.num_shards
    done = [record for shard, record in valid.items() if shard < total]
    sums = {
        shard: _hash([record.get("token_crc32c"), record["expert"], record["weight"]])
        for shard, record in valid.items()
        if shard < total
    }
    held = [[shard, valid[shard]["expert"], valid[shard]["weight"]] for shard in sorted(valid) if shard < total]
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
        tokens_done=sum(record["tokens"] for record in done),
        bytes_done=sum(record["expert"]["bytes"] + record["weight"]["bytes"] for record in done),
        seconds=sum(record.get("seconds", 0.0) for record in done),
        sums=sums,
        digest=_hash([asdict(plan), held]),
    )


def _hash(about: object) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _set_aside(quarantined: Mapping[int, Mapping[str, Any]]) -> str:
    """'; in quarantine: 3 (RoutingError: ...)', with the first line of the first error of each; at most three."""
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
