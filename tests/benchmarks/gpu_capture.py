"""The true defaults on a GPU: `python tests/benchmarks/gpu_capture.py --layers 8 -o RESULT.json`, by hand.

Makes a random checkpoint of Mixtral 8x7B's full width in the published layout (bf16, one file a layer), and captures
real text from it with `jobs/capture.py --local` as a user would: NF4 with double quantization while loading. Then does
it again in a second store, kills that run with SIGKILL in the middle, lets the same command go on, and compares bytes.
With `--replicas 1 4`, the same through Ray (without `--local`), so many workers sharing the card.

A full-size bf16 checkpoint has 93 GB; eight layers have 23. Where one disk is too small, `--spill FOLDER` puts
the files of the later layers elsewhere. Rates hold for the layers that were run: the file says how many.
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
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from full_size import full_size_config, random_matrix  # noqa: E402

from store import coverage  # noqa: E402
from workers.tiny import tiny_checkpoint  # noqa: E402


def make_checkpoint(folder: Path, layers: int, spill: Path | None, spill_from: int) -> None:
    """Random weights in the published layout, made on the GPU; some layers' files on another file system."""
    folder.mkdir(parents=True)
    full_size_config(layers).save_pretrained(folder)
    generator = torch.Generator("cuda").manual_seed(0)

    def matrix(*shape: int, std: float | None = None) -> torch.Tensor:
        return random_matrix(shape, generator, std).cpu()

    hidden, inner, kv = 4096, 14336, 1024
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    files = {"embed": {"model.embed_tokens.weight": matrix(32000, hidden, std=1.0), "model.norm.weight": ones}}
    files["embed"]["lm_head.weight"] = matrix(32000, hidden)
    index = {}
    for layer in [*range(layers), None]:
        name = "embed" if layer is None else f"layer-{layer:02d}"
        tensors = files.get(name, {})
        if layer is not None:
            at = f"model.layers.{layer}"
            tensors = {f"{at}.input_layernorm.weight": ones, f"{at}.post_attention_layernorm.weight": ones.clone()}
            for leaf, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv), ("o_proj", hidden)):
                tensors[f"{at}.self_attn.{leaf}.weight"] = matrix(rows, hidden)
            tensors[f"{at}.block_sparse_moe.gate.weight"] = matrix(8, hidden)
            for expert in range(8):
                for leaf, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                    tensors[f"{at}.block_sparse_moe.experts.{expert}.{leaf}.weight"] = matrix(*shape)
        file = folder / f"model-{name}.safetensors"
        if spill is not None and layer is not None and layer >= spill_from:
            file.symlink_to(spill / file.name)
        save_file(tensors, file.resolve(), metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"model-{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file in tiny_checkpoint().glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())


def command(model: Path, store: Path, documents: int, *how: str) -> list[str]:
    """What a user would type."""
    capture = [sys.executable, str(ROOT / "jobs" / "capture.py"), *how, "--model", str(model)]
    return [*capture, "--dataset", "demo:prose", "--limit_documents", str(documents), "--store", str(store)]


def gpu_memory_mib() -> int:
    """Memory in use on the card, all processes."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


def run(arguments: list[str], store: Path, kill_after_shards: int | None = None) -> dict[str, float]:
    """Run a capture to its end, or kill it after some commits; seconds, and the card's peak memory."""
    started, first, peak = time.monotonic(), None, 0
    process = subprocess.Popen(arguments, cwd=ROOT)
    commits = store / "demo-prose" / "expert" / "commits"
    lock = threading.Event()
    while process.poll() is None:
        done = len(list(commits.glob("*.json"))) if commits.is_dir() else 0
        if done and first is None:
            first = time.monotonic() - started
        if kill_after_shards is not None and done >= kill_after_shards:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            break
        peak = max(peak, gpu_memory_mib())
        lock.wait(0.2)
    if kill_after_shards is None and process.returncode != 0:
        sys.exit(f"{' '.join(arguments)} ended with status {process.returncode}")
    return {"seconds": time.monotonic() - started, "seconds_to_first_commit": first or 0.0, "peak_mib": float(peak)}


def through_ray(model: Path, local: Path, documents: int, replicas: int) -> dict[str, Any]:
    """Capture with so many workers on the card, and compare with the local capture."""
    store = local.with_name(f"ray-{replicas}.zarr")
    how = ["--workers", str(replicas), "--gpus_per_worker", str(1 / replicas)]
    ran = run(command(model, store, documents, *how), store)
    times = sorted(file.stat().st_mtime for file in store.glob("*/expert/commits/*.json"))
    state = coverage(store, "demo-prose")
    return {
        **{name: value for name, value in ran.items() if name != "peak_mib"},
        "tokens_per_s_between_first_and_last_commit": state.tokens_done * (1 - 1 / len(times)) / (times[-1] - times[0]),
        "tokens_per_s_in_each_worker": state.tokens_done / state.seconds,
        "bytes_equal_to_local": objects(store) == objects(local),
    }


def objects(store: Path) -> dict[str, bytes]:
    """Every array object of a store."""
    return {
        str(path.relative_to(store)): path.read_bytes() for path in sorted(store.glob("*/*/c/**/*")) if path.is_file()
    }


def main() -> None:
    """Make the model, capture, capture again with a kill, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--spill", type=Path, help="folder on another file system, for the layers from --spill_from on")
    parser.add_argument("--spill_from", type=int, default=18)
    parser.add_argument("--replicas", type=int, nargs="*", default=[], help="also through Ray, with so many workers")
    parser.add_argument("--once", action="store_true", help="leave out the run that is killed")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / f"mixtral-width-{options.layers}-layers"
        started = time.monotonic()
        make_checkpoint(model, options.layers, options.spill, options.spill_from)
        made = time.monotonic() - started
        torch.cuda.empty_cache()
        idle_mib = gpu_memory_mib()
        stores = [Path(folder) / "quiet.zarr", Path(folder) / "killed.zarr"]
        quiet = run(command(model, stores[0], options.documents, "--local"), stores[0])
        killed = {}
        if not options.once:
            local = command(model, stores[1], options.documents, "--local")
            run(local, stores[1], kill_after_shards=2)
            killed["shards_kept_through_sigkill"] = coverage(stores[1], "demo-prose").shards_done
            run(local, stores[1])
            killed["bytes_equal_after_sigkill_and_resume"] = objects(stores[0]) == objects(stores[1])
        ray = {number: through_ray(model, stores[0], options.documents, number) for number in options.replicas}
        state = coverage(stores[0], "demo-prose")
        result = {
            "date": datetime.now(UTC).date().isoformat(),
            "gpu": torch.cuda.get_device_name(),
            "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "zarr", "xarray")},
            "python": sys.version.split()[0],
            "layers": options.layers,
            "weights": "nf4, from random bf16 weights in the published layout",
            "checkpoint_gb": sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e9,
            "seconds_to_make_checkpoint": made,
            "tokens": state.tokens_done,
            "shards": state.shards_total,
            "sequence_length_and_shard": "defaults",
            "tokens_per_s_in_workers": state.tokens_done / state.seconds,
            "bytes_per_token": state.bytes_done / state.tokens_done,
            "peak_gib": (quiet["peak_mib"] - idle_mib) / 1024,
            **{f"capture_{name}": value for name, value in quiet.items() if name != "peak_mib"},
            **killed,
            **({"through_ray_by_replicas": ray} if ray else {}),
        }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if not killed.get("bytes_equal_after_sigkill_and_resume", True):
        sys.exit("the resumed capture differs from the quiet one")
    if not all(one["bytes_equal_to_local"] for one in ray.values()):
        sys.exit("a capture through Ray differs from the local one")


if __name__ == "__main__":
    main()
