"""Other families at full size on one GPU: `python tests/benchmarks/families.py -o RESULT.json`, by hand.

Makes each model on the card with random weights (NF4, packed as `load_model` leaves it; and for transformers' own
forward bf16), and prints a table: tokens/s and memory of our forward with its proof and its copy to the host, with bf16
and with fp8 products, of the matrix products alone, and of transformers' forward with `grouped_mm`. All layers have
equal experts. Contestants alternate in one run; rates are medians.
"""

import argparse
import gc
import json
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

from full_size import fill, random_matrix  # noqa: E402
from gpu import GIB, Run, alternate, captured, stock  # noqa: E402

from workers.engine import drop_last_experts  # noqa: E402
from workers.models import fp8, saving  # noqa: E402
from workers.models.description import find_routers, quantization_config  # noqa: E402
from workers.models.forwards import forward_of  # noqa: E402
from workers.models.loading import LoadedModel  # noqa: E402
from workers.models.products import products_of  # noqa: E402
from workers.models.quantizers import quantize_skeleton  # noqa: E402
from workers.tiny import tiny_checkpoint  # noqa: E402

POSITIONS = 2048
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3-30b-a3b": lambda: transformers.Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        vocab_size=151936, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], sliding_window=None,
        max_position_embeddings=32768, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    ),
    "olmoe-1b-7b": lambda: transformers.OlmoeConfig(
        hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, vocab_size=50304,
        max_position_embeddings=4096, dtype="bfloat16", architectures=["OlmoeForCausalLM"],
    ),
}  # fmt: skip
"""The published configurations."""


def random_model(config: Any, quantization: str) -> Any:
    """transformers' base model on the GPU, with one layer's experts in all layers; seed 0.

    Parameters
    ----------
    quantization
        nf4, packed, or none: bf16 with transformers' fused experts.
    """
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if quantization == "none":
        model.set_experts_implementation("grouped_mm")
    else:
        quantize_skeleton(model, quantization_config(quantization, model, torch.bfloat16))
    generator = torch.Generator("cuda").manual_seed(0)
    *others, last = model.layers
    fill(last, generator, quantization)
    for layer in others:
        layer.mlp.experts = _copy_of(last.mlp.experts)
    fill(model, generator, quantization)
    model.rotary_emb = type(model.rotary_emb)(config).to("cuda")
    return model.eval().requires_grad_(False)


def _copy_of(experts: Any) -> Any:
    """With memory of its own, as loaded ones have, and with the buffers that all layers share."""
    shared = {} if (products := getattr(experts, "products", None)) is None else {id(products): products}
    return deepcopy(experts, shared)


