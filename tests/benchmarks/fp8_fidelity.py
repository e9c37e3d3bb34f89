"""The effect of fp8 products on routing: `python tests/benchmarks/fp8_fidelity.py -o RESULT.json`, on a GPU.

Measured in two ways, because the available trained model is small and a random one amplifies rounding. The tiny Mixtral
routes the demo's held-out texts whole, as in `precision.py`. Layers of Mixtral 8x7B's full width, random, are given the
hidden states that the one before the last began with, the same to each contestant, so that a router is reached through
one whole layer: attention, experts, attention. For both, the proof of capture: how often it gives false alarms, how far
its second answers are from the first, and how often it accepts choices of another batch or layer.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import fidelity  # noqa: E402
import precision  # noqa: E402
from full_size import WIDTH, as_loaded, full_size_model  # noqa: E402

from jobs.demo import TEXTS  # noqa: E402
from jobs.sources.demo import demo_source  # noqa: E402
from workers.engine import ModelEngine, load_engine  # noqa: E402
from workers.models import fp8  # noqa: E402
from workers.models.decoder import MixtralForward  # noqa: E402
from workers.models.routers import in_order  # noqa: E402
from workers.recorder import OTHERS, RouteRecorder, stacked  # noqa: E402
from workers.recordings.recording import SAMPLE_AGREEING  # noqa: E402

MARGINS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Lower ends of classes of a token's margin: the reference's logit of its second expert less that of its third."""


def exactly(run: Callable[[], Any]) -> Any:
    """Its result without fast accumulation."""
    fp8.FAST_ACCUMULATION = False
    try:
        return run()
    finally:
        fp8.FAST_ACCUMULATION = True


# --- The tiny model -------------------------------------------------------------------------------------------------

EXACT = "nf4, fp8 products, added up in float32"
TINY = {
    "float32": ("bfloat16", "nf4, float32", "nf4", "nf4, fp8 products", EXACT, "fp8", "fp8, fp8 products"),
    "nf4": ("nf4, float32", "nf4, fp8 products", EXACT),
    "nf4, float32": ("nf4, fp8 products", EXACT),
    "fp8": ("fp8, fp8 products",),
    "nf4, fp8 products": (EXACT,),
}
"""Reference to what is compared with it."""


def of_the_tiny_model(device: str = "cuda") -> dict[str, Any]:
    """Pairs of captures of the held-out texts; a CPU always accumulates in float32."""
    names = {*TINY, *(name for others in TINY.values() for name in others)} - {EXACT}
    routes = {name: precision.captured(name, device) for name in sorted(names)}
    if device == "cuda":
        routes[EXACT] = exactly(lambda: precision.captured("nf4, fp8 products", device))
    pairs = [(one, other) for one, others in TINY.items() for other in others if other in routes]
    with ThreadPoolExecutor() as pool:
        compared = pool.map(lambda pair: precision.compared(*(routes[name] for name in pair)), pairs)
        return {" → ".join(pair): found for pair, found in zip(pairs, compared, strict=True)}


def starts_of_texts() -> list[str]:
    """The first 12,000 characters of the demo's first held-out documents, about 36,000 of each text."""
    found = []
    for name, many in TEXTS.items():
        taken = 0
        for document in islice(demo_source(name).read(0), many):
            found.append(document.text[:12_000])
            taken += len(found[-1])
            if taken > 36_000:
                break
    return found


# --- Full width -----------------------------------------------------------------------------------------------------


def through_a_layer(model: Any, matmul: str, number: int, begun_BPH: torch.Tensor) -> torch.Tensor:
    """Sets of experts that router `number` chooses, from the residual that the layer before it began with."""
    layers = model.layers[max(0, number - 1) : number + 1]

    def embedded(ids: torch.Tensor) -> torch.Tensor:
        return begun_BPH.clone()

    embedded.weight = model.embed_tokens.weight  # type: ignore[attr-defined]
    part = SimpleNamespace(config=model.config, layers=layers, embed_tokens=embedded, rotary_emb=model.rotary_emb)
    found: list[torch.Tensor] = []
    handle = layers[-1].mlp.gate.register_forward_hook(lambda gate, inputs, output: found.append(output[2]))
    try:
        MixtralForward(part, matmul)(torch.zeros(begun_BPH.shape[:2], dtype=torch.long, device=begun_BPH.device))
    finally:
        handle.remove()
    return found[0].sort(-1).values


