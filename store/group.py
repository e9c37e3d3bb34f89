"""One data set's group as its writers see it: create, plan, commit.

The one invariant: a task fills exactly one shard of `expert` and `weight`, whole and idempotently; its commit record
is written last, after the data are durable; a restart is all shards minus the valid commits. Nothing else carries
state. The plan has one record of its own, replaced as whole shards of tokens become durable; after it says
"complete" the group never grows.

Readers use `store.open_capture`. Nothing here keeps two jobs apart: `store.lease` does.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.storage import LocalStore, MemoryStore

from store.identity import Identity, identity_hash, refuse_other_identity
from store.layout import ROW_CHUNK, SCHEMA_VERSION, ArraySpec, Layout
from store.objects import LocalObjects
from store.plan import Plan, Rows

GROWING = ("token", "length", "document_id", "offset", "name", "expert", "weight", "role")
_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]{0,127}")
_RECORD = re.compile(r"[0-9]+\.json")


class CaptureGroup:
    """A data set's group in a store; `open` one that exists, `create` one or go on with an equal one."""

    def __init__(self, path: Path, dataset: str) -> None:
        self.path = Path(path)
        self.dataset = valid_name(dataset)
        self.objects = LocalObjects(self.path, scratch=f"{dataset}/token/partial")

    @classmethod
    def create(
        cls,
        path: Path,
        dataset: str,
        *,
        layout: Layout,
        identity: Identity,
        attrs: Mapping[str, Any],
        pieces: Sequence[str],
    ) -> "CaptureGroup":
        """Make the group, or go on with the one that is there; for the one who holds its lease.

        Parameters
        ----------
        identity
            What makes two captures the same; kept in the group, its hash in every commit.
        attrs
            Further attributes of the group: the whole provenance.
        pieces
            The tokenizer's piece for each token id, so that analysis needs no tokenizer.

        Raises
        ------
        ValueError
            When the group holds a capture with another identity (each differing field is named with both values),
            or something that is not a capture.
        """
        group = cls(path, dataset)
        exists = group.objects.get(group._key("zarr.json")) is not None
        if exists:
            refuse_other_identity(f"{group.path}/{dataset}", group.identity, identity)
        group.objects.put_new("zarr.json", _group_metadata({}))
        if exists:
            return group
        for name in GROWING:  # of a creation that was killed, of a capture with other arrays
            if name not in layout.arrays():
                group.objects.clear(group._key(name))
        contents = {"piece": np.array(pieces, dtype=object), "layer": np.array(layout.layers, dtype="int32")}
        for name, spec in layout.arrays().items():
            values = contents.get(name, np.empty(0))
            group.objects.put(group._key(f"{name}/zarr.json"), spec.metadata(len(values)))
            for start in range(0, len(values), spec.chunk[0]):
                chunk = values[start : start + spec.chunk[0]]
                group.objects.put(group._key(f"{name}/{spec.key(start // spec.chunk[0])}"), spec.encode(chunk))
        group._put_record("token/plan.json", asdict(Plan()))
        facts = asdict(layout) | {"schema_version": SCHEMA_VERSION, "identity": identity}
        if not group.objects.put_new(group._key("zarr.json"), _group_metadata({**attrs, **facts})):
            raise RuntimeError(f"{group.path}/{dataset} was made by another job at the same time: run this again")
        return group

    # What the group is

    @property
    def attrs(self) -> dict[str, Any]:
        """The group's attributes, read anew.

        Raises
        ------
        FileNotFoundError
            When there is no such group.
        ValueError
            When it is not a capture of a schema version that this code reads.
        """
        data = self.objects.get(self._key("zarr.json"))
        if data is None:
            raise FileNotFoundError(f"no data set {self.dataset!r} in the store {self.path}")
        try:
            attrs: dict[str, Any] = json.loads(data).get("attributes", {})
        except ValueError as error:
            raise ValueError(f"{self.path / self.dataset}/zarr.json is not JSON: {error}") from error
        version = attrs.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{self.path / self.dataset} is no capture that this version reads: its schema_version is {version!r},"
                f" and {SCHEMA_VERSION} is known here"
            )
        return attrs

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What was hashed before tokenizing began."""
        identity: dict[str, Any] = self.attrs["identity"]
        return identity

    @cached_property
    def layout(self) -> Layout:
        """The grid of the group's arrays."""
        attrs = self.attrs
        fields = {name: attrs[name] for name in Layout.__dataclass_fields__}
        return Layout(**{**fields, "layers": tuple(fields["layers"]), "roles": tuple(fields["roles"])})

    @property
    def plan(self) -> Plan:
        """How far planning went."""
        record = self._record("token/plan.json") or {}
        if unknown := record.keys() - Plan.__dataclass_fields__.keys():
            raise ValueError(f"{self.path / self.dataset}/token/plan.json holds what no plan has: {sorted(unknown)}")
        return Plan(**record)

    # Planning

    def publish(self, rows: Rows, names: Sequence[str], plan: Plan) -> None:
        """Make planned rows durable, then the plan record that counts them.

        Parameters
        ----------
        rows
            The rows after those of the current plan; whole shards unless `plan.complete`.
        names
            Names of the documents from the current plan's count to the new one's.
        plan
            The record to write last.
        """
        before, layout = self.plan, self.layout
        arrays = layout.arrays()
        assert not before.complete, "the plan is complete: the group never grows again"
        assert plan.rows == before.rows + len(rows.length), (plan, before)
        assert plan.documents == before.documents + len(names), (plan, before)
        assert plan.complete or plan.rows % layout.rows_per_shard == 0, plan
        for name in ("token", "role") if layout.roles else ("token",):
            values = getattr(rows, name)
            for start in range(0, len(values), layout.rows_per_shard):
                shard = (before.rows + start) // layout.rows_per_shard
                data = arrays[name].encode(values[start : start + layout.rows_per_shard])
                self.objects.put(self._key(f"{name}/{arrays[name].key(shard)}"), data)
        for name in ("length", "document_id", "offset"):
            self._append(name, arrays[name], before.rows, getattr(rows, name))
        self._append("name", arrays["name"], before.documents, np.array(names, dtype=object))
        for name in GROWING:
            if name in arrays:
                size = plan.documents if name == "name" else plan.rows
                self.objects.put(self._key(f"{name}/zarr.json"), arrays[name].metadata(size))
        if plan.complete:
            counts = {k: v for k, v in asdict(plan).items() if k not in ("complete", "rows_of_next_document")}
            self.objects.put(self._key("zarr.json"), _group_metadata({**self.attrs, **counts}))
        self._put_record("token/plan.json", asdict(plan))

    def _append(self, name: str, spec: ArraySpec, size: int, values: np.ndarray) -> None:
        if not len(values):
            return
        start = size // ROW_CHUNK * ROW_CHUNK
        values = np.concatenate([self._array(name)[start:size], values]) if size > start else values
        for index in range(0, len(values), ROW_CHUNK):
            key = spec.key((start + index) // ROW_CHUNK)
            self.objects.put(self._key(f"{name}/{key}"), spec.encode(values[index : index + ROW_CHUNK]))

    # Capturing

    def read_rows(self, shard: int) -> Rows:
        """The planned rows of one shard (token and length only are what a worker needs)."""
        rows = self.layout.rows_per_shard
        part = slice(shard * rows, min((shard + 1) * rows, self.plan.rows))
        values = {name: self._array(name)[part] for name in ("token", "length", "document_id", "offset")}
        filled = np.arange(self.layout.sequence_length) < values["length"][:, None]
        if (values["length"] < 1).any() or (values["token"][filled] < 0).any():
            raise ValueError(
                f"{self.path}/{self.dataset}: planned rows of shard {shard} are gone; remove the folder"
                f" {self.dataset} and capture it again"
            )
        return Rows(**values)

    def commit(
        self, shard: int, expert: np.ndarray, weight: np.ndarray, *, rows: Rows, facts: Mapping[str, Any]
    ) -> bool:
        """Make one shard's choices durable, then its commit record.

        An object that is there without a commit is kept when its bytes are the same and replaced when they are not:
        it is what a killed writer left. A shard that is committed is left as it is; between the last look for its
        record and the replacement lies one put, which only a lease keeps another writer out of.

        Parameters
        ----------
        expert, weight : array, shape (rows, P, layers, k)
        facts
            What the worker knows: seconds, worker, halvings, versions.

        Returns
        -------
        bool
            False when the shard had a commit already: nothing was written.
        """
        record_key = f"expert/commits/{shard}.json"
        if self._record(record_key) is not None:
            return False
        arrays = self.layout.arrays()
        record = {"identity": identity_hash(self.identity), "shard": shard, **facts}
        record |= {
            "rows": len(rows.length),
            "tokens": int(rows.length.sum()),
            "token_crc32c": _crc32c(rows.token),
        }
        for name, values in (("expert", expert), ("weight", weight)):
            data = arrays[name].encode(values)
            key = self._key(f"{name}/{arrays[name].key(shard)}")
            if not self.objects.put_new(key, data) and self.objects.get(key) != data:
                if self._record(record_key) is not None:
                    return False
                self.objects.put(key, data)
            record[name] = {"bytes": len(data), "crc32c": google_crc32c.value(data)}
        return self.objects.put_new(self._key(record_key), _json(record))

    def commits(self) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """The valid commit records by shard, and for the others what is wrong with them.

        Valid is a record of this capture's identity whose objects have the lengths that it names.
        """
        wanted, arrays = identity_hash(self.identity), self.layout.arrays()
        valid: dict[int, dict[str, Any]] = {}
        wrong: dict[int, str] = {}
        for file in self.objects.list(self._key("expert/commits")):
            if not _RECORD.fullmatch(file):  # such as what a network file system leaves of a removed file
                continue
            shard = int(file.removesuffix(".json"))
            try:
                record = self._record(f"expert/commits/{file}") or {}
                reason = None if record["identity"] == wanted else f"is of identity {record['identity'][:12]}"
                if record["shard"] != shard or not record["tokens"] > 0:
                    reason = reason or f"is of shard {record['shard']}, with {record['tokens']} tokens"
                for name in ("expert", "weight"):
                    size = self.objects.size_bytes(self._key(f"{name}/{arrays[name].key(shard)}"))
                    if size != record[name]["bytes"]:
                        have = "is gone" if size is None else f"has {size} bytes"
                        reason = reason or f"its {name} shard {have}, {record[name]['bytes']} were committed"
            except (ValueError, KeyError, TypeError) as error:
                reason = f"cannot be read ({error!r})"
            if reason is None:
                valid[shard] = record
            else:
                wrong[shard] = reason
        return valid, wrong

    def lost(self) -> list[str]:
        """Keys of objects that the plan counts and that are gone or empty: what they held would read as fill."""
        plan, layout = self.plan, self.layout
        arrays = layout.arrays()
        sizes = {"name": plan.documents, "piece": layout.vocab_size, "layer": len(layout.layers)}
        keys = []
        for name, spec in arrays.items():
            if name not in ("expert", "weight"):
                size, step = sizes.get(name, plan.rows), (spec.shard or spec.chunk)[0]
                keys += [f"{name}/{spec.key(index)}" for index in range(-(-size // step))]
        return [key for key in keys if not self.objects.size_bytes(self._key(key))]

    def discard(self, shard: int) -> None:
        """Take back a shard: its commit first, then its objects, so that no commit ever names what is gone."""
        self.objects.delete(self._key(f"expert/commits/{shard}.json"))
        for name in ("expert", "weight"):
            self.objects.delete(self._key(f"{name}/{self.layout.arrays()[name].key(shard)}"))

    @property
    def num_shards(self) -> int:
        """Shards planned so far."""
        return -(-self.plan.rows // self.layout.rows_per_shard)

    # Records and keys

    def _array(self, name: str) -> Any:
        return zarr.open_array(LocalStore(self.path, read_only=True), path=self._key(name), mode="r")

    def _record(self, key: str) -> dict[str, Any] | None:
        data = self.objects.get(self._key(key))
        try:
            record = None if data is None else json.loads(data)
        except ValueError as error:
            raise ValueError(f"{self.path / self._key(key)} is not JSON: {error}") from error
        if not isinstance(record, dict | None):
            raise ValueError(f"{self.path / self._key(key)} holds {type(record).__name__}, not a record")
        return record

    def _put_record(self, key: str, record: Mapping[str, Any]) -> None:
        self.objects.put(self._key(key), _json(record))

    def _key(self, name: str) -> str:
        return f"{self.dataset}/{name}"


def valid_name(dataset: str) -> str:
    """The name, if it can name a group.

    Raises
    ------
    ValueError
        When it has other characters than a-z, 0-9, '.', '_' and '-', begins with a dot, or is empty or too long.
    """
    if not _NAME.fullmatch(dataset) or dataset == "zarr.json" or dataset.startswith("__"):
        raise ValueError(
            f"{dataset!r} cannot name a data set in a store: use 1 to 128 of a-z, 0-9, '.', '_' and '-',"
            " not beginning with a dot or two underscores, and not zarr.json"
        )
    return dataset


def _group_metadata(attrs: Mapping[str, Any]) -> bytes:
    objects: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(objects), attributes=dict(attrs))
    return objects["zarr.json"].to_bytes()


def _crc32c(values: np.ndarray) -> int:
    return int(google_crc32c.value(np.ascontiguousarray(values).tobytes()))


def _json(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=1, sort_keys=True).encode()
