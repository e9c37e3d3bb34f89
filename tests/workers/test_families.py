"""Twelve families of models: each is captured by its published routing rule, or rejected by name with the reason."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import families_table
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_loading import dequantized_reference

from workers.engine import ModelEngine
from workers.models.family import recordable_routers, unquantized
from workers.models.loading import load_model
from workers.shard import RoutingError

EXPERTS, POSITIONS, VOCABULARY = 16, 32, 128
FLOAT16_STEP = 2.0**-10  # relative; a weight on the boundary may round to either side
NEAR_TIE = 1e-5  # between scores, in float32; hidden states of two forwards differ by 1e-6

# --- The rules, written from papers and model cards, in float64 -------------------------------------------------------
# From logits (T, E), a bias (E,) and k to weights (T, E), 0 where an expert is not chosen, and to the margin by which
# each token's choice was made (T,).


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def largest(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest scores, and the distance to the next one."""
    ordered = -np.sort(np.pad(-scores, ((0, 0), (0, 1)), constant_values=np.inf), axis=-1)
    return scores >= ordered[:, k - 1 : k], ordered[:, k - 1] - ordered[:, k]


def softmax_then_top(logits: np.ndarray, bias: np.ndarray, k: int, *, renormalized: bool) -> tuple[Any, Any]:
    """Mixtral (arXiv 2401.04088, 2.1), Qwen3-MoE (norm_topk_prob of its card), and OLMoE (2409.02060) by default."""
    probability = softmax(logits)
    chosen, clear = largest(probability, k)
    weights = np.where(chosen, probability, 0)
    return weights / (weights.sum(axis=-1, keepdims=True) if renormalized else 1), clear


def top_then_softmax(logits: np.ndarray, bias: np.ndarray, k: int) -> tuple[Any, Any]:
    """gpt-oss (its card; a router with a bias) and Granite 3 (its report; without one)."""
    chosen, clear = largest(logits + bias, k)
    return softmax(np.where(chosen, logits + bias, -np.inf)), clear


def sigmoid_in_groups(
    logits: np.ndarray, bias: np.ndarray, k: int, *, groups: int, kept: int, scale: float
) -> tuple[Any, Any]:
    """DeepSeek-V3 (arXiv 2412.19437, 2.1.2; a group is rated by its two best), and GLM-4.5 with one group.

    The bias affects the choice but not the weight. An expert whose logit is -inf does not exist.
    """
    affinity = 1 / (1 + np.exp(-logits))
    grouped = np.where(logits == -np.inf, -np.inf, affinity + bias).reshape(len(logits), groups, -1)
    kept_groups, groups_clear = largest(np.sort(grouped, axis=-1)[..., -2:].sum(axis=-1), kept)
    chosen, clear = largest(np.where(kept_groups[..., None], grouped, -np.inf).reshape(logits.shape), k)
    weights = np.where(chosen, affinity, 0)
    return scale * weights / weights.sum(axis=-1, keepdims=True), np.minimum(clear, groups_clear)


def softmax_in_groups(
    logits: np.ndarray, bias: np.ndarray, k: int, *, groups: int, kept: int, scale: float
) -> tuple[Any, Any]:
    """DeepSeek-V2 (arXiv 2405.04434, 2.2.1 and 2.2.2): a group is rated by its best; weights are not renormalized."""
    probability = softmax(logits)
    grouped = probability.reshape(len(logits), groups, -1)
    kept_groups, groups_clear = largest(grouped.max(axis=-1), kept)
    chosen, clear = largest(np.where(kept_groups[..., None], grouped, 0).reshape(logits.shape), k)
    return scale * np.where(chosen, probability, 0), np.minimum(clear, groups_clear)


def sigmoid_of_largest(logits: np.ndarray, bias: np.ndarray, k: int) -> tuple[Any, Any]:
    """Llama 4 (its code, meta-llama/llama-models, moe.py): a sigmoid of the chosen experts' logits."""
    chosen, clear = largest(logits, k)
    return np.where(chosen, 1 / (1 + np.exp(-logits)), 0), clear