def reference(model: Any, number: int, begun_BPH: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Logits of router `number` in float32, from the same residual."""
    hidden = begun_BPH.float()
    for at in range(max(0, number - 1), number + 1):
        middle = fidelity.attended(model.layers[at], hidden, cos, sin).flatten(0, 1)
        logits = fidelity.routed(model.layers[at], middle)
        if at < number:
            hidden = fidelity.mixed(model.layers[at], middle, logits).view_as(hidden)
    return logits


def differing(one: torch.Tensor, other: torch.Tensor, margin: torch.Tensor) -> dict[str, Any]:
    """Share of tokens whose sets differ, in all and by margin."""
    wrong = (one != other).any(-1)
    of_class = [(margin >= low) & (margin < high) for low, high in pairwise([*MARGINS, float("inf")])]
    return {
        "differ": float(wrong.float().mean()),
        "by_margin": [float(wrong[one].float().mean()) if one.any() else None for one in of_class],
        "tokens_by_margin": [int(one.sum()) for one in of_class],
        "largest_margin": float(margin[wrong].max()) if wrong.any() else 0.0,
    }


def at_full_width(layers: int, rows: int, positions: int) -> list[dict[str, Any]]:
    """Each router's choices, compared."""
    model = full_size_model(layers, keep=True)
    generator = torch.Generator("cuda").manual_seed(2)
    ids = torch.randint(0, WIDTH["vocab_size"], (rows, positions), device="cuda", generator=generator)
    return compared(model, ids)


def original(linear: Any) -> torch.Tensor:
    """What a Linear's matrix was made from, in float32."""
    made_from: torch.Tensor = linear.original
    return made_from.float()


def originals(experts: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What each expert's gate, up and down were made from, in float32."""
    for gate, up, down in experts.originals:
        yield gate.float(), up.float(), down.float()


def compared(model: Any, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Each router's choices by each kind of products, from the states that a forward in fp8 gives."""
    begun = [state.view(*ids.shape, -1) for state in fidelity.Recorded(model, ids, "fp8").begun]
    cos, sin = (part[0] for part in model.rotary_emb(begun[0], torch.arange(ids.shape[1], device=ids.device)[None]))
    dequantized = fidelity.full, fidelity.matrices
    sources = {"dequantized, float32": dequantized, "unquantized, float32": (original, originals)}
    found = []
    for number in range(len(model.layers)):
        state = begun[max(0, number - 1)]
        route = partial(through_a_layer, model, "fp8", number, state)
        sets = {"fp8 products": route(), "fp8 products, again": route()}
        sets["fp8 products, added up in float32"] = exactly(route)
        sets["bf16 products"] = through_a_layer(model, "bf16", number, state)
        margins = {}
        for name, source in sources.items():
            fidelity.full, fidelity.matrices = source
            ordered = reference(model, number, state, cos, sin).sort(-1, descending=True)
            sets[name] = ordered.indices[:, :2].sort(-1).values
            margins[name] = ordered.values[:, 1] - ordered.values[:, 2]
        fidelity.full, fidelity.matrices = dequantized
        row: dict[str, Any] = {"router": number, "tokens": ids.numel()}
        for name in ("fp8 products", "fp8 products, added up in float32", "bf16 products"):
            for other in ("bf16 products", "dequantized, float32", "unquantized, float32"):
                if name != other:
                    margin = margins.get(other, margins["dequantized, float32"])
                    row[f"{other} → {name}"] = differing(sets[other], sets[name], margin)
        pair = "unquantized, float32", "dequantized, float32"
        row[" → ".join(pair)] = differing(sets[pair[0]], sets[pair[1]], margins[pair[0]])
        row["two_runs_equal"] = torch.equal(sets["fp8 products"], sets["fp8 products, again"])
        found.append(row)
    return found


# --- The proof of capture -------------------------------------------------------------------------------------------


def proof(engine: ModelEngine, batches: int, rows: int, positions: int) -> dict[str, Any]:
    """Alarms without a fault, and faults without an alarm."""
    recorder = RouteRecorder(engine.recorder.routers, engine.num_experts, engine.experts_per_token)
    random = np.random.default_rng(5)
    layers, alarms, missed, planted = len(engine.layers), 0, {"batch": 0, "layer": 0}, {"batch": 0, "layer": 0}
    agreeing, apart, stale = 1.0, 0.0, None
    others: list[float] = []
    with recorder.attached():
        for _ in range(batches):
            length = random.integers(1, positions + 1, rows)
            token = torch.from_numpy(random.integers(3, 32_000, (rows, positions))).to(engine.device)
            filled = torch.from_numpy(np.flatnonzero(np.arange(positions) < length[:, None])).to(engine.device)
            faults = recorder.record(engine.forward, token, length).faults
            alarms += int((torch.stack(list(faults.values())) >= 0).any(dim=0).sum())
            own = dict(recorder._choices)
            was = in_order(*stacked([fired[0] for fired in own.values()]))
            was = was[0][:, recorder._sample], was[1][:, recorder._sample]
            again = in_order(*stacked(list(recorder._again.values())))
            same = (was[0] == again[0]).all(-1)
            agreeing = min(agreeing, float((same.float().mean(1)).min()))
            apart = max(apart, float(((again[1] - was[1]).abs() / was[1].abs())[same].max()))
            planting = {
                "layer": {
                    layer: own[other] for layer, other in zip(own, [*list(own)[1:], next(iter(own))], strict=True)
                }
            }
            if stale is not None:
                planting["batch"] = stale
            for kind, choices in planting.items():
                recorder._choices = choices
                flagged = recorder._checked(filled).faults[OTHERS] >= 0
                planted[kind] += layers
                missed[kind] += int((~flagged).sum())
                planted_sets = in_order(*stacked([fired[0] for fired in choices.values()]))[0][:, recorder._sample]
                others.append(float((planted_sets == again[0]).all(-1).float().mean()))
            stale = own
    return {
        "batches": batches,
        "layers": layers,
        "false_alarms": alarms,
        "least_share_of_a_sample_with_the_same_set": agreeing,
        "asked_for": SAMPLE_AGREEING,
        "largest_relative_difference_of_a_weight": apart,
        "planted": planted,
        "missed": missed,
        "mean_share_with_the_same_set_where_planted": float(np.mean(others)),
    }


def proofs(layers: int) -> dict[str, Any]:
    """Of the tiny model and of one of full width, with both kinds of products."""
    found = {}
    for matmul in ("bf16", "fp8"):
        engine = load_engine("tiny", device="cuda", quantization="nf4", matmul=matmul)
        found[f"tiny, {matmul}"] = proof(engine, 150, 8, 64)
    model = full_size_model(layers)
    for matmul in ("bf16", "fp8"):
        found[f"full width, {matmul}"] = proof(ModelEngine(as_loaded(model, matmul)), 40, 8, 512)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--cpu", action="store_true", help="the tiny model on a CPU, with the starts of the texts")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": None if options.cpu else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "triton")},
        "margins": MARGINS,
    }
    parts: dict[str, Callable[[], Any]] = {
        "full_width": lambda: at_full_width(options.layers, options.rows, options.positions),
        "proof": lambda: proofs(4),
        "tiny": of_the_tiny_model,
    }
    if options.cpu:
        precision.texts = starts_of_texts
        parts = {"tiny": lambda: of_the_tiny_model("cpu")}
    for name, measure in parts.items():
        with torch.inference_mode():
            result[name] = measure()
        torch.cuda.empty_cache()
        options.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        print(name, "done", flush=True)


if __name__ == "__main__":
    main()
