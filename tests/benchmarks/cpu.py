"""The cost of each stage on this machine's CPU: `make bench`, by hand; never a test.

Plan (text to durable rows), capture (tiny Mixtral, float32), write (one shard of Mixtral 8x7B's shape, encoded and
committed) and scan (all the report's reducers in one pass). The written routes are synthetic: skewed, with a preferred
expert per token, less compressible than a real model's.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `jobs/report.py`, whose scan has threads of its own

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from analysis.report.answers import answer  # noqa: E402
from jobs.capturing.options import CaptureConfig  # noqa: E402
from jobs.capturing.planner import Planner  # noqa: E402
from jobs.capturing.run import Run  # noqa: E402
from store import CaptureGroup, Layout, coverage, open_capture  # noqa: E402
from store.lease import lease  # noqa: E402
from store.plan import Plan, Rows  # noqa: E402
from workers.replica import Replica  # noqa: E402

POSITIONS, LAYERS, EXPERTS, K, VOCABULARY = 2048, 32, 8, 2, 32_000


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of an action."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def plan_and_capture(folder: Path) -> dict[str, float]:
    """Plan and capture real speeches with the tiny Mixtral."""
    config = CaptureConfig(
        dataset=("demo:prose",), model="tiny", quantization="none", device="cpu", store=str(folder / "tiny.zarr"),
        limit_documents=100,
    )  # fmt: skip
    run = Run(config)
    [(name, source)] = run.sources()
    group = run.open_group(run.prepare(name, source))
    wall, cpu = timed(Planner(group, source, run.tokenizer, limit_documents=100).run)
    tokens = group.plan.tokens
    result = {"plan_tokens_per_s": tokens / wall, "plan_tokens_per_cpu_s": tokens / cpu, "plan_tokens": tokens}
    replica = Replica()
    with lease(group) as held, ThreadPoolExecutor(2) as threads:  # one shard is written while the next is computed
        replica.load(run.assignment({name: held.token}))
        shards = range(group.num_shards)
        wall, _ = timed(lambda: list(threads.map(replica.capture, [name] * len(shards), shards)))
    return result | {"capture_tiny_tokens_per_s": tokens / wall}


def write_and_scan(folder: Path, shards: int) -> dict[str, float]:
    """Commit shards of Mixtral's shape, then answer the report's questions about them."""
    random = np.random.default_rng(0)
    layout = Layout(
        sequence_length=POSITIONS, rows_per_shard=128, layers=tuple(range(LAYERS)), num_experts=EXPERTS,
        experts_per_token=K, vocab_size=VOCABULARY,
    )  # fmt: skip
    store = folder / "wide.zarr"
    group = CaptureGroup.create(
        store, "wide", layout=layout, identity={"synthetic": 0}, pieces=[str(n) for n in range(VOCABULARY)],
        attrs={"special_token_ids": [], "model": "synthetic", "quantization": "none"},
    )  # fmt: skip
    rows = 128 * shards
    token = random.zipf(1.2, (rows, POSITIONS)).clip(max=VOCABULARY - 1).astype(np.int32)
    full = np.full(rows, POSITIONS, dtype=np.int32)
    planned = Rows(token=token, length=full, document_id=np.arange(rows), offset=np.zeros(rows, dtype=np.int32))
    group.publish(planned, ["d"] * rows, Plan(complete=True, rows=rows, documents=rows, tokens=token.size))
    preferred = random.integers(0, EXPERTS, (VOCABULARY, LAYERS), dtype=np.uint8)
    seconds = 0.0
    for shard in range(shards):
        read = group.read_rows(shard)
        first = preferred[read.token]
        moved = random.random(first.shape) < 0.5
        first = np.where(moved, random.integers(0, EXPERTS, first.shape, dtype=np.uint8), first)
        expert = np.stack([first, (first + random.integers(1, EXPERTS, first.shape)) % EXPERTS], axis=-1)
        share = random.beta(4, 2, first.shape).clip(0.5, 1)
        weight = np.stack([share, 1 - share], axis=-1).astype(np.float16)
        routes = {"expert": expert.astype(np.uint8), "weight": weight}
        wall, _ = timed(lambda: group.commit(shard, routes, rows=read, facts={}))  # noqa: B023
        seconds += wall
    state = coverage(store, "wide")
    data = open_capture(store, "wide")
    answer(data.isel(doc=slice(0, 128)), state, "warm")  # the kernels are compiled once
    wall, cpu = timed(lambda: answer(data, state, "wide"))
    return {
        "write_tokens_per_s": state.tokens_done / seconds,
        "write_seconds_a_shard": seconds / shards,
        "write_bytes_per_token": state.bytes_done / state.tokens_done,
        "scan_tokens": state.tokens_done,
        "scan_tokens_per_s": state.tokens_done / wall,
        "scan_tokens_per_cpu_s": state.tokens_done / cpu,
    }


def peak_memory(folder: Path) -> dict[str, float]:
    """Peak bytes of each stage at one and at five million tokens, 32 layers, each in its own process."""
    driver = ROOT / "tests" / "memory_driver.py"
    peaks = {}
    for millions in (1, 5):
        for stage in ("plan", "capture", "report"):
            arguments = [sys.executable, str(driver), stage, f"{millions}000000", str(folder / f"{millions}.zarr")]
            told = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
            peaks[f"{stage}_peak_bytes_{millions}m_tokens"] = float(told.splitlines()[-1])
    return peaks


def main() -> None:
    """Run the stages and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = plan_and_capture(Path(folder)) | write_and_scan(Path(folder), options.shards)
        measured |= peak_memory(Path(folder))
    packages = ("torch", "transformers", "zarr", "numcodecs", "xarray", "numba", "tokenizers")
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        **{name: round(value, 3 if value < 100 else 0) for name, value in measured.items()},
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
