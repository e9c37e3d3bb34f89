"""The engine against the floor and its rivals, on one GPU: `python tests/benchmarks/gpu.py -o RESULT.json`, by hand.

Makes Mixtral 8x7B's full size on the card (random weights, NF4) and prints one table: tokens/s of our forward by tokens
a micro-batch and by row length, with and without capture; of its GEMMs alone; and of the rivals that need no more
packages. The card is limited in power and slows down under load, so that rounds of all contestants alternate, and what
counts is the ratio of medians in one run. `--profile` lists where the time of one forward goes.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from full_size import WIDTH, full_size_model, random_matrix  # noqa: E402

from workers.description import find_routers  # noqa: E402
from workers.forward import Forward  # noqa: E402
from workers.routes import RouteRecorder, _LastRouterDone  # noqa: E402

HIDDEN, INNER = WIDTH["hidden_size"], WIDTH["intermediate_size"]
QKV = HIDDEN + 2 * HIDDEN // 4
EXPERTS, CHOICES = WIDTH["num_local_experts"], WIDTH["num_experts_per_tok"]
GIB = 2**30


def gemms(layers: int, tokens: int) -> Callable[[], None]:
    """Every matrix product of a forward that stops at the last router, with bf16 weights that all layers share."""
    generator = torch.Generator("cuda").manual_seed(1)
    weights = {name: random_matrix(shape, generator) for name, shape in {
        "qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "both": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)
    }.items()}  # fmt: skip
    hidden = random_matrix((tokens, HIDDEN), generator)
    inner = random_matrix((16_384, INNER), generator)
    edges = [round(tokens * CHOICES * part / EXPERTS) for part in range(EXPERTS + 1)]
    sizes = [end - start for start, end in pairwise(edges)]

    def run() -> None:
        for layer in range(layers):
            hidden @ weights["qkv"].T
            hidden @ weights["o"].T
            for size in sizes if layer + 1 < layers else []:
                for part in [16_384] * (size // 16_384) + [size % 16_384] * bool(size % 16_384):
                    hidden[:part] @ weights["both"].T
                    inner[:part] @ weights["down"].T

    return run


def forward(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Our forward, without capture."""
    ours = Forward(model)
    return lambda: ours(ids)


def captured(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Our forward with its proof and its copy to the host."""
    ours = Forward(model)
    recorder = RouteRecorder(find_routers(model), EXPERTS, CHOICES)
    length = np.full(len(ids), ids.shape[1], np.int32)

    def run() -> None:
        with recorder.attached():
            for part in recorder.record(ours, ids, length):
                part.to("cpu", non_blocking=True)

    return run


def stock(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """transformers' forward over un-fused experts, stopped at the last router."""
    last = list(find_routers(model).values())[-1]

    def stop(*_: Any) -> None:
        raise _LastRouterDone

    def run() -> None:
        handle = last.register_forward_hook(stop)
        try:
            model(input_ids=ids, attention_mask=None, use_cache=False)
        except _LastRouterDone:
            pass
        finally:
            handle.remove()

    return run


def alternate(contestants: dict[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median seconds of a round of each, warm, in turns."""
    took: dict[str, list[float]] = {name: [] for name in contestants}
    end = time.monotonic() + seconds
    while time.monotonic() < end or min(map(len, took.values())) < 4:
        for name, run in contestants.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            torch.cuda.synchronize()
            took[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in took.items()}


def row(model: Any, layers: int, tokens: int, positions: int, names: list[str], seconds: float) -> dict[str, Any]:
    """One row of the table: all contestants at one shape."""
    ids = torch.randint(0, WIDTH["vocab_size"], (max(1, tokens // positions), positions), device="cuda")
    make = {"forward": forward, "captured": captured, "stock": stock}
    torch.cuda.empty_cache()
    peaks, contestants = {}, {}
    for name in names:
        torch.cuda.reset_peak_memory_stats()
        contestants[name] = gemms(layers, ids.numel()) if name == "gemms" else make[name](model, ids)
        contestants[name]()
        peaks[name] = torch.cuda.max_memory_allocated() / GIB
        if name == "gemms":
            torch.cuda.empty_cache()
    took = alternate(contestants, seconds)
    found: dict[str, Any] = {"tokens": ids.numel(), "positions": positions}
    for name, second in took.items():
        found[f"{name}_tokens_per_s"] = round(ids.numel() / second)
        found[f"{name}_peak_gib"] = round(peaks[name], 2)
    if "gemms" in took:
        found["ratio_to_gemms"] = round(took["gemms"] / took["captured" if "captured" in took else "forward"], 4)
    if {"captured", "forward"} <= took.keys():
        found["ratio_of_captured_to_not"] = round(took["forward"] / took["captured"], 4)
    print(json.dumps(found), flush=True)
    return found


def profile(model: Any, tokens: int) -> None:
    """Print the kernels of one forward, by time."""
    run = forward(model, torch.randint(0, WIDTH["vocab_size"], (tokens // 2048, 2048), device="cuda"))
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    for event in events[:24]:
        took = event.self_device_time_total
        print(f"{took / 1e3:9.2f} ms {took / total:6.1%} {event.count:6d} {event.key[:60]}")


def main() -> None:
    """Make the model, run the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536, 98304])
    parser.add_argument("--positions", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "triton")},
        "layers": options.layers,
        "weights": "nf4",
        "rows": [],
    }
    with torch.inference_mode():
        started = time.monotonic()
        model = full_size_model(options.layers)
        torch.cuda.synchronize()
        result["seconds_to_make_weights"] = round(time.monotonic() - started, 1)
        torch.cuda.empty_cache()
        result["weights_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
        print(result, flush=True)
        for tokens in options.tokens:
            names = ["forward", "captured", "gemms"] + ["stock"] * (tokens <= 32768)
            result["rows"].append(row(model, options.layers, tokens, 2048, names, options.seconds))
        for positions in options.positions:
            names = ["forward", "captured", "gemms"]
            result["rows"].append(row(model, options.layers, 32768, positions, names, options.seconds))
        if options.profile:
            profile(model, 32768)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
