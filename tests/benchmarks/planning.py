"""How many GPUs one planner feeds: text to durable rows, on 1, 2, 4, ... cores of this machine; by hand.

Real speeches (`demo:prose`, so many times over) through Mixtral's tokenizer into rows of 2,048 positions on a local
disk. Each measurement is a process that may use so many cores. A GPU takes 24,000 tokens/s: about what one H200
reaches with full-size Mixtral in 4 bits.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jobs.capturing.planner import Planner  # noqa: E402
from jobs.sources.documents import Document, Source  # noqa: E402
from jobs.sources.resolve import resolve_source  # noqa: E402
from store import CaptureGroup, Layout  # noqa: E402
from workers.text.tokenizer import load_tokenizer  # noqa: E402
from workers.tiny import tiny_checkpoint  # noqa: E402

GPU_TOKENS_PER_S, POSITIONS = 24_000, 2048


def repeated(source: Source, times: int) -> Source:
    """The source's documents, so many times over."""

    def read(start: int) -> Iterator[Document]:
        return islice((document for _ in range(times) for document in source.documents()), start, None)

    return replace(source, read=read)


def plan(folder: Path, times: int) -> dict[str, float]:
    """Plan in this process."""
    tokenizer = load_tokenizer(tiny_checkpoint())
    layout = Layout(
        sequence_length=POSITIONS, rows_per_shard=128, layers=(0,), num_experts=8, experts_per_token=2,
        vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    group = CaptureGroup.create(folder, "plan", layout=layout, identity={}, attrs={}, pieces=tokenizer.pieces())
    planner = Planner(group, repeated(resolve_source("demo:prose"), times), tokenizer)
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = planner.run().tokens
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"tokens": tokens, "tokens_per_s": tokens / wall, "tokens_per_cpu_s": tokens / cpu}


def on_cores(cores: int, times: int) -> dict[str, float]:
    """Plan in a process that may use so many cores."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--times", str(times), "--cores", str(cores), "--folder", folder]
        environment = {**os.environ, "RAYON_NUM_THREADS": str(cores)}
        told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return {name: round(value) for name, value in json.loads(told).items()}


def main() -> None:
    """Measure on each number of cores, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=4, help="how often the text is repeated")
    parser.add_argument("--cores", type=int, help="measure on so many cores only, and print")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "planning.json")
    options = parser.parse_args()
    if options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
        print(json.dumps(plan(options.folder / "s.zarr", options.times)))
        return
    all_cores = len(os.sched_getaffinity(0))
    cores = sorted({1 << power for power in range(all_cores.bit_length()) if 1 << power <= all_cores} | {all_cores})
    measured = {number: on_cores(number, options.times) for number in cores}
    best = max(one["tokens_per_s"] for one in measured.values())
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{all_cores} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("tokenizers", "zarr", "numcodecs")},
        "by_cores": measured,
        "gpus_fed": round(best / GPU_TOKENS_PER_S, 1),
        "nodes_of_8_gpus_fed": round(best / GPU_TOKENS_PER_S / 8, 1),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