def sparsemixer(logits: np.ndarray, bias: np.ndarray, k: int, *, noise: float) -> tuple[Any, Any]:
    """Phi-3.5-MoE (GRIN, arXiv 2409.12136): the best expert, then the best of the others.

    Each is weighted by a softmax over the remaining experts that are at most 2 · noise below it, relatively. An expert
    whose logit is -inf does not exist.
    """
    logits = np.maximum(logits, -1e300)
    weights, clear, left = np.zeros_like(logits), np.full(len(logits), np.inf), logits
    for _ in range(k):
        best = left.max(axis=-1, keepdims=True)
        below = (best - logits) / np.maximum(np.abs(logits), best)
        chosen, gap = largest(left, 1)
        weights = np.where(chosen, softmax(np.where(below > 2 * noise, -np.inf, left)), weights)
        clear = np.minimum.reduce([clear, gap, np.abs(below - 2 * noise).min(axis=-1)])
        left = np.where(chosen, -np.inf, left)
    return weights, clear


# --- The families -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Family:
    rule: Callable[..., tuple[np.ndarray, np.ndarray]]
    names: tuple[str, ...]
    """The names of a layer's experts in published checkpoints (only the first expert, if each has its own names)."""
    gate: str
    """Their name of the router's matrix."""
    bias: str = ""
    router: str
    """The router in transformers' layer."""
    layers: tuple[int, ...] = (0, 1, 2)
    settings: dict[str, Any]
    precision: str = "nf4"


