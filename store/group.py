"""One data set's group for its writers: create it, commit, take back and quarantine shards.

The invariant: a task fills exactly one shard of the routes (`expert`, `weight`, and the arrays that `Layout.record`
names), completely and idempotently. Its commit record is written last, after the data are durable. A restart does all
shards without a valid commit. Nothing else carries state: the notes next to the commits only say which shards not to
trust (`faults`) or not to try (`quarantine`).

Readers use `store.open_capture`. `store.lease` keeps two jobs apart. A writer that has lost its lease without knowing
it changes no committed shard; see `docs/design/0020-what-stores-promise.md`.
"""

import hashlib
import math
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from store.identity import Identity, identity_hash, refuse_other_identity
from store.layout import LABELS, OPTIONAL, ArraySpec, Layout
from store.plan import Plan, Rows
from store.planned import PlannedGroup, group_metadata, valid_name
from store.records import as_json, parse_record

__all__ = ["CaptureGroup", "valid_name"]

COMMITS, FAULTS, QUARANTINE = "expert/commits", "expert/faults", "expert/quarantine"
ENVIRONMENT = "expert/environment.json"
VOID = b"null"
"""Replaces a commit record that is taken back: a put can be conditional, a removal cannot."""
TEXTS = ("errors", "documents")  # fields of a quarantine record that are lists of texts
_RECORD = re.compile(r"[0-9]+\.json")


