"""This project's forward pass for several families: each router gets the same input as in transformers' forward pass,
with the same weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from expert_matrices import expert_matrices, linear_matrix
from test_families import FLOAT16_STEP, POSITIONS, VOCABULARY, checkpoint_of
from test_fp8 import assert_near_the_definition, router_inputs
from test_loading import dequantized_reference
from torch import nn

from workers.engine import ModelEngine, load_engine
from workers.models.decoder import DecoderForward, MixtralForward
from workers.models.experts import PackedExperts
from workers.models.family import find_routers
from workers.models.latent import LatentForward
from workers.models.loading import load_model
from workers.models.sinks import GptOssForward, attended, plain_attended

YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 40.0, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.5,
}  # fmt: skip
"""Unequal scales, so that both of its places count: the tables of angles, and attention's scale."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {}),
    "qwen3_moe, a dense layer and biases": ("qwen3_moe", {}),
    "qwen3_moe, wide heads": ("qwen3_moe", {"head_dim": 32, "mlp_only_layers": [], "attention_bias": False}),
    "qwen3_moe, a dense layer at the end": ("qwen3_moe", {"mlp_only_layers": [2], "norm_topk_prob": False}),
    "olmoe": ("olmoe", {}),
    "olmoe, as many keys as queries": ("olmoe", {"num_key_value_heads": 4, "attention_bias": False}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe, a dense layer": ("qwen2_moe", {"mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen2_moe, every second layer": ("qwen2_moe", {"decoder_sparse_step": 2, "num_key_value_heads": 1}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss, wide heads, other windows, no biases": ("gpt_oss", {
        "head_dim": 32, "attention_bias": False, "sliding_window": 3, "swiglu_limit": 0.5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    "gpt_oss, windows wider than the rows": ("gpt_oss", {"sliding_window": 64, "num_key_value_heads": 1}),
    "deepseek_v2": ("deepseek_v2", {"rope_parameters": YARN}),
    "deepseek_v2, as Lite": ("deepseek_v2", {
        "q_lora_rank": None, "topk_method": "greedy", "num_experts_per_tok": 6, "routed_scaling_factor": 1.0,
        "attention_bias": False, "v_head_dim": 16, "qk_rope_head_dim": 32}),
    "deepseek_v3": ("deepseek_v3", {"rope_parameters": YARN}),
    "deepseek_v3, halves, k of 6, all dense but the last": ("deepseek_v3", {
        "rope_interleave": False, "num_experts_per_tok": 6, "first_k_dense_replace": 2, "q_lora_rank": None,
        "v_head_dim": 48, "attention_bias": False, "n_shared_experts": 2}),
}  # fmt: skip
"""The family, and the changes to its configuration in `test_families`."""
FORWARDS: dict[str, tuple[type[DecoderForward], str]] = {
    "mixtral": (MixtralForward, "sorted"),
    "gpt_oss": (GptOssForward, "grouped_sinks"),
    "deepseek_v2": (LatentForward, "grouped_latent"),
    "deepseek_v3": (LatentForward, "grouped_latent"),
}
"""The forward pass and `expert_backend` of families; those of `DecoderForward` for the others."""
LEFT_TO_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "windows": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
    "windows of some layers": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "clipped": ("olmoe", {"clip_qkv": 0.5}),
    "partial rotary": ("qwen3_moe", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}}),
    "another activation": ("qwen2_moe", {"hidden_act": "gelu"}),
}  # fmt: skip


def checkpoint(name: str, folder: Path) -> Path:
    """One of `MODELS`."""
    family, changes = MODELS[name]
    return checkpoint_of(family, folder, **changes)


