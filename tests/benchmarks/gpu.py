"""The engine compared with its lower bound and alternatives, on one GPU: `python tests/benchmarks/gpu.py -o
RESULT.json`, by hand.

Creates Mixtral 8x7B at full size on the GPU (random weights, NF4; bf16 for two alternatives, 87 GiB) and prints one
table: tokens/s of this project's forward pass by tokens per micro-batch and by row length, without capture, with
capture, and while writing the store to disk; of its matrix products alone; and of the alternatives that need no more
packages. The GPU's power is limited and it slows down under load, so rounds of all contestants alternate, and the ratio
of medians in one run is reported. `--profile` lists the time of one forward pass by kernel.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `workers.engine.load_engine` does

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from full_size import WIDTH, as_loaded, full_size_model, random_matrix  # noqa: E402

from store.group import CaptureGroup  # noqa: E402
from store.identity import identity_of  # noqa: E402
from store.layout import Layout  # noqa: E402
from store.lease import lease  # noqa: E402
from store.plan import Plan, Rows  # noqa: E402
from workers.engine import ModelEngine, drop_last_experts  # noqa: E402
from workers.models import fp8  # noqa: E402
from workers.models.decoder import MixtralForward  # noqa: E402
from workers.models.family import find_routers  # noqa: E402
from workers.models.products import Fp8Products  # noqa: E402
from workers.recorder import RouteRecorder, _LastRouterDone  # noqa: E402
from workers.replica import Assignment, Replica  # noqa: E402

HIDDEN, INNER = WIDTH["hidden_size"], WIDTH["intermediate_size"]
QKV = HIDDEN + 2 * HIDDEN // 4
EXPERTS, CHOICES = WIDTH["num_local_experts"], WIDTH["num_experts_per_tok"]
POSITIONS = 2048
GIB = 2**30

Run = Callable[[], None]


def gemms(layers: int, tokens: int) -> Run:
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


def fp8_gemms(layers: int, tokens: int) -> Run:
    """`gemms` in e4m3 with a scale a row, as `workers.models.products.Fp8Products` multiplies."""
    generator = torch.Generator("cuda").manual_seed(1)
    weights = {name: fp8.rounded(random_matrix(shape, generator)) for name, shape in {
        "qkv": (QKV, HIDDEN), "o": (HIDDEN, HIDDEN), "both": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)
    }.items()}  # fmt: skip
    products = Fp8Products(torch.bfloat16)
    hidden = fp8.rounded(random_matrix((tokens, HIDDEN), generator))
    inner = fp8.rounded(random_matrix((16_384, INNER), generator))
    edges = [round(tokens * CHOICES * part / EXPERTS) for part in range(EXPERTS + 1)]
    parts = [part.stop - part.start for start, end in pairwise(edges) for part in products.parts(start, end)]

    def run() -> None:
        for layer in range(layers):
            products.multiply(hidden, weights["qkv"])
            products.multiply(hidden, weights["o"])
            for part in parts if layer + 1 < layers else []:
                products.multiply(fp8.RowScaled(*(one[:part] for one in hidden)), weights["both"])
                products.multiply(fp8.RowScaled(*(one[:part] for one in inner)), weights["down"])

    return run


def captured(
    model: Any, forward: Callable[..., Any], ids: torch.Tensor, experts: int = EXPERTS, choices: int = CHOICES
) -> Run:
    """A forward with its proof and its copy to the host."""
    recorder = RouteRecorder(find_routers(model), experts, choices)
    length = np.full(len(ids), ids.shape[1], np.int32)

    def run() -> None:
        with recorder.attached():
            for parts in recorder.record(forward, ids, length):
                for part in parts.values():
                    part.to("cpu", non_blocking=True)

    return run


def adding_exactly(run: Run) -> Run:
    """The same without fast accumulation."""

    def exactly() -> None:
        fp8.FAST_ACCUMULATION = False
        try:
            run()
        finally:
            fp8.FAST_ACCUMULATION = True

    return exactly


def stock(model: Any, ids: torch.Tensor) -> Run:
    """transformers' forward pass with packed experts, stopped at the last router."""
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


