"""A capture on a GPU like a user's: `python tests/benchmarks/gpu_capture.py -o RESULT.json`, by hand.

Makes a random checkpoint of Mixtral 8x7B's full width in the published layout (bf16, or with `--stored nf4` as written
by `jobs/quantize.py`), and captures real text from it with `jobs/capture.py --local`. Then it repeats this in a second
store, kills that run with SIGKILL in the middle, resumes it with the same command, and compares bytes. With `--replicas
1 2` it does the same as jobs on a Ray head (`ray job submit`), with this number of workers sharing the GPU; their
stores are read back with `jobs/status.py --verify`. The GPU's utilization is reported by the driver (package
nvidia-ml-py), read ten times a second.

A full-size bf16 checkpoint has 93 GB; eight layers have 23. If one disk is too small, `--spill FOLDER` puts the files
of later layers elsewhere. Rates are for the layers that were run; the file says how many.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Any

import pynvml
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

from checkpoints import checkpoint_gb, make_checkpoint  # noqa: E402
from ray_head import RAY, Head, ray_head  # noqa: E402

from store import coverage  # noqa: E402

OPTIONS: list[str] = []
"""Further options of a user's command."""


def command(model: Path, store: Path, documents: int, *how: str) -> list[str]:
    """A user's command."""
    capture = [sys.executable, str(ROOT / "jobs" / "capture.py"), *how, "--model", str(model)]
    return [*capture, "--dataset", "demo:prose", "--limit_documents", str(documents), "--store", str(store), *OPTIONS]


class Card:
    """The driver's report on a GPU while the block runs: seconds, percent of time with a kernel, MiB in use."""

    def __init__(self, index: int = 0) -> None:
        self.index = index

    def __enter__(self) -> "Card":
        pynvml.nvmlInit()
        self.handle = pynvml.nvmlDeviceGetHandleByIndex(self.index)
        self.samples: list[tuple[float, int, int]] = []
        self.done = threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return self

    def _read(self) -> None:
        while not self.done.wait(0.1):
            busy = pynvml.nvmlDeviceGetUtilizationRates(self.handle).gpu
            self.samples.append((time.time(), busy, pynvml.nvmlDeviceGetMemoryInfo(self.handle).used >> 20))

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.reader.join()

    def peak_mib(self, start: float = -inf, end: float = inf) -> int:
        """Peak memory in use by all processes."""
        return max((used for when, _, used in self.samples if start <= when <= end), default=0)

    def idle(self, start: float, end: float) -> float:
        """Share of a time without a kernel."""
        busy = [percent for when, percent, _ in self.samples if start <= when <= end]
        return 1 - sum(busy) / len(busy) / 100 if busy else float("nan")