def save_checkpoint(name: str, folder: Path) -> None:
    """Random weights as `jobs/quantize.py` would leave them, in NF4, one file a layer, with the tiny tokenizer."""
    folder.mkdir(parents=True)
    config = CONFIGS[name]()
    with torch.device("meta"):
        skeleton = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
    settings = quantization_config("nf4", skeleton, torch.bfloat16)
    stored = saving._settings(settings, skeleton, {}, packed=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": stored}))
    model, places = random_model(config, "nf4"), {}
    parts = {"layers.": model.layers, "": nn.ModuleDict({"embed_tokens": model.embed_tokens, "norm": model.norm})}
    files = {f"layers.{number}.": layer for number, layer in enumerate(parts.pop("layers."))} | parts
    for number, (prefix, part) in enumerate(files.items()):
        file = f"model-{number + 1:05}-of-{len(files):05}.safetensors"
        tensors = {f"model.{prefix}{leaf}": value.contiguous().cpu() for leaf, value in part.state_dict().items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for file in tiny_checkpoint().glob("*token*"):
        shutil.copy(file, folder)


def as_loaded(model: Any, config: Any) -> LoadedModel:
    """What `load_model` would give."""
    return LoadedModel(
        folder=Path(), model=model, routers=find_routers(model), num_experts=config.num_experts,
        experts_per_token=config.num_experts_per_tok, provenance={},
    )  # fmt: skip


def products_alone(config: Any, matmul: str, tokens: int) -> Run:
    """Every matrix product of a forward, experts evenly loaded, with weights that all layers share."""
    generator = torch.Generator("cuda").manual_seed(1)
    products = products_of(matmul, torch.bfloat16)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    heads, groups, experts = config.num_attention_heads, config.num_key_value_heads, config.num_experts
    slots = tokens * config.num_experts_per_tok

    def matrix(rows: int, columns: int, many: int | None = None) -> Any:
        values = random_matrix((rows * (many or 1), columns), generator)
        shape = (many, rows, columns) if many else (rows, columns)
        if matmul == "bf16":
            return values.view(shape)
        found = fp8.rounded(values)
        return fp8.RowScaled(found.values.view(shape), found.scale.view(*shape[:-1], 1))

    qkv = matrix((heads + 2 * groups) * head, config.hidden_size)
    o = matrix(config.hidden_size, heads * head)
    both, down = matrix(2 * inner, config.hidden_size, experts), matrix(config.hidden_size, inner, experts)
    hidden, flat = matrix(tokens, config.hidden_size), matrix(tokens, heads * head)
    taken, gated = matrix(slots, config.hidden_size), matrix(slots, inner)
    ends = torch.linspace(0, slots, experts + 1, device="cuda")[1:].round().int()

    def run() -> None:
        for layer in range(config.num_hidden_layers):
            products.multiply(hidden, qkv)
            products.multiply(flat, o)
            if layer + 1 < config.num_hidden_layers:
                products.grouped(taken, both, ends)
                products.grouped(gated, down, ends)

    return run


class Layer:
    """One layer of a model and the router of the next one, as a model that begins with given hidden states."""

    def __init__(self, model: Any, number: int, states: torch.Tensor) -> None:
        self.layers, self.rotary_emb, self.config = model.layers[number : number + 2], model.rotary_emb, model.config
        self.embed_tokens = nn.Embedding(1, 1, dtype=torch.bfloat16, device="cuda")
        self.embed_tokens.forward = lambda ids: states.clone()  # the forward adds to them in place


def layer_by_layer(name: str, layers: int = 5, rows: int = 16) -> list[dict[str, Any]]:
    """What our forward gives the next router beside transformers' over the same weights and hidden states.

    Both start from what transformers' forward had before the layer, so that a router is reached through one whole
    layer: attention, experts, attention.
    """
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    model = random_model(config, "nf4")
    ids = torch.randint(0, config.vocab_size, (rows, POSITIONS), device="cuda")
    states: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0].clone())) for layer in model.layers
    ]
    theirs = _at_routers(model, lambda: model(input_ids=ids, use_cache=False))
    for handle in handles:
        handle.remove()
    found = []
    for number in range(layers - 1):
        of_layer = Layer(model, number, states[number])
        for matmul in ("bf16", "fp8"):
            forward = type(forward_of(model, "nf4", "grouped", matmul))(of_layer, matmul)
            hidden, experts = _at_routers(of_layer.layers, partial(forward, ids))[-1]
            wanted, chosen = theirs[number + 1]
            away = (hidden.float() - wanted.float()).norm() / wanted.float().norm()
            same = (experts.sort(-1).values == chosen.sort(-1).values).all(-1).float().mean()
            found.append({"model": name, "layer": number + 1, "matmul": matmul, "tokens": ids.numel()})
            found[-1] |= {"relative_distance": round(away.item(), 5), "same_set": round(same.item(), 5)}
            print(json.dumps(found[-1]), flush=True)
    return found