class CaptureGroup(PlannedGroup):
    """A data set's group in a store, opened by its name or made by `create`.

    Parameters
    ----------
    path
        The store: a folder, or s3://bucket/prefix. Nothing is read yet.
    dataset
        The group's name: 1 to 128 of a-z, 0-9, '.', '_' and '-'.
    """

    @classmethod
    def create(
        cls,
        path: Path | str,
        dataset: str,
        *,
        layout: Layout,
        identity: Identity,
        attrs: Mapping[str, Any],
        pieces: Sequence[str],
    ) -> "CaptureGroup":
        """Make the group, or open an existing one if it is the same capture. Call it while holding the group's lease.

        Parameters
        ----------
        path, dataset
            As for the class.
        layout
            The grid of its arrays; an existing group keeps its own.
        identity
            The identity of the capture; stored in the group, and its hash in every commit.
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
        group.objects.put_new("zarr.json", group_metadata({}))
        if exists:
            return group
        for name in ("weight", *LABELS, *OPTIONAL):  # left by a killed creation of a capture with other arrays
            if name not in layout.arrays() and group.objects.get(group._key("zarr.json")) is None:
                group.objects.clear(group._key(name))
        contents = {"piece": np.array(pieces, dtype=object), "layer": np.array(layout.layers, dtype="int32")}
        changes: dict[str, bytes] = {}
        for name, spec in layout.arrays().items():
            changes |= _whole(name, spec, contents.get(name, np.empty(0)))
        changes["token/plan.json"] = as_json(Plan().record())
        group._change(changes, still=lambda: group.objects.get(group._key("zarr.json")) is None)
        facts = layout.attrs() | {"schema_version": layout.schema_version, "identity": identity}
        metadata = group_metadata({**attrs, **facts})
        # A put whose answer was lost is retried by the store's client, and then finds its own object.
        if not group.objects.put_new(group._key("zarr.json"), metadata) and (
            group.objects.get(group._key("zarr.json")) != metadata
        ):
            raise RuntimeError(f"{group.path}/{dataset} was made by another job at the same time: run this again")
        return group

    def settle_pieces(self, pieces: Sequence[str]) -> None:
        """Give the group another vocabulary while its plan is incomplete, if the vocabulary is known only from the
        tokens.

        Data that were opened before still have the previous vocabulary.
        """
        before = self.plan
        assert not before.complete, "the plan is complete: the group never changes again"
        changes = _whole("piece", self.layout.arrays()["piece"], np.array(pieces, dtype=object))
        changes["zarr.json"] = group_metadata({**self.attrs, "vocab_size": len(pieces)})
        self._change(changes, still=lambda: self.plan == before)

    # The shards

    def commit(self, shard: int, routes: Mapping[str, np.ndarray], *, rows: Rows, facts: Mapping[str, Any]) -> bool:
        """Make one shard's routes durable, then its commit record.

        An existing object without a commit is kept if its bytes are the same, and replaced otherwise: a killed writer
        left it and computed something else. A committed shard is left unchanged, and a record that is too damaged to be
        read is replaced.

        Another writer may commit the shard between the last check for its record and a replacement. So a replacement is
        announced first by a note that makes all commits of the shard invalid. The note is removed after checking that
        the objects are those that the record names.

        Parameters
        ----------
        shard
            Its number, from 0.
        routes
            Each array of `Layout.routes` by name, with the shape (rows, \\*trailing) of its `ArraySpec`: `expert` and
            `weight` have (rows, P, layers, k).
        rows
            The planned rows that were routed.
        facts
            Facts from the worker: seconds, worker, halvings, versions.

        Returns
        -------
        bool
            False if the shard already had a commit; then this one is not written.

        Raises
        ------
        RuntimeError
            When another writer replaces the same object at the same time.
        """
        record_key = self._key(f"{COMMITS}/{shard}.json")
        before = self.objects.get(record_key)
        if _is_record(before):
            return False
        arrays = self.layout.arrays()
        record = {"identity": self._identity_hash, "shard": shard, **facts}
        record |= {
            "rows": len(rows.length),
            "tokens": int(rows.length.sum()),
            "token_crc32c": tokens_crc32c(rows.token),
        }
        writer = None
        try:
            for name in self.layout.routes:
                data = arrays[name].encode(routes[name])
                key = self._key(f"{name}/{arrays[name].key(shard)}")
                if not self.objects.put_new(key, data) and (standing := self.objects.get(key)) != data:
                    writer = writer or self._announce(shard)
                    if _is_record(self.objects.get(record_key)):
                        return False
                    if not self._put_where(standing, key, data):
                        raise self.overtaken()
                record[name] = object_sums(data)
            return self._put_where(before, record_key, as_json(record))
        finally:
            if writer is not None:
                self._settle_doubt(shard, writer)

    def _announce(self, shard: int) -> str:
        """Note that an object is about to be replaced, in addition to the notes of other writers; returns the writer's
        name in it."""
        key, writer = self._key(f"{FAULTS}/{shard}.json"), uuid.uuid4().hex
        while True:
            note = self.objects.get(key)
            if self._put_where(note, key, _doubt([*_writers(note), writer])):
                return writer

    def _settle_doubt(self, shard: int, writer: str) -> None:
        """Remove a writer from the note if the current commit is valid; otherwise note that it is not.

        Another writer that is still about to replace an object checked for the commit before it was put, so it
        announced itself before this reads the note.
        """
        data = self.objects.get(self._key(f"{COMMITS}/{shard}.json"))
        if not _is_record(data):
            return  # the next commit is not trusted
        record, key = parse_record(data or b""), self._key(f"{FAULTS}/{shard}.json")
        for name in self.layout.routes:
            [place] = self._keys(name, [shard])
            if (found := self.objects.get(place)) is None or object_sums(found) != record.get(name):
                self.note_fault(shard, record, f"its {name} shard was replaced by a late writer")
                return
        note = self.objects.get(key)
        if (writers := _writers(note)) == [writer]:
            self.objects.delete(key)
        elif writer in writers:
            self._put_where(note, key, _doubt([other for other in writers if other != writer]))

    def committed(self, shard: int) -> bool:
        """Whether there is a commit record of this capture; its objects are not checked."""
        data = self.objects.get(self._key(f"{COMMITS}/{shard}.json"))
        return data is not None and self._commit(shard, data)[1] is None

    def commits(self) -> tuple[dict[int, dict[str, Any]], dict[int, str]]:
        """The valid commit records by shard, and the faults of the others.

        A record is valid if it has this capture's identity, its objects have the lengths that it names, and no fault
        was found by reading it back (`store.verification`).
        """
        valid, wrong = self._judged()
        return valid, {shard: reason for shard, (_, reason) in wrong.items()}

    def _judged(self) -> tuple[dict[int, dict[str, Any]], dict[int, tuple[bytes, str]]]:
        """Like `commits`, with the bytes of the invalid records."""
        found, noted = self._numbered(COMMITS), self._numbered(FAULTS)
        found = {shard: data for shard, data in found.items() if data != VOID}
        routes = self.layout.routes
        sizes = [self.objects.sizes(self._key(f"{name}/c"), self._keys(name, found)) for name in routes]
        valid: dict[int, dict[str, Any]] = {}
        wrong: dict[int, tuple[bytes, str]] = {}
        for (shard, data), *have in zip(found.items(), *sizes, strict=True):
            record, reason = self._commit(shard, data)
            reason = reason or _misfit(record, dict(zip(routes, have, strict=True))) or _noted(data, noted.get(shard))
            if reason is None:
                valid[shard] = record
            else:
                wrong[shard] = data, reason
        return valid, wrong

    def take_back_wrong(self) -> dict[int, str]:
        """Take back the shards with an invalid commit and return why, except those that have been committed again
        since."""
        _, wrong = self._judged()
        return {shard: reason for shard, (data, reason) in wrong.items() if self.discard(shard, data)}

    def discard(self, shard: int, record: bytes | None = None) -> bool:
        """Take back a shard: first its commit, then its objects, so that no commit ever names missing objects.

        Parameters
        ----------
        shard
            Its number.
        record
            The bytes of the commit record to take back; by default the current ones.

        Returns
        -------
        bool
            False if there is another record by now; then nothing is removed.
        """
        key = self._key(f"{COMMITS}/{shard}.json")
        record = self.objects.get(key) if record is None else record
        if record is not None and not self._put_where(record, key, VOID):
            return False
        for name in self.layout.routes:
            self.objects.delete(*self._keys(name, [shard]))
        self.objects.delete(self._key(f"{FAULTS}/{shard}.json"))
        return True

    def _commit(self, shard: int, data: bytes) -> tuple[dict[str, Any], str | None]:
        """A commit record, and its own faults."""
        record: dict[str, Any] = {}
        try:
            record = parse_record(data)
            if record["identity"] != self._identity_hash:
                return record, f"is of identity {record['identity'][:12]}"
            if record["shard"] != shard or not record["tokens"] > 0:
                return record, f"is of shard {record['shard']!r:.40}, with {record['tokens']!r:.40} tokens"
            if odd := _odd(record, self.layout.routes):
                return record, f"says {odd}, which is not possible"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return record, f"cannot be read ({error!r})"
        return record, None

    @cached_property
    def _identity_hash(self) -> str:
        return identity_hash(self.identity)

    # What is noted beside the commits

    @property
    def environment(self) -> dict[str, Any] | None:
        """Package versions and device that computed this capture's bytes; None before the first worker is ready."""
        return self._record(ENVIRONMENT)

    def settle_environment(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        """The capture's environment: the given one, unless another worker has set it before."""
        self.objects.put_new(self._key(ENVIRONMENT), as_json(environment))
        settled = self.environment
        assert settled is not None
        return settled

    def quarantine(self, shard: int, record: Mapping[str, Any]) -> None:
        """Quarantine a shard that fails repeatedly: no capture tries it until it is released."""
        self.objects.put(self._key(f"{QUARANTINE}/{shard}.json"), as_json(record))

    def quarantined(self) -> dict[int, dict[str, Any]]:
        """Records of the quarantined shards, without those that cannot be read.

        `errors` and `documents`, if present, are lists of texts.
        """
        records: dict[int, dict[str, Any]] = {}
        for shard, data in self._numbered(QUARANTINE).items():
            records[shard] = {}
            with suppress(ValueError):
                record = parse_record(data)
                records[shard] = {key: value for key, value in record.items() if key not in TEXTS or _are_texts(value)}
        return records

    def release(self, shard: int) -> None:
        """Release a shard so that it is tried again."""
        self.objects.delete(self._key(f"{QUARANTINE}/{shard}.json"))

    def note_fault(self, shard: int, record: Mapping[str, Any], reason: str) -> None:
        """Note that an object of a commit record is damaged although its length is right.

        The note is about the bytes of this record: another commit of the shard invalidates the note.
        """
        data = self.objects.get(self._key(f"{COMMITS}/{shard}.json"))
        with suppress(ValueError):  # the record itself was damaged meanwhile, which is reported
            if data is not None and parse_record(data) == record:  # otherwise it is already repaired
                note = {"reason": reason, "commit_crc32c": google_crc32c.value(data)}
                self.objects.put(self._key(f"{FAULTS}/{shard}.json"), as_json(note))

    def settle(self) -> None:
        """Make the current state durable: the writer of the last record may have died just before that."""
        for folder in (COMMITS, "token", ""):
            self.objects.settle(self._key(folder))

    def drop_void(self) -> None:
        """Remove the notes of faults and the quarantine records that do not concern the current state.

        They are left by a killed repair, or by a writer that was considered dead. Only for the holder of the lease.
        """
        for shard, note in self._numbered(FAULTS).items():
            commit = self.objects.get(self._key(f"{COMMITS}/{shard}.json"))
            if commit is None or _noted(commit, note) is None:
                self.objects.delete(self._key(f"{FAULTS}/{shard}.json"))
        for shard in self._numbered(QUARANTINE):
            if self.committed(shard):
                self.release(shard)

    def _numbered(self, folder: str) -> dict[int, bytes]:
        """The records of a folder by shard."""
        # A network file system leaves removed files under other names.
        names = [name for name in self.objects.list(self._key(folder)) if _RECORD.fullmatch(name)]
        found = self.objects.get_many([self._key(f"{folder}/{name}") for name in names])
        shards = {int(Path(key).stem): data for key, data in found.items()}
        return dict(sorted(shards.items()))


def _whole(name: str, spec: ArraySpec, values: np.ndarray) -> dict[str, bytes]:
    """The objects, by key, of an array that is written at once."""
    objects = {f"{name}/zarr.json": spec.metadata(len(values))}
    for start in range(0, len(values), spec.step):
        objects[f"{name}/{spec.key(start // spec.step)}"] = spec.encode(values[start : start + spec.step])
    return objects


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _odd(record: Mapping[str, Any], routes: Sequence[str]) -> str | None:
    """A fact in a commit record that no writer can have written."""
    counts = {"tokens": record["tokens"], **{f"bytes of {name}": record[name]["bytes"] for name in routes}}
    texts = {f"sha256 of {name}": record[name].get("sha256", "") for name in routes}
    odd = [f"{name} {value!r:.40}" for name, value in counts.items() if type(value) is not int or value < 0]
    odd += [f"{name} {value!r:.40}" for name, value in texts.items() if not isinstance(value, str)]
    seconds = record.get("seconds", 0.0)
    if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
        odd.append(f"seconds {seconds!r:.40}")
    return odd[0] if odd else None


def _is_record(data: bytes | None) -> bool:
    """Whether something says that a shard is committed, true or not."""
    try:
        parse_record(data or b"")
    except ValueError:
        return False
    return True


def _misfit(record: Mapping[str, Any], have: Mapping[str, int | None]) -> str | None:
    """The object whose length differs from that in a commit record."""
    for name, size in have.items():
        if size != record[name]["bytes"]:
            what = "is gone" if size is None else f"has {size} bytes"
            return f"its {name} shard {what}, but {record[name]['bytes']} were committed"
    return None


def _noted(commit: bytes, note: bytes | None) -> str | None:
    """Why a commit must not be trusted, from the note next to it; None if there is no note about this record.

    A note that names no record is about any record; see `CaptureGroup.commit`.
    """
    if note is None:
        return None
    try:
        record = parse_record(note)
    except ValueError as error:
        return f"was noted as damaged, in a note that {error}"
    own = google_crc32c.value(commit)
    return str(record.get("reason")) if record.get("commit_crc32c", own) == own else None


def _doubt(writers: Sequence[str]) -> bytes:
    """The note of writers that are about to replace an object of a shard: no commit of the shard is valid."""
    return as_json({"reason": "a worker that ended was about to replace one of its objects", "writers": writers})


def _writers(note: bytes | None) -> list[str]:
    """The writers that a note names."""
    try:
        writers = parse_record(note or b"").get("writers", [])
    except ValueError:
        return []
    return writers if _are_texts(writers) else []


def object_sums(data: bytes) -> dict[str, int | str]:
    """The entry of an object in a commit record.

    It does not use crc32c: parts that end with their own crc32c, as in Zarr, always have the same crc32c.
    """
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def tokens_crc32c(token: np.ndarray) -> int:
    """Checksum of a shard's planned tokens, in which rows have -1 beyond their length."""
    return int(google_crc32c.value(np.ascontiguousarray(token).tobytes()))
