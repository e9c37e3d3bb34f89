"""Loading: the loaded model is the requested one, or an error names the difference."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
import transformers
from fake_hub import COMMIT, TOKEN, FakeHub
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from workers.engine import ModelEngine
from workers.models import quantizer, quantizers
from workers.models.checkpoint import Checkpoint, find_checkpoint, fingerprint, tensor_names
from workers.models.description import build_skeleton
from workers.models.experts import PackedExperts
from workers.models.footprint import estimate_bytes, estimate_checkpoint
from workers.models.kernels import dequantize
from workers.models.loading import LoadedModel, describe_model, layer_devices, load_model
from workers.models.saving import quantize_checkpoint
from workers.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
LAYERS, EXPERTS = 8, 8  # of the tiny Mixtral
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
IDS = torch.arange(0, 32_000, 320)[None]  # 100 tokens


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def fused(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in the layout that transformers 5 has in memory: two tensors for all experts of a layer."""
    folder = tmp_path_factory.mktemp("models") / "fused"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model.save_pretrained(folder, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensor_names(folder)
    return folder


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that tests may damage."""
    return shutil.copytree(tiny, tmp_path / "broken")


@pytest.fixture(scope="module")
def nf4(tiny: Path) -> LoadedModel:
    return load_model(tiny, quantization="nf4", device="cpu")


@torch.inference_mode()
def hidden_states(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).last_hidden_state


@torch.inference_mode()
def dequantized_reference(folder: Path, kind: str) -> nn.Module:
    """transformers' own model in float32, each matrix quantized and dequantized one by one.

    Shares no code with this project: stock loader, fused experts, stock forward pass.
    """

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        packed = bitsandbytes.functional.quantize_4bit(
            matrix.contiguous(), blocksize=64, compress_statistics=True, quant_type=kind
        )
        return bitsandbytes.functional.dequantize_4bit(*packed)

    return rounded_reference(folder, rounded)


@torch.inference_mode()
def rounded_reference(folder: Path, rounded: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """transformers' own model in float32; each matrix is rounded as (outputs, inputs), in either layout."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    for module in model.modules():
        if type(module) is nn.Linear:  # a router can be a subclass of Linear
            module.weight.copy_(rounded(module.weight))
        if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):  # some dense layers have a Linear
            for both, down in zip(module.gate_up_proj, module.down_proj, strict=True):
                both, down = (each.T if module.is_transposed else each for each in (both, down))
                for matrix in (*both.chunk(2 if module.is_concatenated else 1), down):
                    matrix.copy_(rounded(matrix))
    return model


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_4_bit_model_computes_what_its_dequantized_matrices_compute_in_float32(tiny: Path, kind: str) -> None:
    loaded = load_model(tiny, quantization=kind, device="cpu")
    got, wanted = hidden_states(loaded.model), hidden_states(dequantized_reference(tiny, kind))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(got, hidden_states(loaded.model))
    unquantized = hidden_states(load_model(tiny, quantization="none", device="cpu").model)
    assert not torch.allclose(got, unquantized, atol=1e-2), "the matrices were not quantized at all"


