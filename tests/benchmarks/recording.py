"""The cost of recording: `python tests/benchmarks/recording.py -o RESULT.json` on one GPU, by hand.

Creates Mixtral 8x7B at full size on the GPU (random weights, NF4) and prints rows for the choices alone, with router
logits, with norms of outputs, with log-probabilities, and with all three: tokens/s of micro-batches one after the other
with their proof and their copy to the host, and the time relative to the choices alone; then the same for shards
written to a store, with the bytes per token of each array, and the slowdown relative to no store (the GPU's idle time).
Contestants alternate, and the ratio of medians in one run is reported. `--tiny` runs it with the tiny model on a CPU,
for trying out the script.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `workers.engine.load_engine` does

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

from full_size import as_loaded, full_size_model, with_head  # noqa: E402

from store.group import CaptureGroup  # noqa: E402
from store.identity import identity_of  # noqa: E402
from store.layout import Layout  # noqa: E402
from store.lease import lease  # noqa: E402
from store.plan import Plan, Rows  # noqa: E402
from workers.engine import ModelEngine  # noqa: E402
from workers.models.loading import LoadedModel, load_model  # noqa: E402
from workers.record import Recordable, Recorded, what_to_record  # noqa: E402
from workers.replica import Assignment, Replica  # noqa: E402
from workers.tiny import tiny_checkpoint  # noqa: E402

GIB = 2**30
ASKED: dict[str, tuple[Recordable, ...]] = {
    "choices": (),
    "logits": ("logits",),
    "output_norm": ("output_norm",),
    "logprob": ("logprob",),
    "all three": ("logits", "output_norm", "logprob"),
}


class Batches:
    """Micro-batches of random tokens, each started before the previous one is fetched, like those of a shard."""

    def __init__(self, engine: ModelEngine, tokens: int, positions: int) -> None:
        self.engine, rows = engine, max(1, tokens // positions)
        embedding: Any = engine.model.get_submodule("embed_tokens")
        self.token = np.random.default_rng(0).integers(0, embedding.num_embeddings, (rows, positions), dtype=np.int32)
        self.length = np.full(rows, positions, np.int32)
        self.before: Callable[[], Any] = lambda: None

    def __call__(self) -> None:
        """One more."""
        begun = self.engine.start(self.token, self.length)
        self.before()
        self.before = begun


def alternate(contestants: dict[str, Batches], seconds: float) -> dict[str, float]:
    """Median seconds of a micro-batch of each, two at a time, in turns; the first round is warming up."""
    took: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.monotonic() + seconds
    while time.monotonic() < end or min(map(len, took.values())) < 3:
        for name, run in contestants.items():
            run()
            started = time.perf_counter()
            for _ in range(2):
                run()
            took[name].append((time.perf_counter() - started) / 2)
            run.before()
            run.before = lambda: None
    return {name: statistics.median(times[1:]) for name, times in took.items()}


@contextmanager
def planned(
    engine: ModelEngine, recorded: Recorded, shards: int, rows: int, positions: int
) -> Iterator[tuple[CaptureGroup, str]]:
    """A group with a number of shards of random tokens to fill, and the token of its lease."""
    vocabulary = engine.model.get_submodule("embed_tokens").num_embeddings
    assert isinstance(vocabulary, int)
    layout = Layout(
        sequence_length=positions,
        rows_per_shard=rows,
        layers=engine.layers,
        num_experts=engine.num_experts,
        experts_per_token=engine.experts_per_token,
        vocab_size=vocabulary,
        **asdict(recorded),
    )
    number = np.arange(rows * shards)
    token = np.random.default_rng(0).integers(0, vocabulary, (len(number), positions), dtype=np.int32)
    length = np.full(len(number), positions, np.int32)
    given = Rows(token=token, length=length, document_id=number, offset=np.zeros(len(number), np.int32))
    plan = Plan(complete=True, rows=len(number), tokens=token.size, documents=len(number))
    with tempfile.TemporaryDirectory() as folder:
        group = CaptureGroup.create(
            folder, "random", layout=layout, identity=identity_of(asdict(recorded)), attrs={}, pieces=["a"]
        )
        group.publish(given, [str(row) for row in number], plan)
        with lease(group) as held:
            yield group, held.token


def written(
    engine: ModelEngine, recorded: Recorded, shards: int, rows: int, positions: int, tokens: int
) -> tuple[float, dict[str, float]]:
    """Seconds per micro-batch while shards are written, and bytes per token of each array.

    Between the first commit and the last: the end of a week-long capture does not matter.
    """
    with planned(engine, recorded, shards, rows, positions) as (group, token):
        replica = Replica()
        replica.load(
            Assignment(
                store=str(group.path),
                leases={"random": token},
                make_engine=lambda: engine,
                device=engine.device.type,
                batch_tokens=tokens,
            )
        )
        with ThreadPoolExecutor(2) as pool:  # one shard is written while the next one is computed
            list(pool.map(partial(replica.capture, "random"), range(shards)))
        commits = sorted(file.stat().st_mtime for file in Path(group.path).glob("*/expert/commits/*.json"))
        sizes: Counter[str] = Counter()
        for record in group.commits()[0].values():
            sizes.update({name: record[name]["bytes"] for name in group.layout.routes})
    second = (commits[-1] - commits[0]) / (shards - 1) * tokens / (rows * positions)
    return second, {name: round(size / (shards * rows * positions), 2) for name, size in sizes.items()}


def rows_of(loaded: LoadedModel, options: argparse.Namespace, emit: Callable[[dict[str, Any]], None]) -> None:
    """Measure, and give row after row."""
    asked = {
        name: what_to_record(names, loaded.num_experts, loaded.provenance["compute_dtype"])
        for name, names in ASKED.items()
    }
    engines = {name: ModelEngine(loaded, recorded) for name, recorded in asked.items()}
    batches = {name: Batches(engine, options.tokens, options.positions) for name, engine in engines.items()}
    took = alternate({name: batches[name] for name in options.compared}, options.seconds)
    for name, second in took.items():
        row: dict[str, Any] = {"recorded": name, "tokens": options.tokens, "positions": options.positions}
        row |= {"tokens_per_s": round(options.tokens / second)}
        row |= {"cost_relative_to_choices": round(second / took["choices"] - 1, 4)}
        if engines[name].device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            batches[name]()
            batches[name].before()
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        emit(row)
    if options.shards < 2:
        return
    plain = 0.0
    for name in options.written:
        engine, rows = engines[name], options.shard_tokens // options.positions
        second, sizes = written(engine, asked[name], options.shards, rows, options.positions, options.tokens)
        again = alternate({name: batches[name]}, options.seconds / 4)[name]  # the card slows down under load
        plain = plain or second
        row = {"recorded": name, "written": True, "tokens_per_s": round(options.tokens / second)}
        row |= {"cost_relative_to_choices": round(second / plain - 1, 4), "idle": round(1 - again / second, 4)}
        emit(row | {"bytes_a_token": sizes, "bytes_a_token_in_all": round(sum(sizes.values()), 2)})


def main() -> None:
    """Make the model, measure, write the result after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=65_536, help="of a micro-batch")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the comparison without a store")
    parser.add_argument("--shards", type=int, default=4, help="to write for each; 0 leaves it out")
    parser.add_argument("--compared", nargs="+", choices=ASKED, default=list(ASKED), help="without a store")
    parser.add_argument("--written", nargs="+", choices=ASKED, default=list(ASKED), help="of which shards are written")
    parser.add_argument("--shard_tokens", type=int, default=262_144)
    parser.add_argument("--tiny", action="store_true", help="the tiny model, on a CPU")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    gpu = "a CPU" if options.tiny else torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"one {gpu}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "model": "tiny" if options.tiny else f"Mixtral 8x7B, {options.layers} layers, random weights in nf4",
        "rows": rows,
    }

    def emit(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            loaded = load_model(tiny_checkpoint(), quantization="nf4", device="cpu")
        else:
            loaded = as_loaded(full_size_model(options.layers), folder=with_head(Path(folder), options.layers))
        rows_of(loaded, options, emit)


if __name__ == "__main__":
    main()
