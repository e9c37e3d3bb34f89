"""Experts are put into the tensors of their layer while a checkpoint is read, for every layout of the checkpoint."""

import json
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_families import checkpoint_of
from test_loading import rounded_reference
from torch import nn

from workers.models import saving, stacking
from workers.models.checkpoint import INDEX, tensor_names
from workers.models.footprint import estimate_bytes
from workers.models.loading import load_model
from workers.models.saving import quantize_checkpoint

IDS = torch.arange(96).view(3, 32)
SPECIAL = {"gpt_oss": 3 * 16 * 2, "granitemoe": 3 * 16 * 3}
"""Families whose checkpoints keep experts in one tensor, and their matrices: gpt-oss has gate and up as one."""


@torch.inference_mode()
def states(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).last_hidden_state


def in_nf4(matrix: torch.Tensor) -> torch.Tensor:
    packed = bitsandbytes.functional.quantize_4bit(
        matrix.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return bitsandbytes.functional.dequantize_4bit(*packed)


def in_e4m3(matrix: torch.Tensor) -> torch.Tensor:
    scale = matrix.abs().amax(1, keepdim=True) / 448
    return (matrix / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize(("quantization", "rounded"), [("nf4", in_nf4), ("fp8", in_e4m3)])
@pytest.mark.parametrize("name", SPECIAL)
def test_experts_with_biases_or_a_gate_of_their_own_compute_what_their_dequantized_matrices_compute(
    name: str, quantization: str, rounded: Any, tmp_path: Path
) -> None:
    folder = checkpoint_of(name, tmp_path)
    loaded = load_model(folder, quantization=quantization, device="cpu")
    assert loaded.provenance["quantized_expert_matrices"] == SPECIAL[name]
    got = states(loaded.model)
    torch.testing.assert_close(got, states(rounded_reference(folder, rounded)), rtol=1e-4, atol=1e-4)
    plain = states(load_model(folder, quantization="none", device="cpu").model)
    assert not torch.allclose(got, plain, atol=1e-2), "the matrices were not quantized at all"


@pytest.mark.parametrize("name", SPECIAL)
def test_int8_refuses_them_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"(?i){name.replace('_', '')}Model has .*one tensor .* int8 does not support"
    ):
        load_model(checkpoint_of(name, tmp_path), quantization="int8", device="cpu")


def equal(one: nn.Module, other: nn.Module) -> None:
    wanted, got = one.state_dict(), other.state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    assert torch.equal(states(one), states(other))


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny families have 16 experts per layer; treat these as many."""
    monkeypatch.setattr(saving, "PUBLISHED", 8)


@pytest.mark.parametrize(("name", "kind"), [("qwen3_moe", "nf4"), ("qwen3_moe", "fp4"), ("gpt_oss", "nf4")])
@pytest.mark.usefixtures("many")
def test_a_packed_checkpoint_loads_as_its_original_does(name: str, kind: str, tmp_path: Path) -> None:
    folder = quantize_checkpoint(checkpoint_of(name, tmp_path / "own"), tmp_path / "q", quantization=kind, device="cpu")
    experts = {tensor for tensor in tensor_names(folder) if ".experts." in tensor and not tensor.endswith("_bias")}
    parts = ("packed", "scale", "step", "offset", "code", "scale_code")
    layers = (0, 2) if name == "qwen3_moe" else (0, 1, 2)
    assert experts == {
        f"model.layers.{layer}.mlp.experts.{stack}.{part}"
        for layer in layers for stack in ("both", "down") for part in parts
    }  # fmt: skip
    original, packed = (load_model(tmp_path / at, quantization=kind, device="cpu") for at in ("own", "q"))
    equal(original.model, packed.model)
    different = {field for field, value in original.provenance.items() if packed.provenance[field] != value}
    assert different == {"model", "model_revision", "quantized_from"}


def spread(folder: Path) -> None:
    """The tensors of a checkpoint over three files, those of a layer's experts over all of them."""
    tensors = load_file(folder / "model.safetensors")
    places = {name: f"model-{at % 3}.safetensors" for at, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        held = {name: tensors[name] for name in tensors if places[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


@pytest.mark.usefixtures("many")
def test_a_layer_that_is_spread_over_files_is_packed_whole(tmp_path: Path) -> None:
    one, other = checkpoint_of("olmoe", tmp_path / "one"), checkpoint_of("olmoe", tmp_path / "other")
    spread(other)
    for folder in (one, other):
        quantize_checkpoint(folder, folder.with_suffix(".q"), device="cpu")
    equal(*(load_model(folder.with_suffix(".q"), device="cpu").model for folder in (one, other)))


def test_matrices_written_one_by_one_load_as_their_original_does(tmp_path: Path) -> None:
    folder = quantize_checkpoint(checkpoint_of("olmoe", tmp_path / "own"), tmp_path / "q", device="cpu")
    assert "model.layers.0.mlp.experts.15.down_proj.weight.absmax" in tensor_names(folder)
    equal(*(load_model(tmp_path / at, device="cpu").model for at in ("own", "q")))


@pytest.mark.usefixtures("many")
def test_a_packed_checkpoint_that_is_not_whole_or_not_what_was_asked_for_is_refused(tmp_path: Path) -> None:
    folder = quantize_checkpoint(checkpoint_of("qwen3_moe", tmp_path / "own"), tmp_path / "q", device="cpu")
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    assert method == "bitsandbytes_packed_experts"
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # the first is quantized attention
        transformers.AutoModel.from_pretrained(folder)
    for asked in ("fp4", "fp8", "none"):
        with pytest.raises(ValueError, match=f"holds nf4 weights, but quantization '{asked}' was requested"):
            load_model(folder, quantization=asked, device="cpu")
    file, name = folder / "model.safetensors", "model.layers.2.mlp.experts.down."
    tensors = load_file(file)
    for part, edit, words in (
        ("scale", None, r"1 missing_keys: layers\.2\.mlp\.experts\.down\.scale"),
        ("packed", None, r"of the matrices .* not in the checkpoint: layers\.2\.mlp\.experts\.0\.down_proj"),
        ("offset", torch.zeros(15), r"1 mismatched_keys: .*layers\.2\.mlp\.experts\.down\.offset"),
        (
            "packed",
            tensors[f"{name}packed"].short(),
            r"layers\.2\.mlp\.experts\.down\.packed is torch\.int16 on cpu, not torch\.uint8",
        ),
    ):
        held = {other: tensor for other, tensor in tensors.items() if other != name + part}
        save_file(held | ({} if edit is None else {name + part: edit}), file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            load_model(folder, device="cpu")
    save_file(tensors, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated or overwritten"):
        load_model(folder, device="cpu")


def test_a_matrix_of_another_shape_with_as_many_values_is_refused_by_its_name(tmp_path: Path) -> None:
    checkpoint_of("olmoe", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file(tensors | {name: tensors[name].view(32, 128)}, tmp_path / "model.safetensors", {"format": "pt"})
    words = r"layers\.1\.mlp\.experts\.both.*experts\.3\.up_proj.* of shape \(32, 128\), not \(64, 64\)"
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.usefixtures("many")
def test_each_matrix_is_let_go_before_the_next_one_is_quantized(
    written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def counted(matrix: torch.Tensor, quantization: str) -> Any:
        nonlocal most
        seen.append(weakref.ref(matrix))
        most = max(most, sum(other() is not None for other in seen))
        return quantized(matrix, quantization)

    quantized = stacking.quantized
    monkeypatch.setattr(stacking, "quantized", counted)
    folder = checkpoint_of("qwen3_moe", tmp_path / "own")
    if written:
        quantize_checkpoint(folder, tmp_path / "q", device="cpu")
    else:
        load_model(folder, device="cpu")
    assert len(seen) == 2 * 16 * 3
    assert most <= (2 if written else 1)  # for writing, tensors are first read into the host's memory


def test_experts_that_compute_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint_of("olmoe", tmp_path)
    experts = transformers.models.olmoe.modeling_olmoe.OlmoeExperts
    own = experts.__init__

    def with_a_norm(self: Any, *arguments: Any) -> None:
        own(self, *arguments)
        self.has_post_expert_norm = True

    monkeypatch.setattr(experts, "__init__", with_a_norm)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts \(OlmoeExperts\) .* use --quantization none"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("mixtral", "nf4"),
        ("mixtral", "fp8"),
        ("qwen3_moe", "nf4"),
        ("qwen3_moe", "fp8"),
        ("olmoe", "fp4"),
        ("gpt_oss", "nf4"),
        ("gpt_oss", "fp8"),
    ],
)
def test_the_bytes_told_are_those_that_the_loaded_model_takes(name: str, quantization: str, tmp_path: Path) -> None:
    folder = checkpoint_of(name, tmp_path)
    model = load_model(folder, quantization=quantization, device="cpu").model
    resident = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        resident += tensor.untyped_storage().nbytes()
        if (state := getattr(tensor, "quant_state", None)) is not None:
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            resident += sum(part.nbytes for part in parts)
    assert estimate_bytes(folder, None, quantization, "cpu") == resident