W = tuple(f"block_sparse_moe.experts.0.w{number}.weight" for number in (1, 2, 3))
PROJ = tuple(f"mlp.experts.0.{leaf}_proj.weight" for leaf in ("gate", "up", "down"))
SHARED = tuple(f"mlp.shared_experts.{leaf}_proj.weight" for leaf in ("gate", "up", "down"))
SHARED_ALONE = (
    *(f"mlp.shared_expert.{leaf}_proj.weight" for leaf in ("gate", "up", "down")), "mlp.shared_expert_gate.weight",
)  # fmt: skip
FUSED = tuple(f"mlp.experts.{leaf}" for leaf in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"))
CORRECTION = "mlp.gate.e_score_correction_bias"

FAMILIES = {
    "mixtral": Family(
        rule=partial(softmax_then_top, renormalized=True),
        names=W, gate="block_sparse_moe.gate.weight", router="mlp.gate",
        settings={"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Family(
        rule=partial(softmax_then_top, renormalized=True),
        names=PROJ, gate="mlp.gate.weight", router="mlp.gate", layers=(0, 2),
        settings={"num_experts": EXPERTS, "num_experts_per_tok": 3, "norm_topk_prob": True, "mlp_only_layers": [1],
                  "moe_intermediate_size": 64, "head_dim": 16},
    ),
    "qwen2_moe": Family(
        rule=partial(softmax_then_top, renormalized=False),
        names=PROJ + SHARED_ALONE, gate="mlp.gate.weight", router="mlp.gate",
        settings={"num_experts": EXPERTS, "num_experts_per_tok": 3, "moe_intermediate_size": 64,
                  "shared_expert_intermediate_size": 128},
    ),
    "olmoe": Family(
        rule=partial(softmax_then_top, renormalized=False), names=PROJ, gate="mlp.gate.weight", router="mlp.gate",
        settings={"num_experts": EXPERTS, "num_experts_per_tok": 4},
    ),
    "deepseek_v3": Family(
        rule=partial(sigmoid_in_groups, groups=4, kept=2, scale=2.5),
        names=PROJ + SHARED, gate="mlp.gate.weight", bias=CORRECTION, router="mlp.gate", layers=(1, 2),
        settings={"n_routed_experts": EXPERTS, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
                  "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "moe_intermediate_size": 64,
                  "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
                  "v_head_dim": 16, "num_key_value_heads": 4},
    ),
    "deepseek_v2": Family(
        rule=partial(softmax_in_groups, groups=4, kept=2, scale=1.5),
        names=PROJ + SHARED, gate="mlp.gate.weight", router="mlp.gate", layers=(1, 2),
        settings={"n_routed_experts": EXPERTS, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
                  "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5, "first_k_dense_replace": 1,
                  "n_shared_experts": 2, "moe_intermediate_size": 64, "q_lora_rank": 64, "kv_lora_rank": 64,
                  "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4},
    ),
    "glm4_moe": Family(
        rule=partial(sigmoid_in_groups, groups=1, kept=1, scale=1.5),
        names=PROJ + SHARED, gate="mlp.gate.weight", bias=CORRECTION, router="mlp.gate", layers=(1, 2),
        settings={"n_routed_experts": EXPERTS, "num_experts_per_tok": 3, "routed_scaling_factor": 1.5,
                  "first_k_dense_replace": 1, "moe_intermediate_size": 64, "head_dim": 16, "use_qk_norm": True},
    ),
    "gpt_oss": Family(
        rule=top_then_softmax,
        names=FUSED, gate="mlp.router.weight", bias="mlp.router.bias", router="mlp.router",
        settings={"num_local_experts": EXPERTS, "num_experts_per_tok": 4, "head_dim": 16, "sliding_window": 8,
                  "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "granitemoe": Family(
        rule=top_then_softmax, router="block_sparse_moe.router",
        names=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        gate="block_sparse_moe.router.layer.weight",
        settings={"num_local_experts": EXPERTS, "num_experts_per_tok": 3, "residual_multiplier": 0.5},
    ),
    "phimoe": Family(
        rule=partial(sparsemixer, noise=0.1), names=W, gate="block_sparse_moe.gate.weight", router="mlp.router",
        settings={"num_local_experts": EXPERTS, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
    ),
}  # fmt: skip

ROUTERS_ALONE = {
    "afmoe": Family(
        rule=partial(sigmoid_in_groups, groups=1, kept=1, scale=1.5),
        names=PROJ + SHARED, gate="mlp.router.gate.weight", bias="mlp.expert_bias", router="mlp.router", layers=(1, 2),
        settings={"num_experts": EXPERTS, "num_experts_per_tok": 3, "num_dense_layers": 1, "route_scale": 1.5,
                  "moe_intermediate_size": 64, "head_dim": 16, "num_shared_experts": 1},
    ),
    "llama4_text": Family(
        rule=sigmoid_of_largest, precision="none",
        names=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
        gate="feed_forward.router.weight", router="feed_forward.router",
        settings={"num_local_experts": EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "head_dim": 16},
    ),
}  # fmt: skip
"""Tried for their routers: one that takes a bias of its block, and one that returns weights of all experts."""


def checkpoint_of(name: str, folder: Path, **changes: Any) -> Path:
    """A tiny checkpoint with random weights, in the published layout; biases and sinks are not zero, nor norms one."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
        "attention_bias": True,
        "pad_token_id": None,
        "eos_token_id": 2,
    }
    config = transformers.AutoConfig.for_model(name, **common | (FAMILIES | ROUTERS_ALONE)[name].settings | changes)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for key, tensor in model.state_dict().items():
        if key.endswith(("gate.weight", "router.weight", "bias", "sinks")):
            torch.nn.init.normal_(tensor, std=0.3)
        if key.endswith("norm.weight"):
            torch.nn.init.uniform_(tensor, 0.7, 1.3)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def stock_of(family: Family, folder: Path) -> Any:
    """transformers' own model with each matrix quantized and dequantized, except those of routers."""
    exact = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    if family.precision == "none":
        return exact
    stock = dequantized_reference(folder, family.precision)
    for part in unquantized(stock):  # some have a Linear
        stock.get_submodule(part).load_state_dict(exact.get_submodule(part).state_dict())
    return stock


def wanted_routes(model: Any, family: Family, tensors: dict[str, torch.Tensor], row: np.ndarray) -> tuple[Any, Any]:
    """The rule's weights (T, L, E) for one row alone, from the inputs of the model's routers, and their margins."""
    weights, clear = [], []

    def keep(_: Any, inputs: tuple[torch.Tensor, ...], prefix: str) -> None:
        bias = tensors[prefix + family.bias].double().numpy() if family.bias else np.zeros(EXPERTS)
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()
        logits = hidden @ tensors[prefix + family.gate].double().numpy().T
        found = family.rule(logits, bias, family.settings["num_experts_per_tok"])
        weights.append(found[0])
        clear.append(found[1])

    handles = []
    for layer in family.layers:
        router = model.layers[layer].get_submodule(family.router)
        handles.append(router.register_forward_pre_hook(partial(keep, prefix=f"model.layers.{layer}.")))
    model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack(weights, axis=1), np.stack(clear, axis=1)


@pytest.mark.parametrize("name", FAMILIES | ROUTERS_ALONE)
@torch.inference_mode()
def test_a_family_is_captured_as_its_rule_says(name: str, tmp_path: Path) -> None:
    family, folder = (FAMILIES | ROUTERS_ALONE)[name], checkpoint_of(name, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    named = [f"model.layers.{layer}.{leaf}" for layer in family.layers for leaf in (family.gate, *family.names)]
    assert set(named) <= set(tensors), "not the published layout"
    loaded, stock = load_model(folder, quantization=family.precision, device="cpu"), stock_of(family, folder)
    fused = [module for module in stock.modules() if hasattr(module, "gate_up_proj")]
    matrices = (
        0
        if family.precision == "none"
        else sum(re.search(r"expert.*weight$", key) is not None for key in tensors)
        or sum(EXPERTS * (3 if module.is_concatenated else 2) for module in fused)
    )
    assert loaded.provenance["quantized_expert_matrices"] == matrices
    engine, k = ModelEngine(loaded), family.settings["num_experts_per_tok"]
    assert (engine.layers, engine.num_experts, engine.experts_per_token) == (family.layers, EXPERTS, k)
    assert loaded.model.config._attn_implementation == ("eager" if name == "gpt_oss" else "sdpa")

    random = np.random.default_rng(1)
    length = np.array([POSITIONS, 1, *random.integers(2, POSITIONS, 10)])
    token = random.integers(3, VOCABULARY, (len(length), POSITIONS)).astype(np.int32)
    token[np.arange(POSITIONS) >= length[:, None]] = -1
    expert, weight = engine.route(token, length).values()
    assert (np.diff(weight, axis=-1) <= 0).all(), "not by falling weight"
    near_ties = 0
    for row, size in enumerate(length):
        wanted, clear = wanted_routes(stock, family, tensors, token[row, :size])
        got = np.zeros_like(wanted)
        np.put_along_axis(got, expert[row, :size].astype(int), weight[row, :size], axis=-1)
        sure = clear > NEAR_TIE
        np.testing.assert_allclose(got[sure], wanted[sure], rtol=FLOAT16_STEP, atol=0)
        near_ties += (~sure).sum()
    assert near_ties <= length.sum() * len(family.layers) / 200
    filled = np.arange(POSITIONS) < length[:, None]
    assert len(set(expert[filled].ravel())) > EXPERTS * 3 / 4, "few experts are ever chosen: the rule is hardly tried"


def test_the_docs_table_of_families_is_made_from_what_make_families_found() -> None:
    assert families_table.PAGE.read_text(encoding="utf-8") == families_table.page(), "python tests/families_table.py"


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("longcat_flash", {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "num_layers": 1},
         r"LongcatFlashTopkRouter\) cannot be recorded, at layer 0: it chooses among 6 experts, but num_experts is 4"),
        ("zaya", {"num_experts": 4, "moe_intermediate_size": 64}, r"it takes \(hidden_states, router_states\)"),
        ("jetmoe", {"num_local_experts": 4, "kv_channels": 16}, "two routers in layer 0"),
        ("deepseek_v4", {"n_routed_experts": 4, "moe_intermediate_size": 64}, r"it takes \(hidden_states, input_ids\)"),
        ("openai_privacy_filter", {"num_local_experts": 4}, "layers.0.self_attn .* lets tokens attend to later ones"),
        ("switch_transformers", {"num_experts": 4, "d_model": 64, "num_layers": 2, "num_decoder_layers": 2},
         "has an encoder and a decoder"),
    ],
)  # fmt: skip
def test_families_that_cannot_be_recorded_are_rejected_by_name_from_their_configuration(
    name: str, settings: dict[str, Any], reason: str
) -> None:
    small = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "pad_token_id": None,
    }
    config = transformers.AutoConfig.for_model(name, **small | settings)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    with pytest.raises(ValueError, match=reason):
        recordable_routers(model)


@torch.inference_mode()
def test_hidden_states_that_were_cast_to_the_dtype_of_a_quantized_matrix_are_refused(tmp_path: Path) -> None:
    model = load_model(checkpoint_of("mixtral", tmp_path), device="cpu").model
    projection: Any = model.get_submodule("layers.0.self_attn.q_proj")
    with pytest.raises(RoutingError, match=r"gives hidden states of torch.uint8 to a quantized matrix \(Linear4bit\)"):
        projection(torch.ones(1, 64).to(projection.weight.dtype))


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "mxfp8"])
def test_weights_that_are_quantized_in_a_way_that_is_not_read_are_rejected_by_its_name(
    method: str, tmp_path: Path
) -> None:
    file = checkpoint_of("gpt_oss", tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}))
    for quantization in ("nf4", "none"):
        with pytest.raises(ValueError, match=rf"gpt_oss\) holds .* already quantized \({method}\).* the original"):
            load_model(tmp_path, quantization=quantization, device="cpu")


def test_each_family_of_the_survey_was_captured_or_rejected() -> None:
    kept = families_table.found()["families"]
    outcomes = {kind: {one["outcome"] for one in each.values()} for kind, each in kept.items()}
    assert {kind: found for kind, found in outcomes.items() if not found <= {"captured", "rejected"}} == {}
