"""One stage of a capture of many tokens, in its own process, which prints its peak memory.

`python memory_driver.py plan|capture|report TOKENS STORE`. The grid is that of Mixtral: 32 layers, two of eight
experts, shards of the default size. The model is a table, so that arrays are created as fast as they are written.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import numpy as np
from fake_model import FakeRun, FakeTokenizer, fake_layout

from jobs.capturing import local
from jobs.capturing.captures import capture_datasets
from jobs.capturing.local import capture_here
from jobs.capturing.planner import Planner
from jobs.sources.documents import Document, Source
from store.layout import default_rows_per_shard
from workers.replica import Replica
from workers.shard import Routes

LAYERS, POSITIONS, DOCUMENT_TOKENS = tuple(range(32)), 512, 400
LAYOUT = fake_layout(sequence_length=POSITIONS, rows_per_shard=default_rows_per_shard(POSITIONS), layers=LAYERS)


class NumberTokenizer(FakeTokenizer):
    """A text is a number: the seed of its 400 ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text."""
        seeds = (np.random.default_rng(int(text)) for text in texts)
        return [seed.integers(2, self.vocab_size, DOCUMENT_TOKENS).astype(np.int32) for seed in seeds]


class TableEngine:
    """Each token id has its choices."""

    layers, num_experts, experts_per_token = LAYERS, 8, 2
    description: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        first = np.random.default_rng(0).integers(0, 8, (LAYOUT.vocab_size, len(LAYERS)))
        self.expert = np.stack([first, (first + 1) % 8], axis=-1).astype(np.uint8)
        self.weight = np.where(self.expert % 2, 0.25, 0.75).astype(np.float16)

    def start(self, token: np.ndarray, length: np.ndarray) -> Callable[[], Routes]:
        """See `workers.shard.Engine.start`."""
        ids = np.maximum(token, 0)
        return lambda: {"expert": self.expert[ids], "weight": self.weight[ids]}


class LateWriter:
    """Replaces the writing thread and the lock that lets it write one shard at a time: it lags as far as allowed.

    A shard is written when the next one is computed, in the thread that computed it. The lag of a real thread, and
    whether its peak coincides with that of the computing thread, would be random.
    """

    def __init__(self) -> None:
        self._commit: Callable[[], object] = lambda: None

    def submit(self, commit: Callable[[], object]) -> SimpleNamespace:
        """Replaces the future of a write."""
        self._commit = cache(commit)
        return SimpleNamespace(result=self._commit)

    def acquire(self) -> None:
        """The next shard is computed."""
        self._commit()

    def release(self) -> None:
        """A shard is written."""

    def shutdown(self) -> None:
        """There is no thread."""

    def replica(self, *arguments: Any) -> Replica:
        """A worker whose shards it writes."""
        made = Replica(*arguments)
        made._writing = self  # type: ignore[assignment]
        return made


def documents(count: int) -> Source:
    """A number of documents, created as they are read."""

    def read(start: int) -> Iterator[Document]:
        return (
            Document(name=f"document {n}", text=f"{n:0{2 * DOCUMENT_TOKENS}}")
            for n in islice(range(count), start, None)
        )

    return Source(name="fake", read=read, identify=dict)


def plan(tokens: int, store: Path) -> None:
    """Plan the text."""
    Planner(FakeRun(store, LAYOUT).open_group("fake"), documents(tokens // DOCUMENT_TOKENS), NumberTokenizer()).run()  # type: ignore[arg-type]


def capture(tokens: int, store: Path) -> None:
    """Fill every shard."""
    writer = LateWriter()
    local.ThreadPoolExecutor = lambda *_, **__: writer  # type: ignore[assignment, misc]
    local.Replica = writer.replica  # type: ignore[assignment, misc]
    run: Any = FakeRun(store, LAYOUT, batch_tokens=32_768)
    run.tokenizer, run.make_engine = NumberTokenizer(), TableEngine
    capture_datasets(run, [("fake", documents(tokens // DOCUMENT_TOKENS))], capture_here)


def report(tokens: int, store: Path) -> None:
    """Draw the report with one thread: whether the peaks of two threads coincide would be random."""
    os.cpu_count = lambda: 1
    from jobs import report as script

    script.main([str(store), "-o", f"{store}.html"])


def peak_bytes() -> int:
    """The peak memory of this process; `ru_maxrss` would include that of the process that started it."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    {"plan": plan, "capture": capture, "report": report}[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))
    print(peak_bytes())
