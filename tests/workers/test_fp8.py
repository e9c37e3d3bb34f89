"""Weights and products in e4m3: the arithmetic compared with tables and float64, loading compared with the published
layouts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Params4bit
from expert_matrices import expert_matrices, linear_matrix
from safetensors.torch import load_file, save_file
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

from workers import describe_model, load_model, tiny_checkpoint
from workers.engine import ModelEngine
from workers.models import fp8
from workers.models.footprint import estimate_bytes
from workers.models.four_bits import FourBits
from workers.models.loading import LoadedModel
from workers.models.stored import default_quantization
from workers.recorder import OTHERS
from workers.recordings.recording import WEIGHT_TOLERANCE

FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Spoil = Callable[[dict[str, torch.Tensor]], None]

# --- Arithmetic -----------------------------------------------------------------------------------------------------


def e4m3_numbers() -> np.ndarray:
    """All finite numbers of e4m3 from its definition: 4 bits of exponent with bias 7, 3 of mantissa; in order."""
    found = {0.0}
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):  # not a number
                size = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6
                found |= {size, -size}
    return np.array(sorted(found))


def nearest(values: np.ndarray) -> np.ndarray:
    """The distance to the nearest number of e4m3."""
    return np.abs(values[..., None] - e4m3_numbers()).min(axis=-1)


def rounded_by_definition(rows: torch.Tensor) -> torch.Tensor:
    """Rows of float64 that represent rows in e4m3 with one scale each."""
    scale = rows.double().abs().amax(-1, keepdim=True) / 448
    return (rows.double() / scale).float().to(torch.float8_e4m3fn).double() * scale


def test_a_row_is_rounded_to_the_nearest_numbers_of_e4m3_by_its_largest_value() -> None:
    rows = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    rows[4] *= 1e-6
    found = fp8.rounded(rows)
    assert found.values.dtype == torch.float8_e4m3fn
    largest = rows.abs().amax(-1)
    np.testing.assert_allclose(found.scale[:, 0], largest.clamp_min(1e-12) / 448, rtol=1e-6)
    given, kept = (rows / found.scale).double().numpy(), found.values.double().numpy()
    np.testing.assert_allclose(np.abs(given - kept), nearest(given), atol=1e-4)
    assert np.isin(kept, e4m3_numbers()).all()
    assert (kept[3] == 0).all()
    assert np.abs(kept[[0, 1, 2, 4, 5, 6]]).max(axis=-1).tolist() == [448] * 6


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_4_bit_matrix_becomes_e4m3_by_scales_from_its_blocks_alone(kind: str) -> None:
    matrix = torch.randn(48, 192, generator=torch.Generator().manual_seed(1))
    weight = Params4bit(matrix, requires_grad=False, quant_type=kind, compress_statistics=True).to("cpu")
    exact = dequantize_4bit(weight.data, weight.quant_state)
    matrices = FourBits.of(weight)
    scale, out = fp8.row_scales(matrices, 48), torch.empty(48, 192, dtype=torch.float8_e4m3fn)
    torch.testing.assert_close(scale[:, 0], exact.abs().amax(-1) / 448)
    fp8.dequantize_rounded(matrices, scale, out)
    given = (exact / scale).double().numpy()
    np.testing.assert_allclose(np.abs(given - out.double().numpy()), nearest(given), atol=1e-4)


def test_a_product_is_that_of_the_numbers_in_e4m3() -> None:
    left, right = (torch.randn(count, 64, generator=torch.Generator().manual_seed(count)) for count in (5, 32))
    wanted = rounded_by_definition(left) @ rounded_by_definition(right).T
    found = fp8.multiply(fp8.rounded(left), fp8.rounded(right), torch.empty(5, 32))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    half = fp8.multiply(fp8.rounded(left), fp8.rounded(right), torch.empty(5, 32, dtype=torch.bfloat16))
    torch.testing.assert_close(half.double(), wanted, rtol=2.0**-8, atol=1e-5)


# --- The forward pass -----------------------------------------------------------------------------------------------


def router_inputs(loaded: LoadedModel, token: torch.Tensor) -> list[torch.Tensor]:
    """The inputs of the routers, in order."""
    seen: list[torch.Tensor] = []
    handles = [
        router.register_forward_hook(lambda gate, inputs, output: seen.append(inputs[0].flatten(0, -2)))
        for router in loaded.routers.values()
    ]
    with torch.inference_mode():
        ModelEngine(loaded).forward(token, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def by_definition(loaded: LoadedModel, token: torch.Tensor, layers: int) -> list[torch.Tensor]:
    """The inputs of the first layers' routers by the plain formulas: products of numbers in e4m3, in float64."""
    model: Any = loaded.model
    config, (rows, positions) = model.config, token.shape

    def product(states: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return rounded_by_definition(states) @ rounded_by_definition(matrix).T

    def applied(linear: Any, states: torch.Tensor) -> torch.Tensor:
        found = product(states, linear_matrix(linear))
        return found if linear.bias is None else found + linear.bias.double()

    def gated(states: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return product(torch.nn.functional.silu(product(states, gate)) * product(states, up), down)

    def dense(states: torch.Tensor, mlp: Any) -> torch.Tensor:
        return gated(states, *(linear_matrix(each) for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))

    def normed(states: torch.Tensor, norm: Any) -> torch.Tensor:
        size = torch.rsqrt(states.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        return states * size * norm.weight.double()

    def in_heads(states: torch.Tensor, heads: int, norm: Any) -> torch.Tensor:
        split = states.view(rows, positions, heads, -1)
        if norm is not None:  # of each head (Qwen3-MoE), or of all of them together (OLMoE)
            each = len(norm.weight) == split.shape[-1]
            split = normed(split, norm) if each else normed(split.flatten(2), norm).view_as(split)
        return split.transpose(1, 2)

    def attended(attention: Any, states: torch.Tensor) -> torch.Tensor:
        many = config.num_attention_heads, *[config.num_key_value_heads] * 2
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "v_norm")]
        linears = attention.q_proj, attention.k_proj, attention.v_proj
        query, key, value = (
            in_heads(applied(linear, states), heads, norm)
            for linear, heads, norm in zip(linears, many, norms, strict=True)
        )
        query, key = apply_rotary_pos_emb(query, key, *tables)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return applied(attention.o_proj, mixed.transpose(1, 2).flatten(2).flatten(0, 1))

    def mixed(mlp: Any, states: torch.Tensor) -> torch.Tensor:
        weight, expert = (states @ mlp.gate.weight.double().T).softmax(-1).topk(config.num_experts_per_tok)
        if getattr(config, "norm_topk_prob", True):
            weight = weight / weight.sum(-1, keepdim=True)
        found = torch.zeros_like(states)
        for number, matrices in enumerate(expert_matrices(mlp.experts)):
            of, k = torch.where(expert == number)
            found[of] += gated(states[of], *matrices) * weight[of, k, None]
        if hasattr(mlp, "shared_expert"):
            share = (states @ linear_matrix(mlp.shared_expert_gate).double().T).sigmoid()
            found += dense(states, mlp.shared_expert) * share
        return found

    hidden = model.embed_tokens(token).flatten(0, 1).double()
    tables = [part.double() for part in model.rotary_emb(hidden.float(), torch.arange(positions)[None])]
    seen = []
    for layer in model.layers[:layers]:
        hidden = hidden + attended(layer.self_attn, normed(hidden, layer.input_layernorm))
        states = normed(hidden, layer.post_attention_layernorm)
        routed = hasattr(layer.mlp, "gate")
        if routed:
            seen.append(states)
        hidden = hidden + (mixed if routed else lambda mlp, states: dense(states, mlp))(layer.mlp, states)
    return seen


def assert_near_the_definition(loaded: LoadedModel, token: torch.Tensor, layers: int, most: float = 2e-2) -> None:
    """A few numbers may round to the other side in e4m3."""
    with torch.inference_mode():
        wanted = by_definition(loaded, token, layers)
    assert wanted
    for found, right in zip(router_inputs(loaded, token)[: len(wanted)], wanted, strict=True):
        apart = (found.double() - right).norm(dim=-1) / right.norm(dim=-1)
        assert apart.median() < 1e-5, "rounded at other places, or otherwise"
        assert apart.max() < most, "more than a few numbers fell to the other side"


@pytest.mark.parametrize("quantization", ["nf4", "fp8"])
def test_routers_see_what_products_in_e4m3_give_by_definition(quantization: str) -> None:
    loaded = load_model(tiny_checkpoint(), quantization=quantization, matmul="fp8", device="cpu")
    token = torch.randint(3, 32_000, (3, 17), generator=torch.Generator().manual_seed(3))
    assert_near_the_definition(loaded, token, 2)


def test_a_model_in_e4m3_is_near_the_model_and_two_runs_are_equal_to_the_bit() -> None:
    token = np.random.default_rng(0).integers(3, 32_000, (4, 64), dtype=np.int32)
    length = np.full(4, 64)

    def route(**how: str) -> dict[str, np.ndarray]:
        return dict(ModelEngine(load_model(tiny_checkpoint(), device="cpu", **how)).route(token, length))

    plain = route(quantization="none")
    stored, multiplied, again = (route(quantization="fp8", matmul=matmul) for matmul in ("bf16", "fp8", "fp8"))
    for one, most in ((stored, 0.06), (multiplied, 0.15)):
        differ = (np.sort(one["expert"], -1) != np.sort(plain["expert"], -1)).any(-1).mean()
        assert 0 < differ < most
    for name in ("expert", "weight"):
        np.testing.assert_array_equal(multiplied[name], again[name])


def test_the_bytes_told_are_those_of_one_byte_a_value_and_a_scale_a_row() -> None:
    loaded = load_model(tiny_checkpoint(), quantization="fp8", device="cpu")
    taken = sum(tensor.nbytes for tensor in [*loaded.model.parameters(), *loaded.model.buffers()])
    assert estimate_bytes(tiny_checkpoint(), quantization="fp8", device_type="cpu") == taken
    assert loaded.provenance["weight_bytes"] == taken
    assert loaded.provenance["quantized_expert_matrices"] == 8 * 8 * 3


def test_the_proof_of_capture_holds_in_fp8_no_false_alarm_and_no_other_batch_or_layer_passes() -> None:
    assert np.exp(2 * 2.0**-4) - 1 < WEIGHT_TOLERANCE, "two logits below 16, each a step of bfloat16 away"
    engine = ModelEngine(
        load_model(tiny_checkpoint(), quantization="nf4", matmul="fp8", dtype="bfloat16", device="cpu")
    )
    recorder, random = engine.recorder, np.random.default_rng(2)
    before: dict[int, Any] = {}
    with torch.inference_mode(), recorder.attached():
        for batch in range(4):
            token = torch.from_numpy(random.integers(3, 32_000, (4, 33)))
            faults = recorder.record(engine.forward, token, np.full(4, 33)).faults
            assert all((first == -1).all() for first in faults.values()), "a false alarm"
            own = dict(recorder._choices)
            planted = [dict(zip(own, [*list(own.values())[1:], own[0]], strict=True)), *[before] * bool(batch)]
            for recorder._choices in planted:
                assert (recorder._checked(torch.arange(4 * 33)).faults[OTHERS] >= 0).all(), "a planted fault passed"
            before = own


# --- Published checkpoints ------------------------------------------------------------------------------------------


def is_matrix(name: str) -> bool:
    return name.endswith(".weight") and ("_proj." in name or ".experts." in name)


def published(folder: Path, settings: dict[str, Any], scale_of: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The tiny model in published form: each matrix in e4m3 with its scale and one scale of activations."""
    shutil.copytree(tiny_checkpoint(), folder)
    places: dict[str, str] = {}
    for name in FILES:
        tensors = {}
        for leaf, tensor in load_file(folder / name).items():
            if is_matrix(leaf):
                scale = scale_of(tensor.float())
                values = (tensor.float() / scale.float().view(-1, 1)).to(torch.float8_e4m3fn)
                tensors |= {leaf: values, f"{leaf}_scale": scale}
                if settings.get("activation_scheme") == "static":
                    tensors[leaf.replace(".weight", ".input_scale")] = torch.tensor(0.5)
            else:
                tensors[leaf] = tensor
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    configure(folder, settings)
    return folder


def configure(folder: Path, settings: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))


def a_matrix(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.abs().max() / 448


def a_row(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix.abs().amax(-1, keepdim=True) / 448).bfloat16()


def compressed(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"g": {"weights": weights}},
    }


LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "compressed-tensors, a row": (compressed("channel"), a_row),
    "compressed-tensors, a matrix": (compressed("tensor"), lambda matrix: a_matrix(matrix).view(1)),
    "AutoFP8, static": ({"quant_method": "fp8", "activation_scheme": "static"}, a_matrix),
    "FBGEMM": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, lambda matrix: a_row(matrix).float()),
    "ModelOpt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, a_matrix),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_checkpoint_is_read_exactly_and_is_what_is_loaded_by_default(layout: str, tmp_path: Path) -> None:
    folder = published(tmp_path / "published", *LAYOUTS[layout])
    assert default_quantization(folder, None, "cpu") == "fp8"
    loaded = load_model(folder, quantization="fp8", device="cpu")
    stored = {name: tensor for file in FILES for name, tensor in load_file(folder / file).items()}
    experts, key = loaded.model.layers[2].mlp.experts, loaded.model.layers[7].self_attn.k_proj
    up = fp8.RowScaled(*(part[0, 256:] for part in experts.both.part(5, 6)))  # below gate's 256 rows
    matrices = {
        "model.layers.2.block_sparse_moe.experts.5.w3": up,
        "model.layers.2.block_sparse_moe.experts.6.w2": fp8.RowScaled(*(part[0] for part in experts.down.part(6, 7))),
        "model.layers.7.self_attn.k_proj": key.row_scaled,
    }
    for name, matrix in matrices.items():
        values, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"].float().view(-1, 1)
        assert torch.equal(matrix.values.view(torch.uint8), values.view(torch.uint8))
        assert torch.equal(matrix.scale, scale.expand(len(values), 1))
    assert torch.equal(key(torch.eye(key.in_features)).T, values.float() * scale)
    assert loaded.routers[0].weight.dtype == torch.float32
    token, length = np.arange(3, 35, dtype=np.int32)[None], np.array([32])
    assert ModelEngine(loaded).route(token, length)["expert"].shape == (1, 32, 8, 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 128]}, "blocks of"),
        ({"quant_method": "fp8"}, r"\(fp8\)"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"\(modelopt\)"),
        (compressed("block"), r"\(compressed-tensors\)"),
    ],
)
def test_other_scales_than_one_a_matrix_a_row_or_128_x_128_are_rejected_by_name(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint(), tmp_path / "m")
    configure(tmp_path / "m", settings)
    with pytest.raises(ValueError, match=rf"holds weights that are already quantized .*{said}"):
        load_model(tmp_path / "m", quantization="fp8", device="cpu")


def test_a_published_checkpoint_that_does_not_hold_what_is_asked_for_is_rejected(tmp_path: Path) -> None:
    folder = published(tmp_path / "m", *LAYOUTS["ModelOpt"])
    with pytest.raises(ValueError, match="holds fp8 weights, but quantization 'nf4' was requested"):
        load_model(folder, quantization="nf4", device="cpu")
    gate, key = "model.layers.3.block_sparse_moe.gate.weight", "model.layers.4.self_attn.k_proj.weight"
    kept = {name: load_file(folder / name) for name in FILES}

    def change(name: str, spoil: Spoil) -> None:
        for file, tensors in kept.items():
            changed = dict(tensors)
            if name in changed:
                spoil(changed)
            save_file(changed, folder / file, metadata={"format": "pt"})

    change(gate, lambda tensors: tensors.update({f"{gate}_scale": torch.tensor(1.0)}))
    with pytest.raises(ValueError, match=rf"1 matrices that must not be quantized, first {gate}"):
        load_model(folder, quantization="fp8", device="cpu")
    change(key, lambda tensors: tensors.pop(f"{key}_scale"))
    with pytest.raises(ValueError, match=rf"1 matrices that should be quantized, first {key}"):
        load_model(folder, quantization="fp8", device="cpu")
    change(key, lambda tensors: tensors.update({f"{key}_scale": torch.ones(3)}))
    with pytest.raises(
        ValueError, match=r"k_proj\.weight has scales of shape \(3,\), which is neither one scale nor one for each"
    ):
        load_model(folder, quantization="fp8", device="cpu")


# --- Where it cannot run --------------------------------------------------------------------------------------------


def test_what_cannot_be_multiplied_in_fp8_is_rejected_with_what_can(tmp_path: Path) -> None:
    tiny = tiny_checkpoint()
    cases = [
        ({"quantization": "none"}, "fp8 products are for weights in nf4, fp4 or fp8, but quantization is 'none'"),
        ({"quantization": "int8"}, "quantization is 'int8'"),
        ({"quantization": "nf4", "device_type": "cuda", "dtype": "float16"}, "use --dtype bfloat16"),
    ]
    for how, said in cases:
        with pytest.raises(ValueError, match=said):
            describe_model(tiny, matmul="fp8", **{"device_type": "cpu", **how})
    with pytest.raises(ValueError, match="matmul 'int4' is none of bf16, fp8"):
        describe_model(tiny, matmul="int4", device_type="cpu")
    shutil.copytree(tiny, tmp_path / "windowed")
    file = tmp_path / "windowed" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sliding_window": 16}))
    with pytest.raises(ValueError, match=r"--matmul fp8 needs a forward pass of this project .* MixtralModel in nf4"):
        describe_model(tmp_path / "windowed", matmul="fp8", device_type="cpu")


@pytest.mark.parametrize("how", [{"quantization": "fp8"}, {"quantization": "nf4", "matmul": "fp8"}])
def test_an_older_card_is_named_with_its_capability_and_the_one_needed(
    how: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or more .*, but NVIDIA A100 has 8\.0: use --matmul"):
        describe_model(tiny_checkpoint(), device_type="cuda", **how)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert describe_model(tiny_checkpoint(), device_type="cuda", **how)["quantization"] == how["quantization"]
