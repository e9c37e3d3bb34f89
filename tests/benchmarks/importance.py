"""The cost of the effects of all experts: `python tests/benchmarks/importance.py -o RESULT.json` on one GPU, by hand.

Creates Mixtral 8x7B at full size on the GPU (random weights, NF4), with products of one kind: `--matmul bf16`, about
seven minutes on an H200, or `--matmul fp8`, about four. It times captures with one expert masked, of which the naive
sweep needs one for each expert, then the effects of all experts on one micro-batch, and compares some of them with
those of the captures. `--last 2` measures only the last two layers; `--tiny` runs it with the tiny model on a CPU, for
trying it out.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `workers.engine.load_engine` does

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

from full_size import as_loaded, full_size_model, with_head  # noqa: E402

from workers.engine import ModelEngine  # noqa: E402
from workers.importance import ImportanceEngine  # noqa: E402
from workers.interventions import Interventions  # noqa: E402
from workers.models.loading import LoadedModel, load_model  # noqa: E402
from workers.record import Recorded  # noqa: E402
from workers.tiny import tiny_checkpoint  # noqa: E402

GIB = 2**30
PREDICTIONS = Recorded(record=("logprob",))


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the duration in seconds, waiting for a GPU."""
    started = time.perf_counter()
    found = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


class Shown:
    """Prints the progress periodically."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.done, self.started, self.said = tokens, 0, time.monotonic(), time.monotonic()

    def __call__(self, tokens: int) -> None:
        """So many tokens more."""
        self.done += tokens
        if time.monotonic() - self.said > 20:
            self.said = time.monotonic()
            print(f"{self.done / self.tokens:.0%} after {self.said - self.started:.0f} s", flush=True)


def measured(loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Times, and the differences between the effects and those of captures with a mask."""
    vocabulary: Any = loaded.model.get_submodule("embed_tokens").num_embeddings
    rows = options.tokens // options.positions
    token = np.random.default_rng(0).integers(3, vocabulary, (rows, options.positions), dtype=np.int32)
    length = np.full(rows, options.positions, np.int32)
    layers = tuple(loaded.routers)[-options.last :]
    some = [(layers[0], 1), (layers[len(layers) // 2], 3), (layers[-1], 5)]
    plain = ModelEngine(loaded, PREDICTIONS)
    before = plain.route(token, length)["logprob"]  # warms up too
    captures = {}
    for layer, expert in some:
        engine = ModelEngine(loaded, PREDICTIONS, Interventions(mask=(f"{layer}:{expert}",)))
        captures[layer, expert] = timed(lambda engine=engine: engine.route(token, length)["logprob"])
    one_s = statistics.median(seconds for _, seconds in captures.values())
    runs = len(layers) * loaded.num_experts
    told: dict[str, Any] = {"runs": runs, "tokens": token.size, "positions": options.positions}
    told |= {"seconds_of_one_masked_capture": round(one_s, 4), "seconds_of_naive_sweep": round(one_s * runs, 1)}
    print(json.dumps(told), flush=True)
    engine = ImportanceEngine(loaded, layers=layers)
    engine.report = Shown(token.size)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    found, seconds = timed(lambda: engine.start(token, length)())
    told |= {"seconds": round(seconds, 1), "of_naive_sweep": round(seconds / (one_s * runs), 3)}
    if torch.cuda.is_available():
        told["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    told["compared"] = []
    for (layer, expert), (after, _) in captures.items():
        own, wanted = found["effect"][:, :-1, list(loaded.routers).index(layer), expert], (after - before)[:, :-1]
        told["compared"].append(
            {
                "expert": f"{layer}:{expert}",
                "mean_effect": float(own.mean(dtype=float)),
                "of_captures": float(wanted.mean(dtype=float)),
                "largest_difference_of_a_token": float(abs(own - wanted).max()),
                "mean_difference_of_a_token": float(abs(own - wanted).mean()),
                "mean_size_of_an_effect": float(abs(wanted).mean()),
                "tokens_equal": float((abs(own - wanted) < 1e-4).mean()),
            }
        )
    return told


def main() -> None:
    """Make the model, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--last", type=int, default=0, help="measure so many of the last layers; 0: all")
    parser.add_argument("--matmul", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the micro-batch")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--tiny", action="store_true", help="the tiny model, on a CPU")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    gpu = "a CPU" if options.tiny else torch.cuda.get_device_name()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"one {gpu}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "model": "tiny" if options.tiny else f"Mixtral 8x7B, {options.layers} layers, random weights in nf4",
        "matmul": options.matmul,
        "command": " ".join(["python", "tests/benchmarks/importance.py", *sys.argv[1:]]),
    }
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            loaded = load_model(tiny_checkpoint(), quantization="nf4", matmul=options.matmul, device="cpu")
        else:
            made, seconds = timed(lambda: full_size_model(options.layers))
            result["seconds_to_make_the_model"] = round(seconds, 1)
            loaded = as_loaded(made, options.matmul, with_head(Path(folder), options.layers))
        result |= measured(loaded, options)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