def test_every_expert_matrix_is_nf4_with_double_quantization_and_no_router_is(nf4: LoadedModel, tiny: Path) -> None:
    stored = load_file(tiny / FIRST) | load_file(tiny / SECOND)
    found = 0
    for number, layer in enumerate(nf4.model.layers):
        for stack, leaves in (layer.mlp.experts.both, ("w1", "w3")), (layer.mlp.experts.down, ("w2",)):
            rows = stack.rows // len(leaves)
            ours, matrices = torch.empty(EXPERTS * stack.rows, stack.columns), stack.part(0, EXPERTS)
            dequantize(matrices, ours)
            names = [f"block_sparse_moe.experts.{expert}.{leaf}" for expert in range(EXPERTS) for leaf in leaves]
            for place, (name, part) in enumerate(zip(names, ours.split(rows), strict=True)):
                matrix = stored[f"model.layers.{number}.{name}.weight"].float()
                packed, state = bitsandbytes.functional.quantize_4bit(
                    matrix, blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                assert torch.equal(matrices.packed[place], packed.flatten()), name
                assert torch.equal(part, bitsandbytes.functional.dequantize_4bit(packed, state)), name
                found += 1
    assert found == LAYERS * EXPERTS * 3 == nf4.provenance["quantized_expert_matrices"]
    for layer, router in nf4.routers.items():
        assert torch.equal(router.weight, stored[f"model.layers.{layer}.block_sparse_moe.gate.weight"].float())
    assert not nf4.model.training
    assert not any(parameter.requires_grad for parameter in nf4.model.parameters())
    assert not any("lm_head" in name for name, _ in nf4.model.named_parameters())


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_gates_are_rounded_too_where_that_is_asked_and_nothing_else_changes(tiny: Path, kind: str) -> None:
    kept, rounded = (
        load_model(tiny, quantization=kind, dtype="float16", quantize_gates=gates, device="cpu")
        for gates in (False, True)
    )
    different = {name for name, value in kept.provenance.items() if rounded.provenance[name] != value}
    assert different == {"gate_precision"}
    assert (kept.provenance["gate_precision"], rounded.provenance["gate_precision"]) == ("float16", kind)
    gates = {f"layers.{layer}.mlp.gate.weight" for layer in range(LAYERS)}
    after = rounded.model.state_dict()
    for name, tensor in kept.model.state_dict().items():
        if name not in gates:
            assert torch.equal(after[name], tensor), name
            continue
        linear = bitsandbytes.nn.Linear4bit(64, 8, bias=False, compute_dtype=torch.float16, quant_type=kind)
        linear.load_state_dict({"weight": tensor})
        states = torch.eye(64, dtype=torch.float16)
        assert torch.equal(after[name].T, linear.to("cpu")(states))
        assert not torch.equal(after[name], tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_it_computes_in_the_dtype_asked_for(tiny: Path, dtype: str, quantization: str) -> None:
    loaded = load_model(tiny, quantization=quantization, dtype=dtype, device="cpu")
    described = describe_model(tiny, quantization=quantization, device_type="cpu", dtype=dtype)
    assert {name: loaded.provenance[name] for name in described} == described
    assert described["compute_dtype"] == described["gate_precision"] == dtype
    assert hidden_states(loaded.model).dtype == getattr(torch, dtype)
    held = sum(parameter.nbytes for parameter in loaded.model.parameters() if type(parameter) is nn.Parameter)
    assert held >= (4 if dtype == "float32" else 2) * 32_000 * 64
    token, length = np.arange(100, dtype=np.int32)[None], np.array([100], np.int32)
    experts, weights = ModelEngine(loaded).route(token, length).values()
    assert experts.shape == weights.shape == (1, 100, LAYERS, 2)


def test_int8_quantizes_the_experts_too_and_stays_near_the_unquantized_model(tiny: Path) -> None:
    loaded = load_model(tiny, quantization="int8", device="cpu")
    found = [p for name, p in loaded.model.named_parameters() if ".experts." in name and name.endswith(".weight")]
    assert len(found) == LAYERS * EXPERTS * 3
    assert {parameter.dtype for parameter in found} == {torch.int8}
    # One layer on the same input: over eight layers a few tokens choose other experts and end up elsewhere.
    plain = load_model(tiny, quantization="none", device="cpu").model.layers[0]
    states = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got, wanted = loaded.model.layers[0].mlp(states), plain.mlp(states)
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.03


def test_unquantized_equals_the_stock_model(tiny: Path) -> None:
    loaded = load_model(tiny, quantization="none", device="cpu")
    stock = transformers.AutoModel.from_pretrained(tiny, dtype=torch.float32, experts_implementation="eager")
    assert torch.equal(hidden_states(loaded.model), hidden_states(stock))


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_a_checkpoint_with_fused_experts_loads_as_the_original_does(tiny: Path, fused: Path, quantization: str) -> None:
    wanted, got = (
        load_model(folder, quantization=quantization, device="cpu").model.state_dict() for folder in (tiny, fused)
    )
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():  # including scales: a quantized matrix has them in its state
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def test_a_checkpoint_with_fused_experts_is_not_written_in_4_bits(fused: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="experts of a layer as one tensor"):
        quantize_checkpoint(fused, tmp_path / "nf4", device="cpu")


def test_fused_experts_of_another_number_are_refused(fused: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fused, tmp_path / "fused")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    save_file(tensors | {name: tensors[name][:7].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down has 7 matrices .* but 8 in the conf"):
        load_model(folder, quantization="nf4", device="cpu")


def unfused(num_experts: int, hidden: int, inner: int) -> quantizer.UnfusedExperts:
    fused = nn.Module()
    fused.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))
    fused.act_fn = nn.SiLU()
    experts = quantizer.UnfusedExperts(fused, quantizer.ExpertLeaves("w1", "w3", "w2")).to_empty(device="cpu")
    torch.manual_seed(1)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def test_unfused_experts_mix_as_a_loop_over_tokens_does_and_skip_experts_without_tokens() -> None:
    experts = unfused(num_experts=6, hidden=8, inner=12)
    tokens, choices = 40, 3
    random = np.random.default_rng(2)
    states = random.normal(size=(tokens, 8))
    chosen = np.stack([random.permutation(5)[:choices] for _ in range(tokens)])  # never expert 5
    weights = random.random((tokens, choices))
    wanted = np.zeros_like(states)
    for token in range(tokens):
        for choice in range(choices):
            w1, w3, w2 = (p.detach().double().numpy() for p in experts[chosen[token, choice]].parameters())
            gate = w1 @ states[token]
            wanted[token] += weights[token, choice] * (w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ states[token])))
    ran: list[int] = []
    for number, expert in enumerate(experts):
        expert.register_forward_hook(lambda *_, number=number: ran.append(number))
    with torch.inference_mode():
        got = experts(torch.tensor(states).float(), torch.tensor(chosen), torch.tensor(weights).float())
    np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4, atol=1e-5)
    assert ran == [0, 1, 2, 3, 4]