def random_tokens(rows: int = 3, positions: int = 17) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, positions), generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def restored(loaded: Any, folder: Path) -> Any:
    """transformers' own model in float32, with the values of the loaded matrices."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    loaded_ones = dict(loaded.model.named_modules())
    for name, own in model.named_modules():
        if type(own) is nn.Linear:
            own.weight.copy_(linear_matrix(loaded_ones[name]))
        if isinstance(experts := loaded_ones.get(name), PackedExperts):
            for expert, (gate, up, down) in enumerate(expert_matrices(experts)):
                both = torch.cat([gate, up])
                own.gate_up_proj[expert].copy_(both.T if own.is_transposed else both)
                own.down_proj[expert].copy_(down.T if own.is_transposed else down)
    return model


@torch.inference_mode()
def seen_by_routers(model: Any, token: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The inputs of transformers' routers, and their choices by expert: weights (T, E), 0 if not chosen."""
    seen, chosen = [], []

    def keep(router: Any, inputs: Any, output: Any) -> None:
        seen.append(inputs[0].flatten(0, -2))
        chosen.append(torch.zeros_like(output[0]).scatter(-1, output[2], output[1]))

    handles = [router.register_forward_hook(keep) for router in find_routers(model).values()]
    model(input_ids=token, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen, chosen


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    for layer, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-4, atol=2e-5, msg=lambda said, at=layer: f"router {at}: {said}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_each_router_sees_what_transformers_forward_gives_over_the_same_dequantized_weights(
    name: str, tmp_path: Path
) -> None:
    folder = checkpoint(name, tmp_path)
    loaded, token = load_model(folder, quantization="nf4", device="cpu"), random_tokens()
    forward, backend = FORWARDS.get(MODELS[name][0], (DecoderForward, "grouped"))
    assert type(ModelEngine(loaded).forward) is forward
    assert loaded.provenance["expert_backend"] == backend
    found, _ = seen_by_routers(dequantized_reference(folder, "nf4"), token)
    assert_close(router_inputs(loaded, token), found)
    assert_close(seen_by_routers(loaded.model, token)[0], found)  # transformers' attention, with packed experts


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe, a dense layer", "gpt_oss", "deepseek_v2"])
def test_over_weights_in_e4m3_too(name: str, tmp_path: Path) -> None:
    folder = checkpoint(name, tmp_path)
    loaded, token = load_model(folder, quantization="fp8", device="cpu"), random_tokens()
    assert_close(router_inputs(loaded, token), seen_by_routers(restored(loaded, folder), token)[0])


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("qwen3_moe, a dense layer and biases", "nf4"),
        ("olmoe", "nf4"),
        ("qwen2_moe, a dense layer", "nf4"),
        ("qwen2_moe", "fp8"),
    ],
)
def test_with_products_in_fp8_routers_see_what_the_definition_gives(
    name: str, quantization: str, tmp_path: Path
) -> None:
    loaded = load_model(checkpoint(name, tmp_path), quantization=quantization, matmul="fp8", device="cpu")
    assert_near_the_definition(loaded, random_tokens(), 3, most=0.06)  # a random model amplifies differences


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v2, as Lite", "deepseek_v3"])
def test_with_products_in_fp8_other_forwards_stay_near_what_they_give_without(name: str, tmp_path: Path) -> None:
    folder, token = checkpoint(name, tmp_path), random_tokens()
    plain, rounded = (
        router_inputs(load_model(folder, quantization="nf4", matmul=matmul, device="cpu"), token)
        for matmul in ("bf16", "fp8")
    )
    for one, other in zip(plain, rounded, strict=True):
        apart = (one - other).norm(dim=-1) / one.norm(dim=-1)
        assert 1e-3 < apart.median() < 0.3  # a random model amplifies differences; for other tokens it is above 1


@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_a_sink_takes_its_share_of_what_is_seen(window: int | None) -> None:
    rows, positions, heads, groups, head = 2, 19, 4, 2, 8
    query, key, value = (torch.randn(rows, positions, many, head).double() for many in (heads, groups, groups))
    sinks = torch.randn(heads).double() * 3
    wanted = torch.zeros_like(query)
    for at in range(positions):
        for number in range(heads):
            seen = slice(max(0, at + 1 - (window or positions)), at + 1)
            keys, values = (part[:, seen, number // 2] for part in (key, value))
            power = torch.exp((keys * query[:, at, number, None]).sum(-1) / head**0.5)
            total = power.sum(-1) + sinks[number].exp()
            wanted[:, at, number] = (power[..., None] * values).sum(1) / total[:, None]
    torch.testing.assert_close(plain_attended(query, key, value, sinks, window), wanted)
    torch.testing.assert_close(attended(query, key, value, sinks, window), wanted)


@pytest.mark.parametrize("matmul", ["bf16", "fp8"])
def test_the_last_routed_layer_needs_no_experts_be_it_the_last_or_not(matmul: str, tmp_path: Path) -> None:
    folder = checkpoint("qwen3_moe, a dense layer at the end", tmp_path)
    token, length = random_tokens().numpy().astype(np.int32), np.full(3, 17)
    whole = ModelEngine(load_model(folder, quantization="nf4", matmul=matmul, device="cpu")).route(token, length)
    engine = load_engine(folder, quantization="nf4", matmul=matmul, device="cpu")
    assert not hasattr(engine.model.layers[1].mlp, "experts")
    found = engine.route(token, length)
    for name in ("expert", "weight"):
        np.testing.assert_array_equal(found[name], whole[name])


@pytest.mark.parametrize("special", LEFT_TO_TRANSFORMERS)
def test_what_our_forward_does_not_know_is_captured_by_transformers_forward_with_packed_experts(
    special: str, tmp_path: Path
) -> None:
    name, changes = LEFT_TO_TRANSFORMERS[special]
    folder = checkpoint_of(name, tmp_path, **changes)
    loaded = load_model(folder, quantization="nf4", device="cpu")
    engine = ModelEngine(loaded)
    assert engine.forward is loaded.model
    assert loaded.provenance["expert_backend"] == "grouped"
    assert any(isinstance(module, PackedExperts) for module in loaded.model.modules())
    token = random_tokens(positions=POSITIONS)
    seen, chosen = seen_by_routers(dequantized_reference(folder, "nf4"), token)
    assert_close(router_inputs(loaded, token), seen)
    routes = engine.route(token.numpy().astype(np.int32), np.full(3, POSITIONS))
    expert, weight = (routes[name].reshape(-1, len(chosen), engine.experts_per_token) for name in ("expert", "weight"))
    for layer, wanted in enumerate(chosen):
        found = np.zeros(wanted.shape)
        np.put_along_axis(found, expert[:, layer].astype(int), weight[:, layer], axis=-1)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=FLOAT16_STEP, atol=1e-6)
    with pytest.raises(ValueError, match="--matmul fp8 needs a forward pass of this project"):
        load_model(folder, quantization="nf4", matmul="fp8", device="cpu")
