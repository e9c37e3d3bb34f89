"""Other families at full size on one GPU: `python tests/benchmarks/families.py -o RESULT.json`, by hand.

Creates each model on the GPU with random weights (NF4, packed as by `load_model`; bf16 for transformers' own forward
pass), and prints a table: tokens/s and memory of this project's forward pass with its proof and its copy to the host,
with bf16 and with fp8 products, of the matrix products alone, and of transformers' forward pass with `grouped_mm` and
its default attention: sdpa, or eager for gpt-oss. All layers have equal experts; models that are too large in bf16 get
fewer layers. Contestants alternate in one run; rates are medians.
"""

import argparse
import gc
import json
import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

from checkpoints import make_mxfp4  # noqa: E402
from full_size import fill, random_matrix  # noqa: E402
from gpu import GIB, Run, alternate, captured, stock  # noqa: E402

from workers.engine import drop_last_experts  # noqa: E402
from workers.models import fp8, saving  # noqa: E402
from workers.models.decoder import DecoderForward, dense_linears, router_of  # noqa: E402
from workers.models.description import quantization_config  # noqa: E402
from workers.models.family import experts_per_token, find_routers, num_experts  # noqa: E402
from workers.models.forwards import own_forward  # noqa: E402
from workers.models.loading import LoadedModel  # noqa: E402
from workers.models.packed import PackedStack  # noqa: E402
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
    "gpt-oss-20b": lambda: transformers.GptOssConfig(
        num_hidden_layers=24, num_local_experts=32, dtype="bfloat16", architectures=["GptOssForCausalLM"],
    ),
    "gpt-oss-120b": lambda: transformers.GptOssConfig(
        num_hidden_layers=36, num_local_experts=128, dtype="bfloat16", architectures=["GptOssForCausalLM"],
    ),
    "deepseek-v2-lite": lambda: transformers.DeepseekV2Config(
        hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408, num_hidden_layers=27,
        num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
        first_k_dense_replace=1, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0,
        norm_topk_prob=False, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
        v_head_dim=128, vocab_size=102400, max_position_embeddings=163840,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096,
            "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
        dtype="bfloat16", architectures=["DeepseekV2ForCausalLM"],
    ),
    "qwen3-235b-a22b": lambda: transformers.Qwen3MoeConfig(
        hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536, num_hidden_layers=94,
        num_attention_heads=64, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        vocab_size=151936, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], sliding_window=None,
        max_position_embeddings=40960, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    ),
}  # fmt: skip
"""The published configurations."""
LAYERS = {"gpt-oss-120b": 12, "qwen3-235b-a22b": 12}
"""Default number of layers; all layers for other models."""


def stored_in(config: Any) -> str:
    """The quantization of the rows: gpt-oss as published, all others in NF4."""
    return "mxfp4" if config.model_type == "gpt_oss" else "nf4"


def config_of(name: str, layers: int | None = None) -> Any:
    """One of `CONFIGS`, perhaps with fewer layers."""
    config = CONFIGS[name]()
    config.num_hidden_layers = min(layers or LAYERS.get(name, config.num_hidden_layers), config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config


def random_model(config: Any, quantization: str) -> Any:
    """transformers' base model on the GPU, with one layer's experts in all layers; seed 0.

    Parameters
    ----------
    quantization
        nf4 or mxfp4, packed, or none: bf16 with transformers' fused experts.
    """
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, dtype=torch.bfloat16)
    if quantization == "none":
        model.set_experts_implementation("grouped_mm")
    else:
        quantize_skeleton(model, quantization_config(quantization, model, torch.bfloat16))
    generator = torch.Generator("cuda").manual_seed(0)
    *others, last = model.layers
    fill(last, generator, quantization)
    for layer in others:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = _copy_of(last.mlp.experts)
    fill(model, generator, quantization)
    model.rotary_emb = type(model.rotary_emb)(config).to("cuda")
    return model.eval().requires_grad_(False)


def _copy_of(experts: Any) -> Any:
    """A layer with its own memory, as in loaded models, and with the buffers that all layers share."""
    shared = {} if (products := getattr(experts, "products", None)) is None else {id(products): products}
    return deepcopy(experts, shared)


def save_checkpoint(config: Any, folder: Path) -> None:
    """Random weights in NF4, as written by `jobs/quantize.py`, one file per layer; gpt-oss in MXFP4."""
    if stored_in(config) == "mxfp4":
        make_mxfp4(config, folder)
        return
    folder.mkdir(parents=True)
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
    """The result that `load_model` would return."""
    return LoadedModel(
        folder=Path(), model=model, routers=find_routers(model), num_experts=num_experts(config),
        experts_per_token=experts_per_token(config), provenance={},
    )  # fmt: skip