def test_what_is_described_beforehand_is_what_is_loaded(tiny: Path, nf4: LoadedModel) -> None:
    described = describe_model(tiny, quantization="nf4", device_type="cpu")
    assert {name: nf4.provenance[name] for name in described} == described
    assert described["layers"] == list(nf4.routers) == list(range(LAYERS))
    # compared with the loaded modules, not with this project's own statements
    router = nf4.routers[5]
    assert router is nf4.model.layers[5].mlp.gate
    assert router.weight.shape[0] == described["num_experts"] == len(nf4.model.layers[0].mlp.experts)
    assert router.top_k == described["experts_per_token"]
    assert str(router.weight.dtype) == f"torch.{described['gate_precision']}"
    assert nf4.model.embed_tokens.num_embeddings == described["vocab_size"]
    assert nf4.model.config._attn_implementation == described["attention"]
    assert isinstance(nf4.model.layers[0].mlp.experts, PackedExperts)
    json.dumps(nf4.provenance)


def test_the_device_decides_dtype_and_back_end(tiny: Path) -> None:
    def values(*arguments: str) -> tuple[str, str]:
        described = describe_model(tiny, None, *arguments)
        return described["compute_dtype"], described["expert_backend"]

    assert values("nf4", "cuda") == ("bfloat16", "sorted")
    assert values("none", "cuda") == ("bfloat16", "grouped_mm")
    assert values("none", "cpu") == ("float32", "eager")
    backend = load_model(tiny, quantization="none", device="cpu").model.config._experts_implementation
    assert backend == "eager"


@pytest.mark.parametrize("named", ["eager", "flash_attention_2"])
def test_an_attention_that_a_checkpoint_names_has_no_say(broken: Path, named: str) -> None:
    configure(_attn_implementation=named)(broken)
    loaded = load_model(broken, quantization="none", device="cpu")
    assert loaded.model.config._attn_implementation == loaded.provenance["attention"] == "sdpa"


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_the_bytes_told_are_the_bytes_that_the_weights_take(tiny: Path, quantization: str) -> None:
    model = load_model(tiny, quantization=quantization, device="cpu").model
    resident = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        resident += tensor.nbytes
        if (state := getattr(tensor, "quant_state", None)) is not None:
            parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            resident += sum(part.nbytes for part in parts)
        if quantization == "int8" and (scales := getattr(tensor, "SCB", None)) is not None:
            resident += scales.nbytes
    assert estimate_bytes(tiny, None, quantization, "cpu") == resident


