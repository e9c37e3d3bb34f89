"""The law for every store, whatever happened to it: it equals a clean serial run, or says what is missing.

Equality is byte for byte; for a commit record, it concerns what the record says about its shard. If an object was
damaged without a change of length, and not verified yet, decoding it must fail or return the captured values. The law
is checked within `simulated.simulation`, for any kind of store.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from fake_model import fake_layout
from simulated import NAME, STORE

from store import CaptureGroup, Coverage, coverage, dataset_names
from store.plan import Plan
from store.reader import open_covered
from store.records import parse_record

Files = Mapping[str, bytes]
LEASE, PARTIAL = f"{NAME}/token/lease.json", f"{NAME}/token/partial"
ROUTES = fake_layout().routes
HELD = ("identity", "shard", "rows", "tokens", "token_crc32c", *ROUTES)
"""Fields of a commit record about its shard; the rest is about the worker and its speed."""


def held(files: Files) -> dict[str, Any]:
    """All objects that must equal those of the clean run, without marks of a current writer."""
    kept = {key: data for key, data in files.items() if key != LEASE and not key.startswith(PARTIAL)}
    return kept | {key: held_record(data) for key, data in kept.items() if "/commits/" in key}


def held_record(data: bytes) -> Any:
    """What a commit record says about its shard, or its bytes if it says nothing."""
    try:
        return {name: parse_record(data).get(name) for name in HELD}
    except ValueError:
        return data


def differing(files: Files, clean: Files) -> list[str]:
    """Keys at which two stores differ."""
    one, other = held(files), held(clean)
    return sorted(key for key in one | other if one.get(key) != other.get(key))


class Law:
    """The law, for one store.

    Parameters
    ----------
    snapshot
        Returns every current object of the store by its key.
    clean
        The objects of a clean serial run.
    """

    def __init__(self, snapshot: Callable[[], Files], clean: Files) -> None:
        self.snapshot, self.clean = snapshot, clean
        self.silent: set[str] = set()
        """Keys of objects that were damaged without a change of length since the last verification."""
        self.plan_hurt = False
        """Whether the plan was damaged: the error then says to remove the folder."""

    def state(self) -> Coverage | None:
        """The reported coverage; None if the report is that there is no capture, or that its plan is damaged."""
        if "zarr.json" not in self.snapshot() or NAME not in dataset_names(STORE):
            return None
        try:
            return coverage(STORE, NAME)
        except ValueError:
            if not self.plan_hurt:
                raise
        return None

    def holds(self) -> None:
        """Nothing that is reported as present differs from the clean run."""
        state, files = self.state(), self.snapshot()
        if state is None:
            return
        for shard in committed(state):
            for name in ROUTES:
                self._is_measured(name, shard, files)
        if not self.plan_hurt:
            assert state.lost == []
            self._is_planned(state.plan, files)
            if state.complete and not self.silent:
                self.equals({key: data for key, data in files.items() if not _says_nothing_of_a_commit(key)})

    def equals(self, files: Files) -> None:
        """The store is the clean run's."""
        assert differing(files, self.clean) == []

    def reads(self) -> None:
        """Data that xarray marks as captured are those of the clean run."""
        state = self.state()
        if state is None or self.plan_hurt or not state.plan.rows:
            return
        rows = state.plan.rows
        captured = np.isin(np.arange(rows) // 4, committed(state))
        try:
            data = open_covered(STORE, state)
            found = data.isel(doc=captured).load()
        except Exception:
            assert self.silent, "nothing was damaged, and it cannot be read"
            return
        assert (data["captured"].values == captured).all()
        for name in (*ROUTES, "token"):
            np.testing.assert_array_equal(found[name].values, self._values(name, rows)[captured])

    def _is_measured(self, name: str, shard: int, files: Files) -> None:
        """An object of a committed shard equals the clean run's, or cannot be decoded."""
        key = f"{NAME}/{name}/c/{shard}/0/0/0"
        if files.get(key) == self.clean[key]:
            return
        assert key in self.silent, f"{key} is not what was captured, and its shard is said to be committed"
        spec, rows = CaptureGroup(STORE, NAME).layout.arrays()[name], 1 if shard == 4 else 4
        try:
            found = spec.decode(files[key], rows)
        except ValueError:
            return
        np.testing.assert_array_equal(found, spec.decode(self.clean[key], rows))

    def _is_planned(self, plan: Plan, files: Files) -> None:
        """Every row that the plan counts equals the clean run's, in the arrays that hold it."""
        group = CaptureGroup(STORE, NAME)
        for name, size in group.plan_sizes().items():
            described = json.loads(files[f"{NAME}/{name}/zarr.json"])["shape"][0]
            assert described == size if plan.complete else described >= size, (name, described, size)
            if size:
                np.testing.assert_array_equal(group.values(name, 0, size), self._values(name, size))

    def _values(self, name: str, size: int) -> np.ndarray:
        """The first entries of an array, from the clean run's objects."""
        spec = CaptureGroup(STORE, NAME).layout.arrays()[name]
        parts = [
            spec.decode(self.clean[f"{NAME}/{name}/{spec.key(start // spec.step)}"], min(spec.step, size - start))
            for start in range(0, size, spec.step)
        ]
        return np.concatenate(parts)


def committed(state: Coverage) -> list[int]:
    """The shards that are reported as captured."""
    return [shard for shard in range(state.shards_total) if shard not in state.missing]


def _says_nothing_of_a_commit(key: str) -> bool:
    """Remains of a zombie next to commits are removed by the next process that opens the capture."""
    return "/faults/" in key or "/quarantine/" in key
