"""One data set's group for its planner and for readers of the plan: its facts and its planned rows.

The plan has its own record, which is replaced as whole shards of tokens become durable. After it says "complete", the
group never grows. Arrays are read object by object without reading their metadata, because a worker does this for every
shard, perhaps over a network. `store.group` creates groups and commits shards.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.storage import MemoryStore

from store.layout import ROW_CHUNK, SCHEMA_VERSION, WITHOUT_WEIGHTS, ArraySpec, Layout
from store.objects import open_objects
from store.plan import LATER, Plan, Rows
from store.records import as_json, parse_record

MOST_SHARDS = 2**22  # of the default size, a trillion tokens (arbitrary)
_NAME = re.compile(r"[a-z0-9_-][a-z0-9._-]{0,127}")


class PlannedGroup:
    """A data set's group in a store: its facts and its plan.

    Parameters
    ----------
    path
        The store: a folder, or s3://bucket/prefix. Nothing is read yet.
    dataset
        The group's name in it.
    """

    def __init__(self, path: Path | str, dataset: str) -> None:
        self.dataset = valid_name(dataset)
        self.objects = open_objects(path, scratch=f"{dataset}/token/partial")

    @property
    def path(self) -> Path | str:
        """The store as printed and as opened again: a path or a URL."""
        return self.objects.root

    # What the group is

    @property
    def attrs(self) -> dict[str, Any]:
        """The group's attributes, read again at each call.

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
            attrs = parse_record(data).get("attributes", {})
        except ValueError as error:
            raise ValueError(f"{self.path}/{self._key('zarr.json')} {error}") from error
        version = attrs.get("schema_version") if isinstance(attrs, dict) else None
        if type(version) is not int or version not in (SCHEMA_VERSION, WITHOUT_WEIGHTS):
            raise ValueError(
                f"{self.path}/{self.dataset} is not a capture that this version reads: schema_version is {version!r},"
                f" but only {SCHEMA_VERSION} and {WITHOUT_WEIGHTS} are supported"
            )
        return dict(attrs)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The mapping that was hashed before tokenizing.

        Raises
        ------
        ValueError
            When the group's attributes have no identity.
        """
        identity = self.attrs.get("identity")
        if not isinstance(identity, dict):
            raise ValueError(f"{self.path}/{self._key('zarr.json')} holds {identity!r:.80} instead of an identity")
        return identity

    @cached_property
    def layout(self) -> Layout:
        """The grid of the group's arrays.

        Raises
        ------
        ValueError
            When the group's attributes do not describe a grid.
        """
        attrs = self.attrs
        try:
            return Layout.from_attrs(attrs)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}/{self._key('zarr.json')} does not describe a capture: {error}") from error

    @property
    def plan(self) -> Plan:
        """How far planning went."""
        record = self._record("token/plan.json")
        if record is None:
            return Plan()
        try:
            if unknown := record.keys() - Plan.__dataclass_fields__.keys():
                raise ValueError(f"holds unknown fields: {sorted(unknown)}")
            if missing := Plan.__dataclass_fields__.keys() - record.keys() - set(LATER):
                raise ValueError(f"lacks fields: {sorted(missing)}")
            return Plan(**record | {"skipped": tuple(record.get("skipped", ()))})
        except ValueError as error:
            raise ValueError(f"{self.path}/{self._key('token/plan.json')} {error}; {self.remedy}") from error

    @property
    def num_shards(self) -> int:
        """Shards planned so far.

        Raises
        ------
        ValueError
            When there are more than a store can have: each shard has its own files.
        """
        shards = -(-self.plan.rows // self.layout.rows_per_shard)
        if shards > MOST_SHARDS:
            raise ValueError(
                f"{self.path}/{self._key('token/plan.json')} says {self.plan.rows} rows, which are {shards:,} shards of"
                f" {self.layout.rows_per_shard}: a capture can have at most {MOST_SHARDS:,}; {self.remedy}"
            )
        return shards

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
        for name in ("token", *layout.labels):
            values = getattr(rows, name)
            for start in range(0, len(values), layout.rows_per_shard):
                shard = (before.rows + start) // layout.rows_per_shard
                data = arrays[name].encode(values[start : start + layout.rows_per_shard])
                key = f"{name}/{arrays[name].key(shard)}"
                if not self.objects.put_new(self._key(key), data):  # a planner was killed after this put, or was faster
                    self._change({key: data}, still=lambda: self.plan == before)
        changes: dict[str, bytes] = {}
        for name in ("length", "document_id", "offset"):
            changes |= self._appended(name, arrays[name], before.rows, getattr(rows, name))
        changes |= self._appended("name", arrays["name"], before.documents, np.array(names, dtype=object))
        for name, spec in arrays.items():
            if spec.grows:
                changes[f"{name}/zarr.json"] = spec.metadata(plan.documents if name == "name" else plan.rows)
        if plan.complete:
            counts = {k: v for k, v in plan.record().items() if k not in ("complete", "rows_of_next_document")}
            changes["zarr.json"] = group_metadata({**self.attrs, **counts})
        self._change(changes | {"token/plan.json": as_json(plan.record())}, still=lambda: self.plan == before)

    def _appended(self, name: str, spec: ArraySpec, size: int, values: np.ndarray) -> dict[str, bytes]:
        """The objects of an array of `size` entries that change when these values are appended."""
        if not len(values):
            return {}
        start = size // ROW_CHUNK * ROW_CHUNK
        if size > start:
            try:
                values = np.concatenate([self.values(name, start, size), values])
            except ValueError as error:
                raise ValueError(
                    f"{self.path}/{self.dataset}: what was planned before is missing or damaged: {error}; {self.remedy}"
                ) from error
        steps = range(0, len(values), ROW_CHUNK)
        return {
            f"{name}/{spec.key((start + index) // ROW_CHUNK)}": spec.encode(values[index : index + ROW_CHUNK])
            for index in steps
        }

    def _change(self, changes: Mapping[str, bytes], still: Callable[[], bool]) -> None:
        """Put objects that other jobs may put too, one by one, unless they have changed meanwhile.

        Thus a job that was stopped for a while and assumed dead undoes no work of the job that followed it.

        Parameters
        ----------
        still
            Whether the changes are still needed; called after reading the objects that they replace.
        """
        standing = self.objects.get_many([self._key(name) for name in changes])
        if not still():
            raise self.overtaken()
        for key, data in ((self._key(name), data) for name, data in changes.items()):
            if not self._put_where(standing.get(key), key, data):
                raise self.overtaken()

    def _put_where(self, seen: bytes | None, key: str, data: bytes) -> bool:
        """Put an object if the one there (or none) is still the one that was read; return whether this content is there
        now, whoever put it."""
        if seen is None or seen == data:
            put = self.objects.put_new(key, data)
        else:
            put = self.objects.put_over(key, seen, data)
        return put or self.objects.get(key) == data

    def overtaken(self) -> RuntimeError:
        """The error that ends a job which finds another job's work in the place of its own."""
        return RuntimeError(
            f"{self.path}/{self.dataset} was changed meanwhile: another job that assumed this one dead writes it,"
            " or its folder was removed; run this command again when no other job works on it"
        )

    # What is planned

    def read_rows(self, shard: int) -> Rows:
        """The parts of one shard's planned rows that a worker needs: tokens and lengths.

        Raises
        ------
        ValueError
            When they are missing or damaged; a capture cannot repair them.
        """
        span = self.span(shard, self.plan)
        if span[0] >= span[1]:
            raise ValueError(
                f"{self.path}/{self.dataset}: shard {shard} is not planned: its plan was removed or replaced"
                " meanwhile; run this command again"
            )
        try:
            rows = Rows(token=self.values("token", *span), length=self.values("length", *span))
        except ValueError as error:
            raise ValueError(
                f"{self.path}/{self.dataset}: rows of shard {shard} are missing or damaged: {error}; {self.remedy}"
            ) from error
        filled = np.arange(self.layout.sequence_length) < rows.length[:, None]
        if (rows.length < 1).any() or ((rows.token >= 0) != filled).any():
            raise ValueError(
                f"{self.path}/{self.dataset}: tokens and lengths of shard {shard} do not match; {self.remedy}"
            )
        return rows

    def document_names(self, shard: int) -> list[str]:
        """Names of the documents of one shard's rows, in order."""
        document = self.values("document_id", *self.span(shard, self.plan))
        first = int(document[0])
        names = self.values("name", first, int(document[-1]) + 1)
        return [str(names[number - first]) for number in dict.fromkeys(document.tolist())]

    def lost(self) -> list[str]:
        """Keys of objects that the plan counts but that are missing or empty; their content would be read as fill
        values.

        This includes the arrays' own descriptions, without which nothing can be read.
        """
        lost = []
        for name, size in self.plan_sizes().items():
            objects = range(-(-size // self.layout.arrays()[name].step))
            keys = [self._key(f"{name}/zarr.json"), *self._keys(name, objects)]
            sizes = self.objects.sizes(self._key(name), keys)
            lost += [key for key, size_bytes in zip(keys, sizes, strict=True) if not size_bytes]
        described = [self._key(f"{name}/zarr.json") for name in self.layout.routes]
        lost += [key for key in described if not self.objects.size_bytes(key)]
        return [key.removeprefix(f"{self.dataset}/") for key in lost]

    def plan_sizes(self) -> dict[str, int]:
        """Number of entries along the first dimension of each array that planning fills."""
        plan, layout = self.plan, self.layout
        others = {"name": plan.documents, "piece": layout.vocab_size, "layer": len(layout.layers)}
        return {name: others.get(name, plan.rows) for name, spec in layout.arrays().items() if not spec.captured}

    def values(self, name: str, start: int, stop: int) -> np.ndarray:
        """The entries `start` to `stop` of an array along its first dimension.

        Raises
        ------
        ValueError
            When an object is missing or damaged; the message starts with its key.
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
        """The planned rows of a shard: the first row and the row after the last."""
        rows = self.layout.rows_per_shard
        return shard * rows, min((shard + 1) * rows, plan.rows)

    @property
    def remedy(self) -> str:
        """What to do about a damaged plan."""
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
    """Return the name if it is valid for a group.

    Raises
    ------
    ValueError
        When it has other characters than a-z, 0-9, '.', '_' and '-', starts with a dot, or is empty or too long.
    """
    if not _NAME.fullmatch(dataset) or dataset == "zarr.json" or dataset.startswith("__"):
        raise ValueError(
            f"{dataset!r} is not a valid name of a data set: use 1 to 128 of a-z, 0-9, '.', '_' and '-',"
            " not starting with a dot or two underscores, and not zarr.json"
        )
    return dataset


def group_metadata(attrs: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a group with these attributes."""
    objects: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(objects), attributes=dict(attrs))
    return objects["zarr.json"].to_bytes()
