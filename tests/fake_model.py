"""A model given by a formula, and captures with it, for tests that need many of them quickly.

Its choices are a hash of (token, position, layer). It never imports torch, so that a process can be started, killed and
started again in a fraction of a second. At and beyond a row's length it returns values that must not be kept: a legal
expert, and weights that are not finite.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jobs.capturing.captures import capture_datasets
from jobs.capturing.local import capture_here
from jobs.sources.documents import Document, Source
from store import CaptureGroup, Coverage, Layout
from workers.replica import Assignment
from workers.shard import Engine, OutOfMemory, Routes
from workers.text.rows import BosRule

BOS_ID = 1
VOCAB_SIZE = 1000
TOKEN, POSITION, LAYER = 2654435761, 40503, 97  # odd multipliers of the hash


def fake_choice(token: int, position: int, layer: int, k: int, num_experts: int) -> tuple[int, float]:
    """Choice number `k` of a token, one at a time: what `FakeEngine` must have returned."""
    mixed = (token * TOKEN + position * POSITION + layer * LAYER) % 2**32
    mixed ^= mixed >> 15
    return (mixed + k * (1 + mixed % 3)) % num_experts, 2.0**-k * (1 + mixed % 64 / 64)


class FakeEngine:
    """An engine of the formula.

    Parameters
    ----------
    fits
        Maximum number of padded tokens in a micro-batch; more raise `OutOfMemory`.
    """

    def __init__(
        self, layers: Sequence[int] = (0, 1, 2), num_experts: int = 8, experts_per_token: int = 2, fits: int = 10**9
    ) -> None:
        self.layers, self.num_experts, self.experts_per_token = tuple(layers), num_experts, experts_per_token
        self.fits = fits
        self.description = {"model": "fake"}
        self.sizes: list[tuple[int, int]] = []
        """Rows and positions of each micro-batch that was routed."""

    def start(self, token: np.ndarray, length: np.ndarray) -> Callable[[], Routes]:
        """See `workers.shard.Engine.start`. Everything is done at once."""
        routes = self.route(token, length)
        return lambda: routes

    def route(self, token: np.ndarray, length: np.ndarray) -> Routes:
        """The choices, and their weights, by name."""
        if token.size > self.fits:
            raise OutOfMemory(f"{token.size} tokens, and {self.fits} fit")
        self.sizes.append((token.shape[0], token.shape[1]))
        dtype = np.uint8 if self.num_experts <= 255 else np.uint16
        expert = np.zeros((*token.shape, len(self.layers), self.experts_per_token), dtype)
        weight = np.full(expert.shape, np.nan, dtype=np.float16)
        filled = np.arange(token.shape[1]) < length[:, None]
        position = np.broadcast_to(np.arange(token.shape[1], dtype=np.uint64), token.shape)[filled]
        placed = token[filled].astype(np.uint64) * np.uint64(TOKEN) + position * np.uint64(POSITION)
        for index, layer in enumerate(self.layers):
            mixed = (placed + np.uint64(layer * LAYER)).astype(np.uint32)
            mixed ^= mixed >> np.uint32(15)
            for k in range(self.experts_per_token):
                step = np.uint32(k) * (np.uint32(1) + mixed % np.uint32(3))
                expert[filled, index, k] = (mixed.astype(np.uint64) + step) % np.uint64(self.num_experts)
                weight[filled, index, k] = 2.0**-k * (1 + mixed % np.uint32(64) / 64)
        return {"expert": expert, "weight": weight}


class FakeTokenizer:
    """Each word is a token whose id is a hash of the word. With `roles`, a message's words have its speaker's
    number."""

    bos_id: int | None = BOS_ID
    vocab_size = VOCAB_SIZE

    def __init__(self) -> None:
        self.encoded: list[str] = []
        """Every text that was tokenized, in order."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        self.encoded += texts
        return [np.array([word_id(word) for word in text.split()], dtype=np.int32) for text in texts]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all messages, one after the other, and the speaker of each."""
        texts = [message["content"] for message in messages]
        ids = self.encode_batch(texts)
        speakers = [np.full(len(part), ROLES.index(m["role"])) for part, m in zip(ids, messages, strict=True)]
        return np.concatenate(ids).astype(np.int32), np.concatenate(speakers).astype(np.uint8)


ROLES = ("system", "user", "assistant")


def word_id(word: str) -> int:
    """Id of a word: 2 to `VOCAB_SIZE` - 1."""
    return 2 + zlib.crc32(word.encode()) % (VOCAB_SIZE - 2)


def fake_layout(**changes: Any) -> Layout:
    """A small grid: P = 8, S = 4, three layers, two of eight experts."""
    sizes: dict[str, Any] = {
        "sequence_length": 8,
        "rows_per_shard": 4,
        "layers": (0, 1, 2),
        "num_experts": 8,
        "experts_per_token": 2,
        "vocab_size": VOCAB_SIZE,
    }
    return Layout(**{**sizes, **changes})


def text_source(texts: Sequence[str | list[dict[str, str]]]) -> Source:
    """A data set of these documents, named "document 0" and so on; a list of messages is a conversation."""

    def read(start: int) -> Iterator[Document]:
        for number, text in islice(enumerate(texts), start, None):
            content: dict[str, Any] = {"text": text} if isinstance(text, str) else {"messages": text}
            yield Document(name=f"document {number}", **content)

    conversations = any(isinstance(text, list) for text in texts)
    return Source(name="fake", read=read, identify=partial(dict, data="fake"), conversations=conversations)


class FakeRun:
    """The parts of `jobs.capturing.run.Run` that `capture_datasets` needs, with the fake model.

    Parameters
    ----------
    store
        The store of the capture.
    identity
        Further fields of the identity.
    """

    def __init__(
        self,
        store: Path | str,
        layout: Layout | None = None,
        *,
        bos: BosRule = "none",
        limit_documents: int | None = None,
        batch_tokens: int = 24,
        fits: int = 10**9,
        identity: Mapping[str, Any] | None = None,
        retry_quarantined: bool = False,
    ) -> None:
        self.store, self.layout, self.batch_tokens = store, layout or fake_layout(), batch_tokens
        self.config = SimpleNamespace(
            bos=bos, limit_documents=limit_documents, store_path=str(store), retry_quarantined=retry_quarantined,
            skip_unrenderable=False,
            model="fake", quantization="none",
        )  # fmt: skip
        self.identity = {"model": "fake", "bos": bos, "sequence_length": self.layout.sequence_length} | (identity or {})
        self.device, self.quantization = "cpu", "none"
        self.tokenizer = FakeTokenizer()
        layout = self.layout
        self.make_engine: Callable[[], Engine] = partial(
            FakeEngine, layout.layers, layout.num_experts, layout.experts_per_token, fits
        )

    def prepare(self, name: str, source: Source) -> str:
        """Nothing is left to settle."""
        return name

    def open_group(self, prepared: str) -> CaptureGroup:
        """Create the group or resume it."""
        return CaptureGroup.create(
            self.store,
            prepared,
            layout=self.layout,
            identity=self.identity,
            attrs={"model": "fake", "special_token_ids": [BOS_ID]},
            pieces=[f"▁{number}" for number in range(self.layout.vocab_size)],
        )

    def assignment(self, leases: Mapping[str, str]) -> Assignment:
        """The work of a replica."""
        return Assignment(
            store=str(self.store),
            leases=leases,
            make_engine=self.make_engine,
            device="cpu",
            batch_tokens=self.batch_tokens,
        )


def fake_capture(
    store: Path | str, texts: Sequence[str | list[dict[str, str]]], name: str = "fake", **options: Any
) -> Coverage:
    """Capture texts with the code that `jobs/capture.py` runs."""
    run: Any = FakeRun(store, **options)
    return capture_datasets(run, [(name, text_source(texts))], capture_here)[0]


def words(count: int, seed: int = 0) -> str:
    """A text with a number of tokens."""
    return " ".join(f"w{number}" for number in np.random.default_rng(seed).integers(0, 5000, count))


TEXTS = [words(5, 1), "", words(70, 2), words(8, 3), " \n ", words(9, 4), words(30, 5)]
"""17 rows of 8 positions, five shards of four rows; the third document spans three shards."""


def store_files(store: Path) -> dict[str, bytes]:
    """Every file of a store by its path in it."""
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in store.rglob("*") if path.is_file()}
