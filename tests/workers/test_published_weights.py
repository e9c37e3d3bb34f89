"""Weights of models published in MXFP4 and in e4m3 with a scale per block: read exactly, or quantized again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import checkpoint_of
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from store.identity import identity_of
from workers.engine import ModelEngine
from workers.models import fp8
from workers.models.checkpoint import find_checkpoint
from workers.models.description import describe_model
from workers.models.footprint import estimate_bytes, estimate_checkpoint, option_that_fits
from workers.models.loading import load_model
from workers.models.packed import PackedStack, StackBlocks, StackMxfp4
from workers.models.published import MX_VALUES, BlockScaled, Mxfp4, restored_matrix
from workers.models.stored import default_quantization

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GROUP = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": GROUP}}}
WIDE = {"hidden_size": 256, "intermediate_size": 128, "moe_intermediate_size": 128, "head_dim": 64}


def rewritten(folder: Path, settings: dict[str, Any], change: Callable[[str, torch.Tensor], dict[str, Any]]) -> Path:
    """A checkpoint with some tensors replaced, and its settings."""
    file = folder / "model.safetensors"
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(file).items():
        tensors |= change(name, tensor)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": settings}))
    return folder


def in_blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and the scales of blocks of 128 × 128, of a matrix that may end within one; by the published formula."""
    rows, columns = matrix.shape
    scale = torch.empty(-(-rows // 128), -(-columns // 128))
    values = torch.empty(rows, columns, dtype=fp8.E4M3)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            part = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            scale[row, column] = matrix[part].abs().max() / 448
            values[part] = (matrix[part] / scale[row, column]).to(fp8.E4M3)
    return values, scale


def by_transformers(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, by transformers' own writer."""
    settings = SimpleNamespace(weight_block_size=[128, 128], scale_fmt=None)
    found = Fp8Quantize(SimpleNamespace(quantization_config=settings)).convert({"m.weight": matrix})
    return found["m.weight"], found["m.weight_scale_inv"]


def is_quantized(name: str, tensor: torch.Tensor) -> bool:
    kept = ("gate.weight", "norm.weight", "embed_tokens.weight", "lm_head.weight")
    return tensor.ndim == 2 and not name.endswith(kept)


def with_blocks(folder: Path, settings: dict[str, Any], write: Any, suffix: str = "_scale_inv") -> Path:
    def change(name: str, tensor: torch.Tensor) -> dict[str, Any]:
        if not is_quantized(name, tensor):
            return {name: tensor}
        values, scale = write(tensor.float())
        return {name: values, f"{name}{suffix}": scale}

    return rewritten(folder, settings, change)


def gpt_oss(folder: Path) -> Path:
    """The published form of gpt-oss: codes of E2M1 and powers of two for the experts, everything else unchanged."""
    generator = torch.Generator().manual_seed(3)

    def change(name: str, tensor: torch.Tensor) -> dict[str, Any]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(121, 126, blocks.shape[:3], dtype=torch.uint8, generator=generator)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return rewritten(folder, {"quant_method": "mxfp4", "modules_to_not_convert": kept}, change)


def published_in(folder: Path) -> dict[str, Path]:
    """Each published form once: a matrix of deepseek_v3 ends within a block, as in the published one."""
    return {
        "gpt_oss": gpt_oss(checkpoint_of("gpt_oss", folder / "gpt_oss")),
        "qwen3_moe": with_blocks(checkpoint_of("qwen3_moe", folder / "qwen3", **WIDE), FP8, by_transformers),
        "compressed": with_blocks(
            checkpoint_of("qwen3_moe", folder / "compressed", **WIDE), COMPRESSED, in_blocks, "_scale"
        ),
        "deepseek_v3": with_blocks(checkpoint_of("deepseek_v3", folder / "v3", kv_lora_rank=192), FP8, in_blocks),
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return published_in(tmp_path_factory.mktemp("published"))


def plain_copy(folder: Path, published: Path) -> Path:
    """The checkpoint with each matrix dequantized to float32 by this file's own arithmetic."""
    shutil.copytree(published, folder)
    stored = load_file(folder / "model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith("_blocks"):
            codes = torch.stack([tensor & 15, tensor >> 4], dim=-1).flatten(-2)
            power = torch.exp2(stored[name.replace("_blocks", "_scales")].float() - 127)
            matrix = torch.tensor(MX_VALUES)[codes.long()] * power[..., None]
            tensors[name.removesuffix("_blocks")] = matrix.flatten(-2).mT.contiguous()
        elif tensor.dtype == fp8.E4M3:
            [scale] = (stored[f"{name}{suffix}"] for suffix in ("_scale_inv", "_scale") if f"{name}{suffix}" in stored)
            rows, columns = (torch.arange(size) // 128 for size in tensor.shape)
            tensors[name] = tensor.float() * scale.float()[rows][:, columns]
        elif not name.endswith(("_scales", "_scale", "_scale_inv")):
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_dequantized_as_transformers_does_it(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.arange(256, dtype=torch.uint8).repeat(16)[torch.randperm(4096, generator=generator)]
    blocks = blocks.view(2, 32, 4, 16)
    scales = torch.randint(1, 254, (2, 32, 4), dtype=torch.uint8, generator=generator)
    wanted = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=dtype).mT
    for number in range(2):
        found = restored_matrix(Mxfp4(blocks[number].view(1, 32, -1), scales[number][None]), dtype)
        assert torch.equal(found, wanted[number])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_dequantized_as_transformers_does_it(scale_dtype: torch.dtype) -> None:
    values, scale = by_transformers(torch.randn(256, 384))
    scale = scale.to(scale_dtype)
    for dtype in (torch.float32, torch.bfloat16):
        wanted = Fp8Dequantize(None)._dequantize_one(values, scale, dtype)
        assert torch.equal(restored_matrix(BlockScaled(values[None], scale.float()[None]), dtype), wanted)


def stacks_of(model: Any) -> dict[str, PackedStack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedStack)}


@pytest.mark.parametrize(
    ("name", "quantization", "stack"),
    [
        ("gpt_oss", "mxfp4", StackMxfp4),
        ("qwen3_moe", "fp8", StackBlocks),
        ("compressed", "fp8", StackBlocks),
        ("deepseek_v3", "fp8", StackBlocks),
    ],
)
@torch.inference_mode()
def test_a_published_checkpoint_is_held_as_it_is_and_computes_as_its_dequantized_copy(
    name: str, quantization: str, stack: type, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = checkpoints[name]
    assert default_quantization(folder, None, "cuda") == default_quantization(folder, None, "cpu") == quantization
    loaded, plain = (load_model(path, quantization=how, device="cpu") for path, how in (
        (folder, quantization), (plain_copy(tmp_path / "plain", folder), "none")
    ))  # fmt: skip
    stacks = stacks_of(loaded.model)
    assert {type(each) for each in stacks.values()} == {stack}
    for place, each in stacks.items():
        experts, _, leaf = place.rpartition(".")
        found = torch.empty(each.experts, each.rows, each.columns)
        each.restore(0, each.experts, found)
        fused = plain.model.get_submodule(experts)
        wanted = fused.gate_up_proj if leaf == "both" else fused.down_proj
        assert torch.equal(found, wanted.mT if each.transposed else wanted)
    for place, module in loaded.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            matrix = torch.empty(module.weight.shape)
            restore = getattr(module, "restore", matrix.copy_)
            restore(matrix if hasattr(module, "restore") else module.weight)
            assert torch.equal(matrix, plain.model.get_submodule(place).weight)
    assert loaded.provenance["weight_bytes"] == estimate_bytes(folder, None, quantization, "cpu")
    token, length = np.arange(3, 67, dtype=np.int32).reshape(2, 32) % 128, np.array([32, 20])
    ours, theirs = (ModelEngine(each).route(token, length) for each in (loaded, plain))
    filled = np.arange(32) < length[:, None]
    same = (ours["expert"] == theirs["expert"]).all(-1)[filled]
    assert same.mean() > 0.98, "but for near-ties"
    weights = (np.abs(ours["weight"].astype(float) - theirs["weight"].astype(float)).max(-1)[filled])[same]
    assert weights.max() < 2e-3


@torch.inference_mode()
def test_published_weights_are_quantized_again_to_nf4_from_what_they_stand_for(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("gpt_oss", "deepseek_v3"):
        plain = plain_copy(tmp_path / name, checkpoints[name])
        again, wanted = (load_model(path, quantization="nf4", device="cpu") for path in (checkpoints[name], plain))
        for place, stack in stacks_of(wanted.model).items():
            for leaf, tensor in stack.named_buffers():
                assert torch.equal(again.model.get_submodule(place).get_buffer(leaf), tensor), (place, leaf)
        matrices = dict(wanted.model.named_modules())
        linears = [place for place, module in matrices.items() if type(module).__name__ == "Linear4bit"]
        assert linears
        for place in linears:
            weight = again.model.get_submodule(place).weight
            assert torch.equal(weight.data, matrices[place].weight.data)
            assert torch.equal(weight.quant_state.absmax, matrices[place].weight.quant_state.absmax)
        described = again.provenance
        assert (described["quantization"], described["weight_scales"]) == ("nf4", "row")
        assert "weight_scales" not in identity_of(described)


@torch.inference_mode()
def test_products_in_fp8_have_blocks_quantized_again_by_row_and_say_so(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["qwen3_moe"]
    kept, again = (load_model(folder, quantization="fp8", matmul=matmul, device="cpu") for matmul in ("bf16", "fp8"))
    for place, stack in stacks_of(kept.model).items():
        whole = torch.empty(stack.experts, stack.rows, stack.columns)
        stack.restore(0, stack.experts, whole)
        found = again.model.get_submodule(place).part(0, stack.experts)
        wanted = fp8.rounded(whole.flatten(0, 1))
        assert torch.equal(found.values.view(torch.uint8).flatten(0, 1), wanted.values.view(torch.uint8))
        assert torch.equal(found.scale.flatten(0, 1), wanted.scale)
    said = [identity_of(each.provenance)["weight_scales"] for each in (kept, again)]
    assert said == ["128x128", "row of 128x128"]
    token, length = np.arange(3, 67, dtype=np.int32).reshape(2, 32) % 128, np.array([32, 32])
    one, other = (ModelEngine(each).route(token, length)["expert"] for each in (kept, again))
    assert 0.5 < (np.sort(one) == np.sort(other)).all(-1).mean() < 1


def test_the_identity_tells_apart_what_differs_and_leaves_alone_what_does_not(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    plain = checkpoint_of("qwen3_moe", tmp_path / "plain")
    by_row = describe_model(plain, quantization="fp8", device_type="cpu")
    assert "weight_scales" not in identity_of(by_row)
    blocks = describe_model(checkpoints["qwen3_moe"], quantization="fp8", device_type="cpu")
    assert identity_of(blocks)["weight_scales"] == "128x128"


def test_a_card_that_is_too_small_for_weights_in_fp8_is_told_that_they_fit_in_nf4(checkpoints: dict[str, Path]) -> None:
    checkpoint = find_checkpoint(checkpoints["qwen3_moe"], None, weights=False)
    free = int(0.9 * estimate_checkpoint(checkpoint, "fp8", torch.bfloat16))
    assert option_that_fits(checkpoint, "fp8", torch.bfloat16, free).startswith("--quantization nf4, which takes")


@pytest.mark.parametrize(
    ("name", "quantization", "said"),
    [
        ("gpt_oss", "int8", "holds mxfp4 weights, but quantization 'int8' was requested: use 'mxfp4' or 'nf4', in"),
        ("gpt_oss", "fp8", "holds mxfp4 weights, but quantization 'fp8'"),
        ("qwen3_moe", "none", "holds fp8 weights, but quantization 'none' was requested: use 'fp8' or 'nf4', in"),
        ("qwen3_moe", "mxfp4", "holds fp8 weights, but quantization 'mxfp4'"),
    ],
)
def test_what_published_weights_are_not_made_into_is_rejected(
    name: str, quantization: str, said: str, checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match=said):
        load_model(checkpoints[name], quantization=quantization, device="cpu")


def test_nothing_is_made_into_mxfp4_and_its_products_are_not_in_fp8(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="mxfp4 is only supported for models"):
        load_model(checkpoint_of("gpt_oss", tmp_path / "plain"), quantization="mxfp4", device="cpu")
    with pytest.raises(ValueError, match="fp8 products are for weights in nf4, fp4 or fp8, but quan"):
        load_model(checkpoints["gpt_oss"], quantization="mxfp4", matmul="fp8", device="cpu")


GATE, SCALES = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.self_attn.k_proj.weight_scale_inv"


@pytest.mark.parametrize(
    ("name", "tensor", "spoil", "said"),
    [
        ("gpt_oss", f"{GATE}_blocks", lambda part: part[:, :, :1], "has blocks of torch.uint8"),
        ("gpt_oss", f"{GATE}_scales", lambda part: part.float(), "scales of torch.float32"),
        ("gpt_oss", f"{GATE}_scales", lambda part: None, "layers.1.mlp.experts.both has 0 matrices"),
        ("qwen3_moe", SCALES, lambda part: part.mT, r"k_proj.weight has scales of torch.float32 \(2, 1\), not"),
        ("qwen3_moe", SCALES, lambda part: part.to(torch.uint8), "k_proj.weight has scales of torch.uint8"),
        ("qwen3_moe", SCALES, lambda part: None, "should be quantized, first model.layers.0.self_attn.k_proj.weight"),
    ],
)
def test_a_published_checkpoint_that_is_not_whole_is_rejected_with_the_name(
    name: str, tensor: str, spoil: Any, said: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoints[name], tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    assert tensor in tensors
    spoiled = spoil(tensors.pop(tensor))
    save_file(tensors | ({} if spoiled is None else {tensor: spoiled.contiguous()}), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path / "m", quantization=default_quantization(tmp_path / "m", None, "cpu"), device="cpu")
