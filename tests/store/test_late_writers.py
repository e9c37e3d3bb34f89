"""Two workers commit one shard with different results: one is cut off from its driver, so its shard was given to the
other.

Each stops before any of its steps while the other continues, and either may die. Whatever they do, a commit is correct
or invalid: no shard is reported as captured whose objects are not those of its record.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from bucket import Bucket
from fake_model import fake_layout
from hypothesis import example, given, settings
from hypothesis import strategies as st
from more import MORE
from simulated import Process, Watched, small_and_quick

from store import CaptureGroup
from store.group import object_sums
from store.plan import Plan, Rows
from store.verification import verify

LAYOUT = fake_layout()
ROWS = Rows(token=np.ones((4, LAYOUT.sequence_length), np.int32), length=np.full(4, LAYOUT.sequence_length, np.int32))
STEPS = 14
"""Steps of a commit that finds other objects in place of its own."""
LEFT = ("nothing", "one object of the first", "both objects of the second", "one object of a third")


def planned(files: dict[str, bytes]) -> CaptureGroup:
    """One shard, planned."""
    group = opened(files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("store.planned.open_objects", lambda path, scratch: Bucket(scratch, files))
        group = CaptureGroup.create("s", "fake", layout=LAYOUT, identity={"model": "fake"}, attrs={}, pieces=["0", "1"])
    document, zero = np.zeros(4, np.int64), np.arange(4, dtype=np.int32) * LAYOUT.sequence_length
    rows = Rows(token=ROWS.token, length=ROWS.length, document_id=document, offset=zero)
    tokens = int(ROWS.length.sum())
    group.publish(rows, ["one"], Plan(complete=True, rows=4, tokens=tokens, documents=1, pairs_cut=3))
    return group


def opened(files: dict[str, bytes], process: Process | None = None) -> CaptureGroup:
    """The group as seen by a process."""
    group, bucket = CaptureGroup("simulated.zarr", "fake"), Bucket("", files)
    group.objects = bucket if process is None else Watched(bucket, process)  # type: ignore[assignment]
    return group


def routes(of: int) -> dict[str, np.ndarray]:
    """A worker's results: objects of the same lengths, so that lengths reveal nothing."""
    shape = (4, *LAYOUT.arrays()["expert"].trailing)
    drawn = np.random.default_rng(of)
    expert = drawn.integers(0, LAYOUT.num_experts, shape).astype(np.uint8)
    return {"expert": expert, "weight": drawn.random(shape).astype(np.float16)}


@pytest.fixture(scope="module")
def empty() -> Iterator[dict[str, bytes]]:
    """The store with its plan."""
    files: dict[str, bytes] = {}
    with pytest.MonkeyPatch.context() as patch:
        small_and_quick(patch)
        planned(files)
        yield files


def begun(files: dict[str, bytes], left: str) -> dict[str, bytes]:
    """The store in which killed writers have left objects."""
    files = dict(files)
    arrays, of = LAYOUT.arrays(), {LEFT[1]: 1, LEFT[2]: 2, LEFT[3]: 3}.get(left)
    for name in {LEFT[0]: (), LEFT[2]: LAYOUT.routes}.get(left, LAYOUT.routes[:1]):
        files[f"fake/{name}/{arrays[name].key(0)}"] = arrays[name].encode(routes(of or 0)[name])
    return files


def commit(files: dict[str, bytes], process: Process, of: int) -> Callable[[], object]:
    """The work of a worker."""
    group = opened(files, process)
    return lambda: group.commit(0, routes(of), rows=ROWS, facts={"worker": of})


def holds(files: dict[str, bytes]) -> None:
    """A valid commit names existing objects."""
    group = opened(files)
    for record in group.commits()[0].values():
        for name in LAYOUT.routes:
            found = files[f"fake/{name}/{LAYOUT.arrays()[name].key(0)}"]
            assert object_sums(found) == record[name], f"{name} is not what worker {record['worker']} committed"


def both_commit(files: dict[str, bytes], *ways: tuple[int, int | None]) -> None:
    """The first worker stops before a step, then the second; each continues to its end or until it dies."""
    processes = [Process(stops_at=stops) for stops, _ in ways]
    still = [process.start(commit(files, process, of)) for of, process in enumerate(processes, 1)]
    for process, stands, (_, dies) in zip(processes, still, ways, strict=True):
        holds(files)
        if stands:
            process.go_on(acts=dies)
    holds(files)
    for process in processes:
        assert process.error is None or process.dead or "another job" in str(process.error), process.error


def healed(files: dict[str, bytes]) -> None:
    """The next capture does the shard again if it must, and leaves nothing behind."""
    group = opened(files)
    group.take_back_wrong()
    group.drop_void()
    group.commit(0, routes(1), rows=ROWS, facts={"worker": 4})
    assert list(group.commits()[0]) == [0]
    assert not verify(group).shards
    assert not [key for key in files if "/faults/" in key]


WAY = st.tuples(st.integers(0, STEPS), st.none() | st.integers(0, 4))
"""The step before which a worker stops, and the act after that before which it dies."""


@settings(max_examples=100 * MORE, deadline=None, derandomize=MORE == 1)
@example((4, None), (8, None), LEFT[0])  # the first one commits while the second is about to replace its object
@example((4, None), (8, 1), LEFT[0])  # and dies after it
@example((9, None), (8, 1), LEFT[3])  # both have announced that they replace it
@given(WAY, WAY, st.sampled_from(LEFT))
def test_of_two_workers_that_computed_otherwise_a_commit_holds_or_does_not_count(
    empty: dict[str, bytes], first: tuple[int, int | None], second: tuple[int, int | None], left: str
) -> None:
    files = begun(empty, left)
    both_commit(files, first, second)
    healed(files)


REPLACEMENTS = [((first, None), (second, dies)) for first in (4, 5) for second in range(6, 10) for dies in (None, 1)]
"""The second worker is about to replace an object of the first, which commits meanwhile."""


FAULTS: list[tuple[str, Any]] = [
    ("_announce", lambda group, shard: "nobody"),
    ("_settle_doubt", lambda group, shard, writer: group.objects.delete("fake/expert/faults/0.json")),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[name for name, _ in FAULTS])
def test_a_replacement_that_is_not_announced_or_not_looked_at_is_found(
    empty: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str, fault: Any
) -> None:
    monkeypatch.setattr(CaptureGroup, name, fault)

    def look() -> None:
        for case in REPLACEMENTS:
            both_commit(begun(empty, LEFT[0]), *case)

    with pytest.raises(AssertionError, match="is not what worker"):
        look()