def run(
    arguments: list[str], store: Path, kill_after_shards: int | None = None, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a capture to its end, or kill it after some commits; returns how long this took."""
    started, first = time.monotonic(), None
    commits, pause = store / "demo-prose" / "expert" / "commits", threading.Event()
    with Card() as card:
        process = subprocess.Popen(arguments, cwd=ROOT, env=environment)
        while process.poll() is None:
            done = len(list(commits.glob("*.json"))) if commits.is_dir() else 0
            if done and first is None:
                first = time.monotonic() - started
            if kill_after_shards is not None and done >= kill_after_shards:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
                return {}
            pause.wait(0.05)
    if process.returncode != 0:
        sys.exit(f"{' '.join(arguments)} ended with status {process.returncode}")
    state = coverage(store, "demo-prose")
    times = sorted(file.stat().st_mtime for file in commits.glob("*.json"))
    seconds = time.monotonic() - started
    between = (times[-1] - times[0]) / (len(times) - 1)
    return {
        "tokens": state.tokens_done,
        "shards": state.shards_total,
        "seconds": round(seconds, 1),
        "seconds_to_first_commit": round(first or seconds, 1),
        "tokens_per_s": round(state.tokens_done / seconds),
        "tokens_per_s_between_first_and_last_commit": round(state.tokens_done / len(times) / between),
        "tokens_per_s_in_each_worker": round(state.tokens_done / state.seconds),
        "gpu_idle_between_first_and_last_commit": round(card.idle(times[0], times[-1]), 4),
        "bytes_per_token": round(state.bytes_done / state.tokens_done, 1),
        "peak_gib": round(card.peak_mib() / 1024, 2),
        "peak_gib_while_capturing": round(card.peak_mib(times[0], times[-1]) / 1024, 2),
    }


def through_ray(head: Head, model: Path, local: Path, documents: int, replicas: int) -> dict[str, Any]:
    """Submit a job with a number of workers on the GPU, read its store back, and compare it with the local capture."""
    store = local.with_name(f"ray-{replicas}.zarr")
    how = ["--workers", str(replicas), "--gpus_per_worker", str(1 / replicas)]
    submit = [*RAY, "job", "submit", "--", *command(model, store, documents, *how)]
    ran = run(submit, store, environment={**head.environment, "RAY_ADDRESS": head.dashboard})
    status = [sys.executable, str(ROOT / "jobs" / "status.py"), str(store), "--verify"]
    started = time.monotonic()
    subprocess.run(status, check=True, cwd=ROOT)
    ran["seconds_to_verify"] = round(time.monotonic() - started, 1)
    if local.exists():
        ran["bytes_equal_to_local"] = objects(store) == objects(local)
    return ran


def objects(store: Path) -> dict[str, bytes]:
    """Every array object of a store."""
    return {
        str(path.relative_to(store)): path.read_bytes() for path in sorted(store.glob("*/*/c/**/*")) if path.is_file()
    }


def main() -> None:
    """Make the model, capture, capture again with a kill, submit, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stored", choices=("none", "nf4"), default="none", help="quantization of the checkpoint")
    parser.add_argument("--model", type=Path, help="such a checkpoint that is there already")
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--spill", type=Path, help="folder on another file system, for the layers from --spill_from on")
    parser.add_argument("--spill_from", type=int, default=18)
    parser.add_argument("--replicas", type=int, nargs="*", default=[], help="also as jobs, with so many workers")
    parser.add_argument("--once", action="store_true", help="leave out the run that is killed")
    parser.add_argument("--matmul", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--batch_tokens", type=int, default=32_768)
    parser.add_argument("--submitted_only", action="store_true", help="leave out both that are not submitted")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    OPTIONS[:] = ["--matmul", options.matmul, "--batch_tokens", str(options.batch_tokens)]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "zarr", "ray")},
        "python": sys.version.split()[0],
        "layers": options.layers,
        "weights": "nf4",
        "matmul": options.matmul,
        "batch_tokens": options.batch_tokens,
        "checkpoint": f"random, in the published layout, {'bf16' if options.stored == 'none' else options.stored}",
        "sequence_length_and_shard": "defaults",
    }
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or Path(folder) / f"mixtral-width-{options.layers}-layers"
        if options.model is None:
            started = time.monotonic()
            make_checkpoint(model, options.layers, options.stored, options.spill, options.spill_from)
            result["seconds_to_make_checkpoint"] = round(time.monotonic() - started, 1)
        result["checkpoint_gb"] = round(checkpoint_gb(model), 2)
        torch.cuda.empty_cache()
        with Card() as card:
            time.sleep(1)
        result["gib_in_use_before"] = round(card.peak_mib() / 1024, 2)
        stores = [Path(folder) / "quiet.zarr", Path(folder) / "killed.zarr"]
        if not options.submitted_only:
            result["local"] = run(command(model, stores[0], options.documents, "--local"), stores[0])
            print(json.dumps(result), flush=True)
        if not (options.once or options.submitted_only):
            local = command(model, stores[1], options.documents, "--local")
            run(local, stores[1], kill_after_shards=2)
            result["shards_kept_through_sigkill"] = coverage(stores[1], "demo-prose").shards_done
            run(local, stores[1])
            result["bytes_equal_after_sigkill_and_resume"] = objects(stores[0]) == objects(stores[1])
        if options.replicas:
            with ray_head(ROOT, PYTHONPATH=os.environ.get("PYTHONPATH", "")) as head:
                for number in options.replicas:
                    ran = through_ray(head, model, stores[0], options.documents, number)
                    result[f"submitted_with_{number}_workers"] = ran
                    options.output.write_text(json.dumps(result, indent=1) + "\n")
                    print(json.dumps(ran), flush=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if not result.get("bytes_equal_after_sigkill_and_resume", True):
        sys.exit("the resumed capture differs from the quiet one")
    submitted = [result[f"submitted_with_{number}_workers"] for number in options.replicas]
    if not all(ran.get("bytes_equal_to_local", True) for ran in submitted):
        sys.exit("a capture through Ray differs from the local one")


if __name__ == "__main__":
    main()