def products_alone(forward: DecoderForward, choices: int, matmul: str, tokens: int) -> Run:
    """Every matrix product of a forward, experts evenly loaded, with weights that all layers share."""
    generator = torch.Generator("cuda").manual_seed(1)
    products = products_of(matmul, torch.bfloat16)

    @cache
    def matrix(rows: int, columns: int, many: int | None = None) -> Any:
        values = random_matrix((rows * (many or 1), columns), generator)
        shape = (many, rows, columns) if many else (rows, columns)
        if matmul == "bf16":
            return values.view(shape)
        found = fp8.rounded(values)
        return fp8.RowScaled(found.values.view(shape), found.scale.view(*shape[:-1], 1))

    def of_linears(linears: tuple[Any, ...]) -> Run:
        columns = linears[0].in_features
        right = matrix(sum(linear.out_features for linear in linears), columns)
        return partial(products.multiply, matrix(tokens, columns), right)

    def of_stack(stack: PackedStack) -> Run:
        slots = tokens * choices
        ends = torch.linspace(0, slots, stack.experts + 1, device="cuda")[1:].round().int()
        right = matrix(stack.rows, stack.columns, stack.experts)
        return partial(products.grouped, matrix(slots, stack.columns), right, ends)

    steps: list[Run] = []
    *layers, last = forward.model.layers
    for layer in layers:
        steps += [of_linears(linears) for linears in (*forward.attention_linears(layer), *dense_linears(layer))]
        if hasattr(layer.mlp, "experts"):
            steps += [of_stack(stack) for stack in (layer.mlp.experts.both, layer.mlp.experts.down)]
    steps += [of_linears(linears) for linears in forward.attention_linears(last)]

    def run() -> None:
        for step in steps:
            step()

    return run


class Layer:
    """One layer of a model and the router of the next one, as a model that starts with given hidden states."""

    def __init__(self, model: Any, number: int, states: torch.Tensor) -> None:
        self.layers, self.rotary_emb, self.config = model.layers[number : number + 2], model.rotary_emb, model.config
        self.norm = model.norm
        self.embed_tokens = nn.Embedding(1, 1, dtype=torch.bfloat16, device="cuda")
        self.embed_tokens.forward = lambda ids: states.clone()  # the forward adds to them in place


def layer_by_layer(name: str, layers: int = 5, rows: int = 16) -> list[dict[str, Any]]:
    """The next router's input in this project's forward pass, compared with transformers', with the same weights and
    hidden states.

    Both start from the hidden states of transformers' forward pass before the layer, so that a router is reached
    through one whole layer: attention, experts, attention.
    """
    config = config_of(name, layers)
    layers = config.num_hidden_layers
    form = stored_in(config)
    model = random_model(config, form)
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
        for matmul in ("bf16",) if form == "mxfp4" else ("bf16", "fp8"):
            forward = own_forward(model, form)(of_layer, matmul)
            hidden, experts = _at_routers(of_layer.layers, partial(forward, ids))[-1]
            wanted, chosen = theirs[number + 1 - layers]  # the first layers may have no router
            away = (hidden.float() - wanted.float()).norm() / wanted.float().norm()
            same = (experts.sort(-1).values == chosen.sort(-1).values).all(-1).float().mean()
            found.append({"model": name, "layer": number + 1, "matmul": matmul, "tokens": ids.numel()})
            found[-1] |= {"relative_distance": round(away.item(), 5), "same_set": round(same.item(), 5)}
            print(json.dumps(found[-1]), flush=True)
    return found


def _at_routers(model: nn.Module, run: Callable[[], Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The inputs and choices of each router."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    routers = filter(None, [router_of(layer.mlp) for layer in getattr(model, "layers", model)])
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
            row = {"model": self.name, "layers": self.config.num_hidden_layers, "system": system}
            row |= {"weights": weights, "matmul": matmul, "tokens": tokens}
            row |= {"tokens_per_s": round(tokens / took[" ".join(key)]), "peak_gib": round(peaks[key], 2)}
            self.rows.append(row)
            print(json.dumps(row), flush=True)


def profile(run: Run, top: int = 25) -> list[dict[str, Any]]:
    """The time of one forward pass by kernel, in milliseconds."""
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
    """Create the models, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=list(CONFIGS), help="only these")
    parser.add_argument("--layers", type=int, help="so many at most; of models too large for a card, 12 by default")
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
            save_checkpoint(config_of((options.model or list(CONFIGS))[0], options.layers), options.checkpoint)
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
    config = config_of(name, options.layers)
    table = Table(name, config, options.seconds)
    form = stored_in(config)
    model = random_model(config, form)
    drop_last_experts(as_loaded(model, config))
    matmuls = ("bf16",) if form == "mxfp4" else ("bf16", "fp8")
    forwards = {matmul: own_forward(model, form)(model, matmul) for matmul in matmuls}
    sizes = num_experts(config), experts_per_token(config)
    for tokens in options.tokens:
        ids = torch.randint(0, config.vocab_size, (tokens // POSITIONS, POSITIONS), device="cuda")
        make: dict[tuple[str, str, str], Callable[[], Run]] = {
            ("captured", form, matmul): partial(captured, model, forward, ids, *sizes)
            for matmul, forward in forwards.items()
        }
        for matmul, forward in forwards.items():  # after all captures, whose memory they would add to
            make["products alone", matmul, matmul] = partial(products_alone, forward, sizes[1], matmul, tokens)
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
