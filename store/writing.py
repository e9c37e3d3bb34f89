"""Write existing routes as a capture: one call, a shard at a time.

The result is a capture like any other, with the same grid, plan and commits: `verify` reads it back, and readers see no
difference. The call may be killed and repeated: existing shards are compared with the given routes, and the rest is
added. Three shards and one block are in memory.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from store.coverage import Coverage, coverage
from store.group import CaptureGroup, object_sums
from store.layout import MISSING_ROLE, MISSING_TOKEN, PHASES, SHARD_CHOICES, Layout, default_rows_per_shard
from store.lease import lease
from store.plan import Plan, Rows

NAMES = {"token", "expert", "weight", "length", "document_id", "phase", "name"}
LARGEST_WEIGHT = float(np.finfo(np.float16).max)

Block = Mapping[str, np.ndarray]


def write_capture(
    path: Path | str,
    name: str,
    *,
    blocks: Iterable[Mapping[str, Any]],
    num_experts: int,
    layers: Sequence[int],
    pieces: Sequence[str] | None = None,
    attrs: Mapping[str, Any] | None = None,
    rows_per_shard: int | None = None,
) -> Coverage:
    """Write routes as a capture in a store, streaming. The same call again adds missing shards.

    Parameters
    ----------
    path
        The store: a folder, or s3://bucket/prefix. It is created if it does not exist.
    name
        The capture's name: 1 to 128 of a-z, 0-9, '.', '_' and '-'.
    blocks : iterable of mapping of str to array
        Rows in order, any number at a time. `token`, integers (rows, P): ids; `expert`, integers (rows, P, layers, k):
        choices, largest weight first, with the fill value (255, or 65535 if there are more than 255 experts) in all
        layers if a token's choices are not known. Optional, in all blocks or in none: `weight`, floats like `expert`,
        stored in 16 bits; `length`, integers (rows): tokens in the row, 1 to P, by default those before the first id
        below 0; `document_id`, integers (rows), ascending from 0: the document of which the row is a window, by default
        one for each row; `phase`, integers (rows, P): 0 for a token of the prompt, 1 for a generated one, 255 if not
        known; `name`, texts (rows): the name of the row's document, taken from its first row, by default "document" and
        its number. Values at and beyond a row's length are ignored.
    num_experts : int
        E of each layer.
    layers : sequence of int
        The model's own numbers of the layers that have experts, in the order of `expert`.
    pieces : sequence of str, optional
        The tokenizer's piece for each token id; by default the ids themselves, up to the largest.
    attrs : mapping, optional
        Facts about the capture, as JSON values: `special_token_ids` (none by default: every token counts), the known
        fields of `store.identity.MODEL`, such as `model`, `model_revision` and `quantization`, and the origin of the
        routes. They are its identity: with other facts it is another capture.
    rows_per_shard : int, optional
        By default the same as in a capture: about 262,144 positions.

    Returns
    -------
    Coverage
        The coverage of the complete capture.

    Raises
    ------
    ValueError
        When a block has other arrays, shapes or types, an expert or token is out of range, documents do not ascend,
        there are no rows, or the store holds another capture or other routes under that name. The message names the
        block and the row. Shards that were written before remain; the capture is incomplete.
    RuntimeError
        When another job writes the same capture.
    """
    found = iter(blocks)
    first = next(found, None)
    if first is None:
        raise ValueError("blocks holds no row: there is nothing to write")
    layout = _layout(first, num_experts, layers, pieces, rows_per_shard)
    facts = {"special_token_ids": [], **(attrs or {})}
    identity = {**facts, **layout.attrs(), "written": 1, "pieces": None if pieces is None else _hash(list(pieces))}
    group = CaptureGroup(path, name)
    with lease(group):
        group = CaptureGroup.create(
            path, name, layout=layout, identity=identity, attrs=facts, pieces=["0"] if pieces is None else pieces
        )
        _Writer(group, layout, known=pieces is not None).write(_chained(first, found))
    return coverage(path, name)


def _chained(first: Block, others: Iterator[Block]) -> Iterator[Block]:
    yield first
    yield from others


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _layout(
    block: Block, num_experts: int, layers: Sequence[int], pieces: Sequence[str] | None, rows_per_shard: int | None
) -> Layout:
    """The grid, from the first block."""
    _refuse_names(block, NAMES & block.keys() | {"token", "expert"}, 0)
    token, expert = np.asarray(block["token"]), np.asarray(block["expert"])
    if token.ndim != 2 or expert.ndim != 4 or 0 in token.shape[1:] or 0 in expert.shape[1:]:
        raise ValueError(
            f"block 0: token has the shape {token.shape} and expert {expert.shape}, but they must be (rows, P) and"
            " (rows, P, layers, k), with P and k 1 or more"
        )
    positions, choices = token.shape[1], expert.shape[3]
    if choices > num_experts:
        raise ValueError(f"block 0: a token has {choices} choices, but there are {num_experts} experts")
    most = max(1, SHARD_CHOICES // (positions * max(1, len(layers)) * choices))
    return Layout(
        sequence_length=positions,
        rows_per_shard=rows_per_shard or min(default_rows_per_shard(positions), most),
        layers=tuple(int(layer) for layer in layers),
        num_experts=num_experts,
        experts_per_token=choices,
        vocab_size=1 if pieces is None else len(pieces),
        weights="weight" in block,
        phases=PHASES if "phase" in block else (),
    )


def _refuse_names(block: Block, wanted: set[str], number: int) -> None:
    """Raise a ValueError if a block has other arrays than it should."""
    if block.keys() != wanted:
        raise ValueError(
            f"block {number} has the arrays {sorted(block)}, but must have {sorted(wanted)}: token and expert, and of"
            " weight, length, document_id, phase and name the same in all blocks"
        )


@dataclass(kw_only=True)
class _Checked:
    """Rows in the form of the store."""

    token: np.ndarray
    length: np.ndarray
    document_id: np.ndarray
    routes: dict[str, np.ndarray]
    beside: dict[str, np.ndarray]
    """`phase` and `name`, if the blocks have them."""

    def __len__(self) -> int:
        return len(self.length)

    def part(self, rows: slice) -> "_Checked":
        routes, beside = (
            {name: values[rows] for name, values in arrays.items()} for arrays in (self.routes, self.beside)
        )
        return _Checked(
            token=self.token[rows],
            length=self.length[rows],
            document_id=self.document_id[rows],
            routes=routes,
            beside=beside,
        )


def _joined(parts: Sequence[_Checked]) -> _Checked:
    """Concatenated rows."""
    if len(parts) == 1:
        return parts[0]
    token, length, document_id = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("token", "length", "document_id")
    )
    routes, beside = (
        {name: np.concatenate([getattr(part, kind)[name] for part in parts]) for name in getattr(parts[0], kind)}
        for kind in ("routes", "beside")
    )
    return _Checked(token=token, length=length, document_id=document_id, routes=routes, beside=beside)


class _Checker:
    """Checks blocks one after the other and converts their rows to the form of the store."""

    def __init__(self, layout: Layout, *, known: bool) -> None:
        self.layout, self.known = layout, known
        self.names: set[str] = set()
        self.number, self.rows, self.document, self.largest_token = -1, 0, -1, 0

    def check(self, block: Block) -> _Checked:
        """Convert one block; a ValueError says what is wrong with it."""
        self.number += 1
        self.names = self.names or set(block)
        _refuse_names(block, self.names, self.number)
        layout, rows = self.layout, len(block["token"])
        shape = (rows, layout.sequence_length)
        choices = (*shape, len(layout.layers), layout.experts_per_token)
        token = self._array(block, "token", shape, "iu")
        length = self._length(block, token)
        filled = np.arange(layout.sequence_length) < length[:, None]
        routes = {"expert": self._expert(self._array(block, "expert", choices, "iu"), filled)}
        if layout.weights:
            known = routes["expert"] != layout.missing_expert
            routes["weight"] = self._weight(self._array(block, "weight", choices, "f"), known)
        checked = _Checked(
            token=self._token(token, filled),
            length=length,
            document_id=self._documents(block, rows),
            routes=routes,
            beside=self._beside(block, filled),
        )
        self.rows += rows
        return checked

    def _array(self, block: Block, name: str, shape: tuple[int, ...], kinds: str) -> np.ndarray:
        values = np.asarray(block[name])
        if values.shape != shape or values.dtype.kind not in kinds:
            kind = "floats" if kinds == "f" else "integers"
            raise ValueError(
                f"block {self.number}: {name} is {values.dtype} {values.shape}, but must be {kind} {shape}"
            )
        return values

    def _length(self, block: Block, token: np.ndarray) -> np.ndarray:
        positions = token.shape[1]
        if "length" in block:
            length = self._array(block, "length", (len(token),), "iu").astype(np.int64)
        else:
            length = np.where((token < 0).any(axis=1), (token < 0).argmax(axis=1), positions)
        self._refuse((length < 1) | (length > positions), f"its length is {{}}, but must be 1 to {positions}", length)
        return length.astype(np.int32)

    def _token(self, token: np.ndarray, filled: np.ndarray) -> np.ndarray:
        most = self.layout.vocab_size if self.known else 2**31 - 1
        wrong = filled & ((token < 0) | (token >= most))
        self._refuse(wrong, f"it holds token {{}}, but ids must be 0 to {most - 1}", token)
        token = np.where(filled, token.astype(np.int32), np.int32(MISSING_TOKEN))
        self.largest_token = max(self.largest_token, int(token.max(initial=0)))
        return token

    def _expert(self, expert: np.ndarray, filled: np.ndarray) -> np.ndarray:
        experts, fill = self.layout.num_experts, self.layout.missing_expert
        illegal = expert >= experts if expert.dtype.kind == "u" else (expert < 0) | (expert >= experts)
        odd = filled & illegal.any(axis=(2, 3))
        if odd.any():
            some, rows = expert[odd], np.nonzero(odd)[0]
            unknown = some == fill
            wrong = ((some < 0) | (some >= experts)) & ~unknown
            possible = f"ids must be 0 to {experts - 1}, or {fill} for unknown"
            self._refuse(wrong, f"it holds expert {{}}, but {possible}", some, rows)
            torn = (unknown != unknown[:, :1, :1]).any(axis=(1, 2))
            what = f"a token has {fill}, for unknown, among its choices: give it for all of them or none"
            self._refuse(torn, what, rows=rows)
        dtype = np.dtype(self.layout.arrays()["expert"].dtype)
        checked: np.ndarray = expert.astype(dtype)
        checked[~filled] = fill
        return checked

    def _weight(self, weight: np.ndarray, known: np.ndarray) -> np.ndarray:
        wrong = known & ~(np.abs(weight) <= LARGEST_WEIGHT)
        self._refuse(wrong, "it holds the weight {}, which 16 bits cannot hold", weight)
        return np.where(known, weight, 0).astype(np.float16)

    def _beside(self, block: Block, filled: np.ndarray) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        if "phase" in block:
            phase = self._array(block, "phase", filled.shape, "iu")
            wrong = filled & (phase != MISSING_ROLE) & ((phase < 0) | (phase >= len(PHASES)))
            self._refuse(
                wrong, "it holds the phase {}, but must hold 0 (prompt), 1 (generated) or 255 (unknown)", phase
            )
            found["phase"] = np.where(filled, phase, MISSING_ROLE).astype(np.uint8)
        if "name" in block:
            found["name"] = np.array([str(name) for name in block["name"]], dtype=object)
            if found["name"].shape != filled.shape[:1]:
                raise ValueError(f"block {self.number} has {len(found['name'])} names for {len(filled)} rows")
        return found

    def _documents(self, block: Block, rows: int) -> np.ndarray:
        if "document_id" not in block:
            return np.arange(self.rows, self.rows + rows, dtype=np.int64)
        document: np.ndarray = self._array(block, "document_id", (rows,), "iu").astype(np.int64)
        before = np.concatenate([[max(self.document, 0)], document[:-1]])
        self._refuse(document < before, "it is of document {}, but documents must ascend from 0", document)
        self.document = int(document[-1]) if rows else self.document
        return document

    def _refuse(
        self, wrong: np.ndarray, what: str, values: np.ndarray | None = None, rows: np.ndarray | None = None
    ) -> None:
        """Raise a ValueError that names the first wrong row, counted from the first row of the capture.

        `rows` are the rows of the block to which `wrong` refers; by default all.
        """
        if wrong.any():
            place = tuple(np.argwhere(wrong)[0])
            value, row = "" if values is None else values[place], place[0] if rows is None else rows[place[0]]
            raise ValueError(f"block {self.number}, row {self.rows + int(row)}: {what.format(value)}")


@dataclass(kw_only=True)
class _Counts:
    """What the plan counts."""

    rows: int = 0
    tokens: int = 0
    document: int = -1
    """The last document so far, which may continue."""
    of_document: int = 0
    """The rows of the last document."""
    documents_seen: int = 0
    cut: int = 0

    def add(self, rows: _Checked) -> None:
        document = rows.document_id
        starts = np.diff(document, prepend=self.document) > 0
        self.rows, self.tokens = self.rows + len(rows), self.tokens + int(rows.length.sum())
        self.documents_seen, self.cut = self.documents_seen + int(starts.sum()), self.cut + int((~starts).sum())
        since = int(np.flatnonzero(starts)[-1]) if starts.any() else None
        self.of_document = len(rows) - since if since is not None else self.of_document + len(rows)
        self.document = int(document[-1])

    def plan(self, *, complete: bool) -> Plan:
        """The plan's record. The last document is counted at the end."""
        documents = self.document + complete
        return Plan(
            complete=complete,
            rows=self.rows,
            tokens=self.tokens,
            documents=documents,
            documents_empty=documents - (self.documents_seen - (not complete)),
            pairs_cut=self.cut,
            rows_of_next_document=0 if complete else self.of_document,
        )


