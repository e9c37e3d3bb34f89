"""One data set's group as its planner, and those who read the plan, see it: what it is, and how its rows came to be.

The plan has one record of its own, replaced as whole shards of tokens become durable; after it says "complete" the
group never grows. Arrays are read object by object, without asking for their metadata: a worker does so for every
shard, perhaps over a network. Making a group and committing shards is `store.group`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.storage import MemoryStore

from store.layout import ROW_CHUNK, SCHEMA_VERSION, ArraySpec, Layout
from store.objects import open_objects
from store.plan import Plan, Rows

GROWING = ("token", "length", "document_id", "offset", "name", "expert", "weight", "role")
ROUTES = ("expert", "weight")
_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]{0,127}")


class PlannedGroup:
    """A data set's group in a store: its facts and its plan.

    Parameters
    ----------
    path
        The store: a folder, or s3://bucket/prefix. Nothing is looked at yet.
    dataset
        The group's name in it.
    """

    def __init__(self, path: Path | str, dataset: str) -> None:
        self.dataset = valid_name(dataset)
        self.objects = open_objects(path, scratch=f"{dataset}/token/partial")

    @property
    def path(self) -> Path | str:
        """The store as it is printed, and opened again: a path, or a URL."""
        return self.objects.root

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
            raise ValueError(f"{self.path}/{self._key('zarr.json')} is not JSON: {error}") from error
        version = attrs.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{self.path}/{self.dataset} is no capture that this version reads: its schema_version is {version!r},"
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
            raise ValueError(f"{self.path}/{self._key('token/plan.json')} holds what no plan has: {sorted(unknown)}")
        return Plan(**record)

    @property
    def num_shards(self) -> int:
        """Shards planned so far."""
        return -(-self.plan.rows // self.layout.rows_per_shard)

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
            self.objects.put(self._key("zarr.json"), group_metadata({**self.attrs, **counts}))
        self.objects.put(self._key("token/plan.json"), as_json(asdict(plan)))

    def _append(self, name: str, spec: ArraySpec, size: int, values: np.ndarray) -> None:
        if not len(values):
            return
        start = size // ROW_CHUNK * ROW_CHUNK
        values = np.concatenate([self.values(name, start, size), values]) if size > start else values
        for index in range(0, len(values), ROW_CHUNK):
            key = spec.key((start + index) // ROW_CHUNK)
            self.objects.put(self._key(f"{name}/{key}"), spec.encode(values[index : index + ROW_CHUNK]))

    # What is planned

    def read_rows(self, shard: int) -> Rows:
        """Tokens and lengths of one shard's planned rows: what a worker needs.

        Raises
        ------
        ValueError
            When they are gone or damaged; no capture can heal them.
        """
        span = self.span(shard, self.plan)
        try:
            rows = Rows(token=self.values("token", *span), length=self.values("length", *span))
        except ValueError as error:
            raise ValueError(
                f"{self.path}/{self.dataset}: planned rows of shard {shard} are gone or damaged: {error}; {self.remedy}"
            ) from error
        filled = np.arange(self.layout.sequence_length) < rows.length[:, None]
        if (rows.length < 1).any() or ((rows.token >= 0) != filled).any():
            raise ValueError(
                f"{self.path}/{self.dataset}: tokens and lengths of shard {shard} do not fit together; {self.remedy}"
            )
        return rows

    def document_names(self, shard: int) -> list[str]:
        """Names of the documents that one shard's rows are windows of, in order."""
        document = self.values("document_id", *self.span(shard, self.plan))
        first = int(document[0])
        names = self.values("name", first, int(document[-1]) + 1)
        return [str(names[number - first]) for number in dict.fromkeys(document.tolist())]

    def lost(self) -> list[str]:
        """Keys of objects that the plan counts and that are gone or empty: what they held would read as fill."""
        lost = []
        for name, size in self.plan_sizes().items():
            keys = self._keys(name, range(-(-size // self.layout.arrays()[name].step)))
            sizes = self.objects.sizes(self._key(f"{name}/c"), keys)
            lost += [key for key, size_bytes in zip(keys, sizes, strict=True) if not size_bytes]
        return [key.removeprefix(f"{self.dataset}/") for key in lost]

    def plan_sizes(self) -> dict[str, int]:
        """Entries along the first dimension of each array that planning fills."""
        plan, layout = self.plan, self.layout
        others = {"name": plan.documents, "piece": layout.vocab_size, "layer": len(layout.layers)}
        return {name: others.get(name, plan.rows) for name in layout.arrays() if name not in ROUTES}

    def values(self, name: str, start: int, stop: int) -> np.ndarray:
        """The entries `start` to `stop` of an array along its first dimension.

        Raises
        ------
        ValueError
            When an object is gone or damaged; the message begins with its key.
        """
        spec, parts = self.layout.arrays()[name], []
        for index in range(start // spec.step, -(-stop // spec.step)):
            key, first = f"{name}/{spec.key(index)}", index * spec.step
            data = self.objects.get(self._key(key))
            if not data:
                raise ValueError(f"{key} {'is gone' if data is None else 'is empty'}")
            try:
                values = spec.decode(data, min(spec.step, stop - first))
            except ValueError as error:
                raise ValueError(f"{key} cannot be decoded ({error})") from error
            parts.append(values[max(0, start - first) :])
        return np.concatenate(parts)

    def span(self, shard: int, plan: Plan) -> tuple[int, int]:
        """The planned rows of a shard: its first, and the one after its last."""
        rows = self.layout.rows_per_shard
        return shard * rows, min((shard + 1) * rows, plan.rows)

    @property
    def remedy(self) -> str:
        """What to do about a plan that is damaged."""
        return f"remove the folder {self.dataset} and capture it again"

    # Records and keys

    def _record(self, key: str) -> dict[str, Any] | None:
        data = self.objects.get(self._key(key))
        try:
            return None if data is None else parse_record(data)
        except ValueError as error:
            raise ValueError(f"{self.path}/{self._key(key)} {error}") from error

    def _keys(self, name: str, objects: Iterable[int]) -> list[str]:
        """Keys of an array's objects."""
        spec = self.layout.arrays()[name]
        return [self._key(f"{name}/{spec.key(index)}") for index in objects]

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


def group_metadata(attrs: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a group with these attributes."""
    objects: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(objects), attributes=dict(attrs))
    return objects["zarr.json"].to_bytes()


def as_json(record: Mapping[str, Any]) -> bytes:
    """A record as an object's bytes."""
    return json.dumps(record, indent=1, sort_keys=True).encode()


def parse_record(data: bytes) -> dict[str, Any]:
    """A record from an object's bytes.

    Raises
    ------
    ValueError
        When they hold none; the message goes on from the object's name.
    """
    try:
        record = json.loads(data)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"holds {type(record).__name__}, not a record")
    return record
