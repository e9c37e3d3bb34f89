"""The cost of loading: `python tests/benchmarks/loading.py --layers 32 --stored nf4 -o RESULT.json`, by hand, on a GPU.

Makes a random checkpoint of Mixtral 8x7B's full width (see `checkpoints`) and, in a separate process, loads it in the
usual way and routes one micro-batch of 32,768 tokens. It measures the seconds from the start of the process to choices
on the host, with the files dropped from the page cache before, and the peak memory of the load on the GPU and, without
mapped files, on the host. With `--stored nf4` it repeats this with the files in the cache, and with the allocator
limited to the memory of a GPU of 24 GB. With `--stored none` it also runs `jobs/quantize.py` on that checkpoint, and
checks that the result makes bit-identical choices.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
GIB = 2**30


def anonymous_bytes() -> int:
    """Memory of this process that is not backed by a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell RssAnon")


def load(folder: str, batch_tokens: int, cap_gib: float | None) -> dict[str, Any]:
    """Load and route once, in this process."""
    import numpy as np
    import torch

    from workers.engine import load_engine

    if cap_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_gib * GIB / total)
    imported = time.monotonic()
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    engine = load_engine(folder, revision=None, quantization="nf4", device="cuda")
    loaded = time.monotonic()
    done.set()
    watcher.join()
    load_peak, final = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    token = np.random.default_rng(0).integers(0, 32_000, (batch_tokens // 2048, 2048), dtype=np.int32)
    expert, weight = engine.route(token, np.full(len(token), 2048, np.int32)).values()
    return {
        "seconds_to_import": round(imported - STARTED, 1),
        "seconds_to_load": round(loaded - imported, 1),
        "seconds_from_start_to_first_captured_tokens": round(time.monotonic() - STARTED, 1),
        "gpu_gib_after_load": round(final / GIB, 2),
        "gpu_gib_at_peak_of_load": round(load_peak / GIB, 2),
        "gpu_gib_at_peak_with_a_batch": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "batch_tokens": batch_tokens,
        "host_anonymous_gib_at_peak_of_load": round(peak / GIB, 2),
        "sha256": hashlib.sha256(expert.tobytes() + weight.tobytes()).hexdigest(),
    }


def loaded(folder: Path, *more: str) -> dict[str, Any]:
    """The result of `load` in a separate process."""
    command = [sys.executable, __file__, "--load", str(folder), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, flush=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def main() -> None:
    """Make a checkpoint, load it, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", help="in a process of its own: load this folder and tell")
    parser.add_argument("--batch_tokens", type=int, default=32_768)
    parser.add_argument("--cap_gib", type=float, help="what the allocator may take")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--stored", choices=("none", "nf4"), default="none", help="quantization of the checkpoint")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(options.load, options.batch_tokens, options.cap_gib)))
        return

    import torch
    from checkpoints import checkpoint_gb, make_checkpoint
    from page_cache import drop_from_cache

    with tempfile.TemporaryDirectory() as name:
        folder, quantized = Path(name) / "model", Path(name) / "model-nf4"
        make_checkpoint(folder, options.layers, options.stored)
        torch.cuda.empty_cache()
        result: dict[str, Any] = {
            "date": datetime.now(UTC).date().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "safetensors")},
            "layers": options.layers,
            "checkpoint": f"random, in the published layout, {'bf16' if options.stored == 'none' else options.stored}",
            "checkpoint_gb": round(checkpoint_gb(folder), 2),
            "largest_file_gb": round(max(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9, 2),
        }
        drop_from_cache(folder, "*.safetensors")
        result["from disk"] = loaded(folder)
        if options.stored == "nf4":
            result["from the page cache"] = loaded(folder)
            result["23.5 GiB at most"] = loaded(folder, "--cap_gib", "23.5", "--batch_tokens", "8192")
        else:
            started = time.monotonic()
            command = [sys.executable, str(ROOT / "jobs" / "quantize.py"), str(folder), str(quantized)]
            subprocess.run(command, check=True)
            result["quantized_by_the_job"] = {
                "seconds": round(time.monotonic() - started, 1),
                "gb": round(checkpoint_gb(quantized), 2),
                **loaded(quantized),
            }
            same = result["quantized_by_the_job"]["sha256"] == result["from disk"]["sha256"]
            result["quantized_by_the_job"]["chooses_the_same_to_the_bit"] = same
    assert options.output is not None, "where to write the result: -o RESULT.json"
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