def router_logits(model: Any, ids: torch.Tensor) -> Run:
    """The method of transformers: all layers' logits from a complete forward pass of the base model, then the largest
    two."""

    def run() -> None:
        found = model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
        assert len(found) == len(model.layers)
        for logits in found:
            for part in logits.softmax(-1).topk(CHOICES):
                part.cpu()

    return run


def notebook(model: Any, ids: torch.Tensor) -> Run:
    """The notebook that this project grew from, its hooks on `mlp.gate`: Python lists, one text at a time."""
    token_experts: dict[int, list[list[int]]] = defaultdict(list)
    expert_tokens: dict[tuple[int, int], list[int]] = defaultdict(list)

    def keep(layer: int) -> Callable[..., None]:
        def hook(gate: Any, inputs: Any, output: Any) -> None:
            chosen = torch.topk(output[0], CHOICES, dim=-1).indices
            for position in range(len(chosen)):
                token = ids[0, position].item()
                pair = chosen[position].tolist()
                token_experts[token].append(pair)
                for expert in pair:
                    expert_tokens[layer, expert].append(token)

        return hook

    def run() -> None:
        handles = [layer.mlp.gate.register_forward_hook(keep(number)) for number, layer in enumerate(model.layers)]
        try:
            model(input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()

    return run


def alternate(contestants: dict[str, Run], seconds: float) -> dict[str, float]:
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


def tokens_of(tokens: int, positions: int) -> torch.Tensor:
    """Random ids, (tokens / positions, positions)."""
    return torch.randint(0, WIDTH["vocab_size"], (max(1, tokens // positions), positions), device="cuda")


class Table:
    """Rows as they are measured."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.rows = seconds, []  # type: float, list[dict[str, Any]]

    def measure(self, ids: torch.Tensor, make: dict[str, Callable[[], Run]], kinds: dict[str, tuple[str, str]]) -> None:
        """A row for each contestant at one shape; a ratio to the matrix products where they took part.

        Parameters
        ----------
        kinds
            Weights and products of those that are not in nf4 and bf16.
        """
        gc.collect()
        torch.cuda.empty_cache()
        peaks, contestants = {}, {}
        for name, maker in make.items():
            torch.cuda.reset_peak_memory_stats()
            contestants[name] = maker()
            contestants[name]()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() / GIB
        for name, second in (took := alternate(contestants, self.seconds)).items():
            weights, matmul = kinds.get(name, ("nf4", "bf16"))
            row = {"system": name, "weights": weights, "matmul": matmul}
            row |= {"tokens": ids.numel(), "positions": ids.shape[1]}
            row |= {"tokens_per_s": round(ids.numel() / second), "peak_gib": round(peaks[name], 2)}
            for other in ("gemms", "forward") if matmul == "bf16" else ("fp8 gemms", "fp8 forward"):
                if other in took and name.endswith(("forward", "captured")) and other != name:
                    row[f"ratio_to_{other}"] = round(took[other] / second, 4)
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Keep and print a row."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def ours(self, model: Any, ids: torch.Tensor, *, rivals: bool = True) -> None:
        """This project's forward pass at one shape, with its matrix products and, up to 32,768 tokens, transformers'
        forward pass."""
        ours = MixtralForward(model)
        make: dict[str, Callable[[], Run]] = {
            "forward": lambda: partial(ours, ids),
            "captured": partial(captured, model, ours, ids),
        }
        if rivals and ids.numel() <= 32_768:
            make["transformers' forward, stopped at the last router"] = partial(stock, model, ids)
        if rivals:
            make["gemms"] = partial(gemms, len(model.layers), ids.numel())
        self.measure(ids, make, {"gemms": ("bf16", "bf16")})

    def in_fp8(self, model: Any, ids: torch.Tensor, weights: str = "nf4") -> None:
        """This project's forward pass with fp8 products, with and without capture, compared with the products alone and
        with bf16 products."""
        ours = MixtralForward(model, "fp8")
        make: dict[str, Callable[[], Run]] = {
            "fp8 forward": lambda: partial(ours, ids),
            "fp8 captured": partial(captured, model, ours, ids),
            "fp8 captured, added up in float32": lambda: adding_exactly(captured(model, ours, ids)),
            "fp8 gemms": partial(fp8_gemms, len(model.layers), ids.numel()),
        }
        if weights == "nf4":
            make["captured"] = partial(captured, model, MixtralForward(model), ids)
        kinds = {name: (weights, "fp8") for name in make if name != "captured"}
        self.measure(ids, make, kinds | {"fp8 gemms": ("fp8", "fp8")})


def under_a_cap(table: Table, model: Any, cap_gib: float, sizes: list[int]) -> None:
    """This project's forward pass with capture, with the allocator limited to the memory of a small GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(cap_gib * GIB / total)
    for tokens in sizes:
        ids = tokens_of(tokens, POSITIONS)
        ours = MixtralForward(model)
        try:
            table.measure(ids, {f"captured, {cap_gib} GiB at most": partial(captured, model, ours, ids)}, {})
            table.rows[-1]["reserved_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
        except torch.OutOfMemoryError:
            table.add({"system": f"captured, {cap_gib} GiB at most", "tokens": ids.numel(), "out_of_memory": True})
            break
    torch.cuda.set_per_process_memory_fraction(1.0)


def written(
    table: Table, model: Any, shards: int, matmul: str = "bf16", tokens: int = 32_768, seconds: float = 30
) -> None:
    """Whole shards, committed to a store on disk while the next is computed, against the same forward without any.

    The rate of a capture is that between its first and its last commit: the end of a week-long capture does not matter.
    The forward alone runs for some seconds before it and after it.
    """
    layout = Layout(
        sequence_length=POSITIONS,
        rows_per_shard=128,
        layers=tuple(range(len(model.layers))),
        num_experts=EXPERTS,
        experts_per_token=CHOICES,
        vocab_size=WIDTH["vocab_size"],
    )
    rows = 128 * shards
    token = np.random.default_rng(0).integers(0, WIDTH["vocab_size"], (rows, POSITIONS), dtype=np.int32)
    length, ids = np.full(rows, POSITIONS, np.int32), tokens_of(tokens, POSITIONS)
    ours = MixtralForward(model, matmul)

    def forwards() -> float:
        return alternate({"forward": lambda: ours(ids)}, seconds)["forward"]

    with tempfile.TemporaryDirectory() as folder:
        group = CaptureGroup.create(
            folder, "random", layout=layout, identity=identity_of({"matmul": matmul}), attrs={}, pieces=["a"]
        )
        number = np.arange(rows)
        planned = Rows(token=token, length=length, document_id=number, offset=np.zeros(rows, np.int32))
        plan = Plan(complete=True, rows=rows, tokens=rows * POSITIONS, documents=rows)
        group.publish(planned, [str(row) for row in number], plan)
        torch.cuda.reset_peak_memory_stats()
        before = forwards()
        with lease(group) as held:
            replica = Replica()
            engine = ModelEngine(as_loaded(model, matmul))
            assignment = Assignment(
                store=folder,
                leases={"random": held.token},
                make_engine=lambda: engine,
                device="cuda",
                batch_tokens=tokens,
            )
            replica.load(assignment)
            with ThreadPoolExecutor(2) as pool:  # one shard is written while the next one is computed
                list(pool.map(partial(replica.capture, "random"), range(shards)))
        after = forwards()
        commits = sorted(file.stat().st_mtime for file in Path(folder).glob("*/expert/commits/*.json"))
    second = (commits[-1] - commits[0]) / (shards - 1) / (layout.rows_per_shard * POSITIONS / ids.numel())
    row = {"system": "captured and written", "weights": "nf4", "matmul": matmul}
    row |= {"tokens": ids.numel(), "positions": POSITIONS}
    row |= {"tokens_per_s": round(ids.numel() / second), "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2)}
    row |= {"shards": shards, "forward_before_tokens_per_s": round(ids.numel() / before)}
    row |= {"forward_after_tokens_per_s": round(ids.numel() / after)}
    table.add(row | {"ratio_to_forward": round((before + after) / 2 / second, 4)})


def unquantized(table: Table, layers: int) -> None:
    """transformers with its defaults, in bf16."""
    for experts, tokens in (("eager", 32_768), ("grouped_mm", 16_384)):
        model, ids = full_size_model(layers, "none", experts), tokens_of(tokens, POSITIONS)
        name = f"transformers' output_router_logits, {experts} experts"
        table.measure(ids, {name: partial(router_logits, model, ids)}, {name: ("bf16", "bf16")})
        del model
        gc.collect()
        torch.cuda.empty_cache()


def profile(model: Any, tokens: int, matmul: str = "bf16") -> list[dict[str, Any]]:
    """The kernels of one forward, by time; printed too."""
    ours, ids = MixtralForward(model, matmul), tokens_of(tokens, POSITIONS)
    ours(ids)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        ours(ids)
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events)
    for event in events[:24]:
        took = event.self_device_time_total
        print(f"{took / 1e3:9.2f} ms {took / total:6.1%} {event.count:6d} {event.key[:60]}")
    kernels = [{"kernel": one.key[:80], "ms": one.self_device_time_total / 1e3, "count": one.count} for one in events]
    return kernels[:24]


def only_fp8(table: Table, result: dict[str, Any], layers: int, shards: int, output: Path) -> None:
    """The rows of fp8 products, over weights in NF4 and in e4m3; written after each part."""
    model = full_size_model(layers)
    drop_last_experts(as_loaded(model))
    for tokens in (65_536, 32_768):
        table.in_fp8(model, tokens_of(tokens, POSITIONS))
        output.write_text(json.dumps(result, indent=1) + "\n")
    if shards:
        written(table, model, shards, "fp8", 65_536, 6)
    result["kernels_of_a_forward_of_65536_tokens"] = profile(model, 65_536, "fp8")
    output.write_text(json.dumps(result, indent=1) + "\n")
    del model
    gc.collect()
    torch.cuda.empty_cache()
    model = full_size_model(layers, "fp8")
    drop_last_experts(as_loaded(model))
    table.in_fp8(model, tokens_of(65_536, POSITIONS), "fp8")
    output.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Create the model, run the table, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each shape")
    parser.add_argument("--tokens", type=int, nargs="*", default=[4096, 8192, 16384, 32768, 65536, 98304])
    parser.add_argument("--positions", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--shards", type=int, default=5, help="to capture and write; 0 leaves it out")
    parser.add_argument("--cap_gib", type=float, default=23.5)
    parser.add_argument("--no_bf16", action="store_true", help="leave out what needs a card of 96 GiB")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--fp8", action="store_true", help="the rows of fp8 products, and no others")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    table = Table(options.seconds)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "hardware": f"one {torch.cuda.get_device_name()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "triton")},
        "layers": options.layers,
        "rows": table.rows,
    }
    with torch.inference_mode():
        if options.fp8:
            only_fp8(table, result, options.layers, options.shards, options.output)
            return
        model = full_size_model(options.layers)
        ids = tokens_of(128, 128)
        table.measure(ids, {"the notebook, hooks on mlp.gate": partial(notebook, model, ids)}, {})
        drop_last_experts(as_loaded(model))
        gc.collect()
        torch.cuda.empty_cache()
        result["weights_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
        print(result, flush=True)
        for tokens in options.tokens:
            table.ours(model, tokens_of(tokens, POSITIONS))
        for positions in options.positions:
            table.ours(model, tokens_of(32_768, positions))
        under_a_cap(table, model, options.cap_gib, [2048, 4096, 8192, 12288])
        if options.shards:
            written(table, model, options.shards)
        if options.profile:
            profile(model, 32_768)
        del model
        if not options.no_bf16:
            gc.collect()
            torch.cuda.empty_cache()
            unquantized(table, options.layers)
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