def test_the_bytes_of_mixtral_8x7b_follow_from_its_published_parameter_count(tmp_path: Path) -> None:
    transformers.MixtralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_key_value_heads=8,
        vocab_size=32_000,
    ).save_pretrained(tmp_path)
    checkpoint = Checkpoint(folder=tmp_path, model="mixtral", revision="none")
    head = embedding = 32_000 * 4096
    loaded = 46_702_792_704 - head
    assert estimate_checkpoint(checkpoint, "none", torch.bfloat16) == pytest.approx(2 * loaded, abs=10_000)
    quantized = loaded - embedding  # except the norms and gates: 1.3 million
    scaled = quantized * (1 / 2 + 1 / 64 + 4 / 64 / 256)
    assert estimate_checkpoint(checkpoint, "nf4", torch.bfloat16) == pytest.approx(scaled + 2 * embedding, rel=1e-3)


def test_a_card_too_small_is_told_before_anything_is_loaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = estimate_bytes(tiny, None, "nf4", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (needed - 1, 10 * needed))
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=rf"needs {needed:,} bytes .* cuda:0 has {needed - 1:,} free"):
        load_model(tiny, quantization="nf4", device="cuda:0")


# Possible faults of a folder: how to create them, and what the error must say.


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def cut(folder: Path) -> None:
    file = folder / SECOND
    os.truncate(file, file.stat().st_size - 1000)


def cut_in_header(folder: Path) -> None:
    os.truncate(folder / SECOND, 100)


def change(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Edit the tensors of the first file."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / FIRST)
        edit(tensors)
        save_file(tensors, folder / FIRST, metadata={"format": "pt"})

    return apply


def configure(**settings: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))

    return apply


