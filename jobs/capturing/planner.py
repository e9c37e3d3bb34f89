"""Plan a data set: from text to token ids to rows, in complete shards, in bounded memory, only once.

Deterministic: a killed planner resumes after the last complete shards that it published and produces equal bytes; a
complete plan is never repeated.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from jobs.console.terminal import log
from jobs.sources.documents import Document, Source
from store.group import CaptureGroup
from store.layout import MISSING_ROLE
from store.plan import SKIPPED_NAMED, Plan, Rows
from workers.text import Unrenderable
from workers.text.rows import BosRule, document_rows, padded
from workers.text.tokenizer import TextTokenizer

PUBLISH_POSITIONS = 2**20  # positions made durable at a time: four shards of the default size (arbitrary)
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 2**22  # characters of text in memory at a time, unless one document is longer (arbitrary)
SEQUENCE_LENGTHS = tuple(1 << power for power in range(4, 12))  # 16 to 2,048


@dataclass(frozen=True)
class _PlannedRow:
    document: int
    offset: int
    tokens: np.ndarray
    roles: np.ndarray | None
    cut: bool
    """Whether the document continues in the next row."""


@dataclass(frozen=True)
class _Seen:
    name: str
    empty: bool
    repaired: bool
    skipped: bool


def encode(
    documents: Sequence[Document], tokenizer: TextTokenizer, *, skip_unrenderable: bool = False
) -> Iterator[tuple[Document, np.ndarray, np.ndarray | None]]:
    """Token ids of each document, and for conversations the role of each token.

    Raises
    ------
    Unrenderable
        When a document has a fault, or the chat template rejects it; the message names it. If such documents are
        skipped, the document has no tokens, and its `fault` says why.
    """
    nothing = np.empty(0, np.int32), np.empty(0, np.uint8)
    texts = iter(tokenizer.encode_batch([d.text for d in documents if d.messages is None]))
    for document in documents:
        encoded: tuple[np.ndarray, np.ndarray | None] = nothing
        if document.messages is None:
            encoded = next(texts), None
        elif document.messages:
            beside = {"tools": document.tools, "documents": document.documents}
            try:
                encoded = tokenizer.chat(document.messages, **{k: v for k, v in beside.items() if v is not None})
            except Unrenderable as error:
                document = replace(document, fault=str(error))
            except ValueError as error:
                raise ValueError(f"document {document.name!r}: {error}") from error
        if document.fault is not None and not skip_unrenderable:
            where = "" if document.fault.startswith(document.name) else f"document {document.name!r}: "
            raise Unrenderable(f"{where}{document.fault}; use --skip_unrenderable to skip such documents")
        yield document, *encoded


def default_sequence_length(
    source: Source, tokenizer: TextTokenizer, limit_documents: int | None, *, skip_unrenderable: bool = False
) -> int:
    """P: the smallest power of two that holds the longest of the first 1,000 documents; 16 to 2,048.

    Known before the data set is tokenized, and deterministic.
    """
    longest = 0
    documents = source.documents(faulty=True)
    for batch in _batches(islice(documents, min(1000, limit_documents or 1000))):
        encoded = encode(batch, tokenizer, skip_unrenderable=skip_unrenderable)
        longest = max([longest, *(len(ids) for _, ids, _ in encoded)])
        if longest > SEQUENCE_LENGTHS[-1]:
            break
    return min((length for length in SEQUENCE_LENGTHS if length >= longest), default=SEQUENCE_LENGTHS[-1])


class Planner:
    """Appends a data set's rows to its group.

    Parameters
    ----------
    group
        The output group; its plan says where to start.
    source, tokenizer
        The source and tokenizer of the group's identity.
    bos, limit_documents, skip_unrenderable
        As configured.
    """

    def __init__(
        self,
        group: CaptureGroup,
        source: Source,
        tokenizer: TextTokenizer,
        *,
        bos: BosRule = "none",
        limit_documents: int | None = None,
        skip_unrenderable: bool = False,
    ) -> None:
        self.group, self.source, self.tokenizer = group, source, tokenizer
        self.bos, self.limit_documents, self.skip_unrenderable = bos, limit_documents, skip_unrenderable
        self.layout = group.layout
        self.plan = group.plan
        self._rows: deque[_PlannedRow] = deque()
        self._seen: deque[_Seen] = deque()

    def run(self, progress: Callable[[Plan], None] = lambda plan: None) -> Plan:
        """Plan to the end of the data set; `progress` is called after each publication.

        Raises
        ------
        ValueError
            When a document cannot be tokenized as requested (the message names it), or the text changed meanwhile.
        """
        if self.plan.complete:
            return self.plan
        rows = self.layout.rows_per_shard
        step = max(1, PUBLISH_POSITIONS // self.layout.sequence_length // rows) * rows
        skip = self.plan.rows_of_next_document
        document = self.plan.documents
        documents = self.source.documents(document, faulty=True)
        for batch in _batches(islice(documents, self._remaining(document))):
            for item, ids, roles in encode(batch, self.tokenizer, skip_unrenderable=self.skip_unrenderable):
                self._add(document, item, ids, roles, skip)
                document, skip = document + 1, 0
                while len(self._rows) >= step:
                    self._publish(step)
                    progress(self.plan)
        if self.source.identify() != self.source.identity:
            raise ValueError(
                f"the text of {self.source.name} changed while it was planned: remove {self.group.path}/"
                f"{self.group.dataset} and capture it again"
            )
        self._publish(len(self._rows), complete=True)
        progress(self.plan)
        return self.plan

    def _remaining(self, planned: int) -> int | None:
        return None if self.limit_documents is None else max(0, self.limit_documents - planned)

    def _add(self, document: int, item: Document, ids: np.ndarray, roles: np.ndarray | None, skip: int) -> None:
        try:
            windows = document_rows(ids, self.layout.sequence_length, bos=self.bos, bos_id=self.tokenizer.bos_id)
        except ValueError as error:
            raise ValueError(f"document {document} ({item.name!r}): {error}") from error
        if item.fault is not None:
            log(f"{self.group.dataset}: document {document} ({item.name!r}) is skipped: {item.fault}")
        skipped = item.fault is not None
        self._seen.append(_Seen(item.name, empty=not windows, repaired=item.repaired, skipped=skipped))
        for index, (offset, tokens, has_bos) in enumerate(windows):
            if index < skip:
                continue
            part = None
            if roles is not None:
                part = roles[offset : offset + len(tokens) - has_bos]
                part = np.concatenate([np.full(int(has_bos), MISSING_ROLE, np.uint8), part]).astype(np.uint8)
            self._rows.append(_PlannedRow(document, offset, tokens, part, cut=index + 1 < len(windows)))

    def _publish(self, count: int, complete: bool = False) -> None:
        rows = [self._rows.popleft() for _ in range(count)]
        last = self.plan.documents + len(self._seen)
        following = self._rows[0].document if self._rows else last  # the document that continues or comes next
        seen = [self._seen.popleft() for _ in range(following - self.plan.documents)]
        begun = sum(row.document == following for row in rows)
        if following == self.plan.documents:  # a document that spans many shards
            begun += self.plan.rows_of_next_document
        plan = replace(
            self.plan,
            complete=complete,
            rows=self.plan.rows + count,
            tokens=self.plan.tokens + sum(len(row.tokens) for row in rows),
            documents=following,
            documents_empty=self.plan.documents_empty + sum(item.empty for item in seen),
            documents_repaired=self.plan.documents_repaired + sum(item.repaired for item in seen),
            documents_skipped=self.plan.documents_skipped + sum(item.skipped for item in seen),
            skipped=(*self.plan.skipped, *(item.name for item in seen if item.skipped))[:SKIPPED_NAMED],
            pairs_cut=self.plan.pairs_cut + sum(row.cut for row in rows),
            rows_of_next_document=begun,
        )
        if self.group.plan != self.plan:
            raise self.group.overtaken()
        self.group.publish(self._arrays(rows), [item.name for item in seen], plan)
        self.plan = plan

    def _arrays(self, rows: Sequence[_PlannedRow]) -> Rows:
        positions = self.layout.sequence_length
        columns: dict[str, Any] = {
            "token": padded([row.tokens for row in rows], positions),
            "length": np.array([len(row.tokens) for row in rows], dtype=np.int32),
            "document_id": np.array([row.document for row in rows], dtype=np.int64),
            "offset": np.array([row.offset for row in rows], dtype=np.int32),
        }
        if self.layout.roles:
            roles = [np.zeros(0, np.uint8) if row.roles is None else row.roles for row in rows]
            columns["role"] = padded(roles, positions, MISSING_ROLE)
        return Rows(**columns)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += document.characters
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