def _at_routers(model: nn.Module, run: Callable[[], Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What reaches each router, and what it chooses."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    routers = [layer.mlp.gate for layer in getattr(model, "layers", model)]
    handles = [
        router.register_forward_hook(lambda _, args, output: found.append((args[0].flatten(0, -2).clone(), output[2])))
        for router in routers
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


class Table:
    """Rows as they are measured."""

    def __init__(self, name: str, config: Any, seconds: float) -> None:
        self.name, self.config, self.seconds, self.rows = name, config, seconds, []  # type: str, Any, float, list[Any]

    def measure(self, contestants: dict[tuple[str, str, str], Callable[[], Run]], tokens: int) -> None:
        """Keys: system, weights, matmul."""
        runs, peaks = {}, {}
        for key, make in contestants.items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            runs[key] = make()
            runs[key]()
            torch.cuda.synchronize()
            peaks[key] = torch.cuda.max_memory_allocated() / GIB
        took = alternate({" ".join(key): run for key, run in runs.items()}, self.seconds)
        for key in runs:
            system, weights, matmul = key
            row = {"model": self.name, "system": system, "weights": weights, "matmul": matmul, "tokens": tokens}
            row |= {"tokens_per_s": round(tokens / took[" ".join(key)]), "peak_gib": round(peaks[key], 2)}
            self.rows.append(row)
            print(json.dumps(row), flush=True)


def profile(run: Run, top: int = 25) -> list[dict[str, Any]]:
    """Where the time of one forward goes, by kernel, in milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {"kernel": event.key[:90], "ms": round(event.self_device_time_total / 1000, 3), "calls": event.count}
        for event in events[:top]
    ]


def main() -> None:
    """Make the models, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(CONFIGS), help="only these")
    parser.add_argument("--tokens", type=int, nargs="*", default=[16_384, 32_768])
    parser.add_argument("--seconds", type=float, default=8, help="of each comparison")
    parser.add_argument("--without_transformers", action="store_true", help="leave the bf16 model out")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--layer_by_layer", action="store_true", help="also compare hidden states with transformers'")
    parser.add_argument("--checkpoint", type=Path, help="only write the first model's checkpoint into this folder")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    if options.checkpoint is not None:
        with torch.inference_mode():
            save_checkpoint((options.model or list(CONFIGS))[0], options.checkpoint)
        return
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        "rows": [],
    }
    with torch.inference_mode():
        for name in options.model or CONFIGS:
            of_model(name, options, result)
            gc.collect()
            torch.cuda.empty_cache()
            if options.layer_by_layer:
                result.setdefault("layer_by_layer", []).extend(layer_by_layer(name))
                options.output.write_text(json.dumps(result, indent=1) + "\n")


def of_model(name: str, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """All rows of one family."""
    config = CONFIGS[name]()
    table = Table(name, config, options.seconds)
    model = random_model(config, "nf4")
    drop_last_experts(as_loaded(model, config))
    forwards = {matmul: forward_of(model, "nf4", "grouped", matmul) for matmul in ("bf16", "fp8")}
    sizes = config.num_experts, config.num_experts_per_tok
    for tokens in options.tokens:
        ids = torch.randint(0, config.vocab_size, (tokens // POSITIONS, POSITIONS), device="cuda")
        make: dict[tuple[str, str, str], Callable[[], Run]] = {
            ("captured", "nf4", matmul): partial(captured, model, forward, ids, *sizes)
            for matmul, forward in forwards.items()
        }
        for matmul in forwards:  # after all captures, whose memory they would add to
            make["products alone", matmul, matmul] = partial(products_alone, config, matmul, tokens)
        if not options.without_transformers:
            make["transformers, grouped_mm", "bf16", "bf16"] = lambda ids=ids: stock(random_model(config, "none"), ids)
        table.measure(make, tokens)
        if options.profile:
            for matmul, forward in forwards.items():
                run = captured(model, forward, ids, *sizes)
                result[f"kernels {name} {matmul} {tokens}"] = profile(run)
        result["rows"] = [*[row for row in result["rows"] if row["model"] != name], *table.rows]
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