def only_pickles(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")


MOE = "model.layers.1.block_sparse_moe"
FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no config": (drop("config.json"), ["no config.json", "tokenizer.json"]),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), ["config.json is not JSON"]),
    "file missing": (drop(SECOND), ["lacks 1 of the 2 weight files", SECOND]),
    "file cut": (cut, [SECOND, "promises 4632504 bytes", "it has 4631504"]),
    "header cut": (cut_in_header, [SECOND, "it has 100 bytes"]),
    "pickles": (only_pickles, ["only safetensors", "pytorch_model.bin"]),
    "expert incomplete": (
        change(lambda tensors: tensors.pop(f"{MOE}.experts.2.w2.weight")),
        ["lacks 1 of the 192 expert tensors", f"{MOE}.experts.2.w2.weight"],
    ),
    "tensor missing": (
        change(lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight")),
        ["1 missing_keys: layers.1.self_attn.k_proj.weight", f"transformers {transformers.__version__}"],
    ),
    "tensor left over": (
        change(lambda tensors: tensors.update({"model.layers.1.bias": torch.ones(3)})),
        ["1 unexpected_keys", "layers.1.bias"],
    ),
    "other shape": (
        change(lambda tensors: tensors.update({f"{MOE}.gate.weight": torch.ones(7, 64)})),
        ["1 mismatched_keys", "layers.1.mlp.gate.weight", "[7, 64]", "[8, 64]"],
    ),
    "experts that differ": (
        change(lambda tensors: tensors.update({f"{MOE}.experts.2.w2.weight": torch.ones(64, 100)})),
        [f"transformers {transformers.__version__}"],
    ),
    "quantized already": (
        configure(quantization_config={"load_in_4bit": True}),
        ["weights that are already quantized", "supported are those of bitsandbytes in nf4 or fp4"],
    ),
    "unknown type": (configure(model_type="mixtral2"), ["cannot build", "config.json", "mixtral2"]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_broken_checkpoint_is_refused_with_folder_and_fault(broken: Path, fault: str, quantization: str) -> None:
    spoil, words = FAULTS[fault]
    spoil(broken)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the words are checked below)
        load_model(broken, quantization=quantization, device="cpu")
    for word in [str(broken), *words]:
        assert word in str(refusal.value)


def test_a_load_that_skips_the_experts_silently_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = dict(AUTO_QUANTIZER_MAPPING)
    for kind in ("bitsandbytes_4bit", "bitsandbytes_8bit"):
        monkeypatch.setitem(quantizers.OURS, kind, stock[kind])
    for quantization in ("nf4", "int8"):
        with pytest.raises(ValueError, match=r"16 tensors, first layers\.0\.mlp\.experts\.gate_up_proj is a Param"):
            load_model(tiny, quantization=quantization, device="cpu")


def test_a_quantized_router_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_gates(folder: Path, **settings: Any) -> tuple[nn.Module, dict[str, set[str]]]:
        model, report = original(folder, **settings)
        model.layers[4].mlp.gate.half()
        return model, report

    original = transformers.AutoModel.from_pretrained
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", half_gates)
    with pytest.raises(ValueError, match=r"layers\.4\.mlp\.gate\.weight is torch\.float16, not float32"):
        load_model(tiny, quantization="nf4", device="cpu")


def test_transformers_own_quantizers_are_back_after_a_load_and_after_a_failed_one(tiny: Path, broken: Path) -> None:
    stock = dict(AUTO_QUANTIZER_MAPPING)
    verbosity = transformers.logging.get_verbosity()
    load_model(tiny, quantization="nf4", device="cpu")
    assert stock == AUTO_QUANTIZER_MAPPING
    FAULTS["tensor missing"][0](broken)
    with pytest.raises(ValueError, match="missing_keys"):
        load_model(broken, quantization="nf4", device="cpu")
    assert stock == AUTO_QUANTIZER_MAPPING
    assert transformers.logging.get_verbosity() == verbosity


def test_arguments_that_cannot_be_met_are_refused_with_what_would_do(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="'q4' is none of nf4, fp4, mxfp4, fp8, int8, none"):
        load_model(tiny, quantization="q4", device="cpu")
    with pytest.raises(ValueError, match="routers can be quantized only as nf4 or fp4, but quantization is 'int8'"):
        load_model(tiny, quantization="int8", quantize_gates=True, device="cpu")
    with pytest.raises(ValueError, match="'half' is none of float32, bfloat16, float16"):
        load_model(tiny, dtype="half", device="cpu")
    with pytest.raises(ValueError, match="neither cuda nor cpu"):
        load_model(tiny, device="meta")
    with pytest.raises(ValueError, match="only hub models have revisions"):
        load_model(tiny, revision="main", device="cpu")
    with pytest.raises(ValueError, match=r"'\./no/such/folder' is neither an existing folder nor a hub id"):
        load_model("./no/such/folder", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no GPU"):
        load_model(tiny, device="cuda")


def test_rows_that_end_within_a_block_are_refused_on_a_cpu(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="in 4 bits on a CPU with rows of 96 values, not a multiple of 64: use a GPU"):
        load_model(tmp_path, device="cpu")
    load_model(tmp_path, quantization="none", device="cpu")


def test_a_model_that_does_not_fit_is_told_with_what_to_do(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total capacity of …"
        )

    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", full)
    with pytest.raises(ValueError, match=r"tiny-mixtral in nf4 does not fit on cpu: CUDA out of memory; .*gpus_per"):
        load_model(tiny, device="cpu")


def test_layers_are_spread_over_gpus_in_equal_parts_and_in_order(tiny: Path) -> None:
    skeleton = build_skeleton(find_checkpoint(tiny, None, weights=False), torch.float32)
    gpus = [torch.device("cuda", number) for number in range(3)]
    placed = layer_devices(skeleton, gpus)
    assert [placed[f"layers.{layer}"].index for layer in range(LAYERS)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert {name: device.index for name, device in placed.items() if not name.startswith("layers.")} == {
        "embed_tokens": 0,
        "norm": 0,
        "rotary_emb": 0,
    }
    assert layer_devices(skeleton, gpus[:1]) == {"": gpus[0]}
    with pytest.raises(ValueError, match="2 GPUs from cpu on were requested, but there must be at least 1"):
        load_model(tiny, device="cpu", gpus=2)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"LlamaModel \(model_type 'llama'\), which has no routers"):
        describe_model(tmp_path, device_type="cpu")


def test_the_fingerprint_follows_the_content_and_not_the_place(broken: Path, tiny: Path) -> None:
    original = fingerprint(tiny)
    assert fingerprint(broken) == original
    tensors = load_file(broken / FIRST) | load_file(broken / SECOND)
    save_file(tensors, broken / "model.safetensors")  # other files, same tensors
    assert fingerprint(broken) == original
    tensors["model.layers.7.block_sparse_moe.gate.weight"][3, 21] += 0.01
    save_file(tensors, broken / "model.safetensors")
    assert fingerprint(broken) != original
    (broken / "model.safetensors").unlink()
    configure(rope_theta=5.0)(broken)
    assert fingerprint(broken) != original


def test_one_element_of_a_large_gate_changes_the_fingerprint_and_of_a_large_expert_only_where_sampled(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text("{}")
    names = ("layers.0.mlp.gate.weight", "layers.0.mlp.experts.0.w1.weight")
    seen = []
    for change_gate, expert_at in ((0, None), (1, None), (0, 100_000), (0, 0), (0, 262_144), (0, 524_287)):
        tensors = {name: np.zeros(524_288, np.float32) for name in names}  # 2 MiB each
        tensors[names[0]][100_000] = change_gate
        if expert_at is not None:
            tensors[names[1]][expert_at] = 1
        save_numpy(tensors, tmp_path / "model.safetensors")
        seen.append(fingerprint(tmp_path))
    assert seen[2] == seen[0], "an unsampled element was read: say so in the docstring"
    assert len({*seen}) == len(seen) - 1


FIND = """
import json, sys
from workers.models.checkpoint import find_checkpoint
try:
    found = find_checkpoint(sys.argv[1], revision=sys.argv[2] or None, weights=sys.argv[3] == "weights")
    print(json.dumps([found.model, found.revision, sorted(file.name for file in found.folder.iterdir())]))
except ValueError as error:
    print(json.dumps(str(error)))
assert not {"torch", "transformers"} & sys.modules.keys()
"""


def find_elsewhere(environment: dict[str, str], model: str, wanted: str, revision: str = "") -> Any:
    """Run `find_checkpoint` in a separate process: the hub's client reads its settings on import."""
    command = [sys.executable, "-c", FIND, model, revision, wanted]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_hub_model_is_resolved_to_its_commit_fetched_and_found_again_offline(tiny: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in tiny.iterdir()}
    strangers = {
        "README.md": files.pop("README.md"),
        "consolidated.safetensors": b"x",
        "original/model.safetensors": b"x",
        "pytorch_model.bin": b"x",
    }
    with FakeHub({"org/tiny": files | strangers, "org/gated": files}, private=("org/gated",)) as hub:
        environment = hub.environment(tmp_path)
        name, revision, small = find_elsewhere(environment, "org/tiny", "configuration")
        assert (name, revision) == ("org/tiny", COMMIT)
        assert "config.json" in small
        assert not any(path.endswith(".safetensors") for path in hub.asked)
        assert find_elsewhere(environment, "org/tiny", "weights") == ["org/tiny", COMMIT, sorted(files)]
        refused = find_elsewhere(environment, "org/gated", "weights")
        assert "'org/gated', revision 'main'" in refused
        assert "HF_TOKEN" in refused
        allowed = find_elsewhere(environment | {"HF_TOKEN": TOKEN}, "org/gated", "configuration")
        assert allowed[1] == COMMIT
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert find_elsewhere(offline, "org/tiny", "weights") == ["org/tiny", COMMIT, sorted(files)]
    assert find_elsewhere(offline, "org/tiny", "weights", COMMIT)[1] == COMMIT
    for environment in (offline, hub.environment(tmp_path)):  # set to offline, and a hub that is gone
        missing = find_elsewhere(environment, "org/other", "weights", "v2")
        for word in ("'org/other', revision 'v2'", str(tmp_path), "HF_TOKEN", "path of a folder"):
            assert word in missing