@dataclass
class _Writer:
    """Makes shards from rows, each durable before the next one."""

    group: CaptureGroup
    layout: Layout
    known: bool
    counts: _Counts = field(default_factory=_Counts)
    offset: int = 0
    """Tokens of the last document so far."""
    names: dict[int, str] = field(default_factory=dict)
    """Names of documents that are not counted yet."""
    named: int = 0
    """Number of counted documents."""
    committing: Future[None] | None = None

    def write(self, blocks: Iterable[Block]) -> None:
        self.valid, wrong = self.group.commits()
        if wrong:
            self.group.take_back_wrong()
        checker, waiting, step = _Checker(self.layout, known=self.known), list[_Checked](), self.layout.rows_per_shard
        # While a shard is read, the previous one is planned and the one before that is committed: much of this is
        # waiting.
        with ThreadPoolExecutor(2) as pool:
            planning = pool.submit(lambda: None)
            try:
                for block in blocks:
                    waiting.append(checker.check(block))
                    while sum(map(len, waiting)) > step:  # the last shard waits for the end
                        planning.result()
                        rows = _joined(waiting)
                        planning = pool.submit(self._shard, rows.part(slice(step)), pool, complete=False)
                        waiting = [rows.part(slice(step, None))]
            finally:  # rows that were read before a wrong block are kept
                wait([planning])
                wait([self.committing or planning])
            planning.result()
            rows = _joined(waiting)
            if not len(rows):
                raise ValueError("blocks holds no row: there is nothing to write")
            if not self.known and not self.group.plan.complete:
                self._committed()
                self.group.settle_pieces([str(number) for number in range(checker.largest_token + 1)])
                self.group = CaptureGroup(self.group.path, self.group.dataset)
            self._shard(rows, pool, complete=True)
            self._committed()

    def _shard(self, rows: _Checked, pool: Executor, *, complete: bool) -> None:
        """Plan one shard, or check that it is planned, and start its commit."""
        start, shard = self.counts.rows, self.counts.rows // self.layout.rows_per_shard
        planned = Rows(
            token=rows.token,
            length=rows.length,
            document_id=rows.document_id,
            offset=self._offsets(rows),
            phase=rows.beside.get("phase"),
        )
        self.counts.add(rows)
        plan, now = self.counts.plan(complete=complete), self.group.plan
        names = self._names(rows, plan.documents)
        if now.rows == start and not now.complete:
            self.group.publish(planned, names, plan)
        elif not self._planned(shard, planned, names) or (complete and now != plan):
            raise self._other(shard, "tokens")
        self._committed()
        self.committing = pool.submit(self._commit, shard, rows, planned)

    def _committed(self) -> None:
        """Wait for the shard that is being committed, if one is."""
        if self.committing is not None:
            self.committing.result()

    def _commit(self, shard: int, rows: _Checked, planned: Rows) -> None:
        """Commit one shard, or check that it is committed with these routes."""
        if not self.group.commit(shard, rows.routes, rows=planned, facts={}):
            arrays, record = self.layout.arrays(), self.valid[shard]
            if any(object_sums(arrays[name].encode(values)) != record[name] for name, values in rows.routes.items()):
                raise self._other(shard, "choices or weights")

    def _offsets(self, rows: _Checked) -> np.ndarray:
        """The number of tokens of its document before each row."""
        ends = np.cumsum(rows.length, dtype=np.int64)
        starts = np.diff(rows.document_id, prepend=self.counts.document) > 0
        begun = np.maximum.accumulate(np.where(starts, np.arange(len(rows)), -1))
        before = np.where(begun >= 0, (ends - rows.length)[begun], -self.offset)
        offset: np.ndarray = (ends - rows.length - before).astype(np.int32)
        self.offset = int(offset[-1]) + int(rows.length[-1])
        return offset

    def _names(self, rows: _Checked, documents: int) -> list[str]:
        """The names of the documents that are newly counted with these rows."""
        for document, name in zip(rows.document_id.tolist(), rows.beside.get("name", ()), strict=False):
            self.names.setdefault(document, name)
        names = [self.names.pop(number, f"document {number}") for number in range(self.named, documents)]
        self.named = documents
        return names

    def _planned(self, shard: int, rows: Rows, names: list[str]) -> bool:
        """Whether a shard is planned with these rows and its documents have these names."""
        start, stop = self.group.span(shard, self.group.plan)
        arrays = ("token", "length", "document_id", "offset", *self.layout.labels)
        return (
            stop - start == len(rows.length)
            and all(np.array_equal(self.group.values(name, start, stop), getattr(rows, name)) for name in arrays)
            and (not names or self.group.values("name", self.named - len(names), self.named).tolist() == names)
        )

    def _other(self, shard: int, what: str) -> ValueError:
        return ValueError(
            f"{self.group.path}/{self.group.dataset} holds other {what} in shard {shard} than the blocks: use another"
            " name, or remove that folder"
        )
