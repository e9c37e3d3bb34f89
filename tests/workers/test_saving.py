"""Checkpoints in 4 bits: the written checkpoint is what a load would have made, and reading returns what was
written."""

import hashlib
import json
import re
import runpy
import shutil
import signal
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
from safetensors.torch import load_file, save, save_file
from test_families import checkpoint_of

from jobs import quantize
from workers.engine import ModelEngine
from workers.models.checkpoint import find_checkpoint, weight_files
from workers.models.description import describe_model
from workers.models.footprint import estimate_bytes
from workers.models.loading import load_model
from workers.models.saving import quantize_checkpoint
from workers.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
LAYERS, EXPERTS = 8, 8  # of the tiny Mixtral
MOE = "model.layers.3.block_sparse_moe"
# What transformers 4.57.1 with bitsandbytes 0.50.2 stores of one matrix of the tiny Mixtral (read from its file).
STORED = {
    "": (torch.uint8, (8192, 1)),
    ".absmax": (torch.uint8, (256,)),
    ".nested_absmax": (torch.float32, (1,)),
    ".nested_quant_map": (torch.float32, (256,)),
    ".quant_map": (torch.float32, (16,)),
    ".quant_state.bitsandbytes__nf4": (torch.uint8, None),
}
WRITTEN = "53851230d2045547"  # of the tiny Mixtral's files, by the code of ec99636
# Its settings, as its config.json holds them, with llm_int8_skip_modules=["gate", "lm_head"].
TRANSFORMERS_4 = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["gate", "lm_head"],
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_checkpoint()


@pytest.fixture(scope="module")
def nf4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_checkpoint(tiny, tmp_path_factory.mktemp("models") / "tiny-nf4", device="cpu")


@pytest.fixture
def copy(nf4: Path, tmp_path: Path) -> Path:
    return shutil.copytree(nf4, tmp_path / "copy")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_quantized_checkpoint_loads_as_the_original_quantized_while_loading(
    tiny: Path, tmp_path: Path, kind: str
) -> None:
    folder = quantize_checkpoint(tiny, tmp_path / kind, quantization=kind, device="cpu")
    original, loaded = (load_model(model, quantization=kind, device="cpu") for model in (tiny, folder))
    wanted, got = original.model.state_dict(), loaded.model.state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():  # including scales and dtypes: a 4-bit matrix has them in its state
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    different = {name for name, value in original.provenance.items() if loaded.provenance[name] != value}
    assert different == {"model", "model_revision", "quantized_from"}
    assert loaded.provenance["quantized_from"] == {
        "model": "tiny-mixtral",
        "revision": original.provenance["model_revision"],
    }
    token = np.random.default_rng(0).integers(0, 32_000, (4, 16))
    length = np.array([16, 9, 3, 1])
    one, other = (ModelEngine(model).route(token, length) for model in (original, loaded))
    for name in ("expert", "weight"):
        np.testing.assert_array_equal(one[name], other[name])


def test_what_a_family_keeps_in_float32_is_so_from_a_quantized_checkpoint_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128}
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 1}
    config = transformers.AutoConfig.for_model("ernie4_5_moe", **sizes, **heads, **experts, pad_token_id=None)
    transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "ernie")
    folder = quantize_checkpoint(tmp_path / "ernie", tmp_path / "nf4", device="cpu")
    wanted, got = (load_model(model, device="cpu").model.state_dict() for model in (tmp_path / "ernie", folder))
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def test_the_files_hold_what_transformers_4_writes(tiny: Path, nf4: Path) -> None:
    written, original = tensors(nf4), tensors(tiny)
    matrix = f"{MOE}.experts.5.w2.weight"
    assert {name for name in written if name.startswith(matrix)} == {f"{matrix}{part}" for part in STORED}
    for part, (dtype, shape) in STORED.items():
        assert written[f"{matrix}{part}"].dtype == dtype
        assert shape is None or written[f"{matrix}{part}"].shape == shape
    facts = json.loads(bytes(written[f"{matrix}.quant_state.bitsandbytes__nf4"].tolist()))
    assert facts.pop("nested_offset") == pytest.approx(0.2, abs=0.2)
    assert facts == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": [64, 256],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }
    state = bitsandbytes.functional.QuantState.from_dict(
        {part[1:]: written[f"{matrix}{part}"] for part in STORED if part}, torch.device("cpu")
    )
    error = bitsandbytes.functional.dequantize_4bit(written[matrix], state) - original[matrix]
    assert 0 < error.float().std() / original[matrix].float().std() < 0.12
    quantized = {name.partition(".quant_state.")[0] for name in written if ".quant_state." in name}
    assert len(quantized) == LAYERS * (4 + EXPERTS * 3)
    for name in original.keys() - quantized:  # gates, norms, embeddings, head
        assert torch.equal(written[name], original[name])
    assert f"{MOE}.gate.weight" in original.keys() - quantized
    config = json.loads((nf4 / "config.json").read_text())
    assert config["quantization_config"] == TRANSFORMERS_4
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (nf4 / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_the_files_are_to_the_byte_what_bitsandbytes_makes_of_each_matrix_by_itself(tiny: Path, nf4: Path) -> None:
    for file in weight_files(tiny):
        wanted = {}
        for name, tensor in load_file(file).items():
            if "_proj." not in name and ".experts." not in name:
                wanted[name] = tensor
                continue
            packed, state = bitsandbytes.functional.quantize_4bit(
                tensor.float(), blocksize=64, compress_statistics=True, quant_type="nf4"
            )
            state.dtype = tensor.dtype
            parts = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
            wanted |= {name: packed, **parts}
        assert (nf4 / file.name).read_bytes() == save(wanted, metadata={"format": "pt"})


def test_the_files_are_those_of_the_first_version(nf4: Path) -> None:
    """By names, dtypes, shapes and packed values; scales come from means, whose last bit depends on the processor."""
    digest, scales = hashlib.sha256(), (".absmax", ".nested_absmax", ".quant_state.bitsandbytes__nf4")
    for name, tensor in sorted(tensors(nf4).items()):
        digest.update(f"{name} {tensor.dtype} {() if name.endswith(scales[2]) else tuple(tensor.shape)}".encode())
        if not name.endswith(scales):
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == WRITTEN


def test_routers_are_named_as_transformers_4_calls_them_too(tmp_path: Path) -> None:
    checkpoint_of("phimoe", tmp_path / "phimoe")  # whose block_sparse_moe.gate transformers 5 calls mlp.router
    folder = quantize_checkpoint(tmp_path / "phimoe", tmp_path / "nf4", device="cpu")
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == ["gate", "router", "lm_head"]


def test_the_bytes_told_hold_for_a_quantized_checkpoint_too(tiny: Path, nf4: Path) -> None:
    assert estimate_bytes(nf4, device_type="cpu") == estimate_bytes(tiny, device_type="cpu")
    assert describe_model(nf4, device_type="cpu")["quantization"] == "nf4"


def configure(**settings: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= settings
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def quantize_one(matrix: str) -> Callable[[Path], None]:
    """Like transformers 4 with a matrix that is not named among those to skip."""

    def apply(folder: Path) -> None:
        for file in weight_files(folder):
            held = load_file(file)
            if matrix in held:
                packed, state = bitsandbytes.functional.quantize_4bit(
                    held[matrix], blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                held |= {f"{matrix}.{part}": value for part, value in state.as_dict(packed=True).items()}
                save_file(held | {matrix: packed}, file, metadata={"format": "pt"})
        places = {name: file.name for file in weight_files(folder) for name in load_file(file)}
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


def leave_in_full(folder: Path) -> None:
    """Like a matrix that is named among those to skip."""
    matrix = "model.layers.0.self_attn.k_proj.weight"
    file = weight_files(folder)[0]
    held = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(matrix)}
    save_file(held | {matrix: torch.ones(32, 64, dtype=torch.bfloat16)}, file, metadata={"format": "pt"})


def blocks_of_128(folder: Path) -> None:
    file = weight_files(folder)[0]
    held = load_file(file)
    for name in held:
        if name.endswith("experts.0.w1.weight.quant_state.bitsandbytes__nf4"):
            facts = bytes(held[name].tolist()).replace(b'"blocksize": 64', b'"blocksize": 128')
            held[name] = torch.tensor(list(facts), dtype=torch.uint8)
    save_file(held, file, metadata={"format": "pt"})


def kept_as_bfloat16(folder: Path) -> None:
    """Like bitsandbytes with bnb_4bit_quant_storage, for FSDP; the kernels here read bytes."""
    configure(bnb_4bit_quant_storage="bfloat16")(folder)
    for file in weight_files(folder):
        held = load_file(file)
        packed = {name: held[name].view(-1, 2).view(torch.bfloat16) for name in held if f"{name}.absmax" in held}
        save_file(held | packed, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "asked", "words"),
    [
        (lambda folder: None, "fp4", ["holds nf4 weights", "'fp4' was requested"]),
        (lambda folder: None, "none", ["holds nf4 weights", "'none' was requested"]),
        (configure(quant_method="gptq"), "nf4", ["already quantized (gptq)", "supported are those of bitsandbytes"]),
        (configure(load_in_4bit=False, load_in_8bit=True), "nf4", ["already quantized (bitsandbytes, 8 bits)"]),
        (configure(bnb_4bit_use_double_quant=False), "nf4", ["without double quantization", "jobs/quantize.py"]),
        (quantize_one(f"{MOE}.gate.weight"), "nf4", ["1 matrices that must not be quantized", f"{MOE}.gate.weight"]),
        (leave_in_full, "nf4", ["1 matrices that should be quantized", "layers.0.self_attn.k_proj.weight"]),
        (blocks_of_128, "nf4", ["(type, block, double) = ('nf4', 128, True), not ('nf4', 64, True)", "experts.0.w1"]),
        (kept_as_bfloat16, "nf4", ["is stored in torch.bfloat16, not in bytes (bnb_4bit_quant_storage)"]),
    ],
)
def test_a_checkpoint_quantized_otherwise_is_refused_with_what_differs(
    copy: Path, spoil: Callable[[Path], None], asked: str, words: list[str]
) -> None:
    spoil(copy)
    with pytest.raises(ValueError) as refusal:  # noqa: PT011 (the words are checked below)
        load_model(copy, quantization=asked, device="cpu")
    for word in [str(copy), *words]:
        assert word in str(refusal.value)


def test_a_quantized_head_does_not_matter_since_it_is_not_loaded(copy: Path, nf4: Path) -> None:
    quantize_one("lm_head.weight")(copy)
    got, wanted = (load_model(folder, device="cpu").model.state_dict() for folder in (copy, nf4))
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_what_cannot_be_written_is_refused_before_anything_is(
    tiny: Path, nf4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="is already quantized, in nf4: load it as it is"):
        quantize_checkpoint(nf4, tmp_path / "again", device="cpu")
    (link := tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in (nf4, link):
        with pytest.raises(ValueError, match=f"{taken} exists"):
            quantize_checkpoint(tiny, taken, device="cpu")
    link.unlink()
    with pytest.raises(ValueError, match="'int8' is none of nf4, fp4"):
        quantize_checkpoint(tiny, tmp_path / "int8", quantization="int8", device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device cuda was requested, but torch .* sees no GPU"):
        quantize_checkpoint(tiny, tmp_path / "cuda", device="cuda")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(ValueError, match=rf"will take [\d,]+ bytes, but {tmp_path} has only 1,000 free"):
        quantize_checkpoint(tiny, tmp_path / "deeper" / "small", device="cpu")
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
sys.argv = ["quantize.py", *sys.argv[2:]]
sys.path[0] = {root!r}
from jobs.quantize import main
from jobs.console.terminal import run_job
run_job(main)
"""


def test_a_write_that_fails_leaves_no_folder_and_what_is_beside_it_stays(
    tiny: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    out, model = tmp_path / "out", tmp_path / "out.partial"
    shutil.copytree(tiny, model)
    (model / "tokenizer").mkdir()  # of another format: no file to copy
    arguments = [str(model), str(out), "--device", "cpu"]
    limited = [sys.executable, "-c", LIMITED.format(root=str(ROOT)), "-", *arguments]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert re.search(r"out\.partial-\w+/model-00001-of-00002.safetensors could not be written", done.stderr)
    assert list(tmp_path.iterdir()) == [model]
    ran = command(*arguments, main=quantize.main)
    assert (ran.status, ran.out) == (0, f"{out}\n"), ran.err
    assert {entry.name for entry in tmp_path.iterdir()} == {"out", "out.partial"}
    assert find_checkpoint(out, weights=True).model == "out"
    assert find_checkpoint(model, weights=True).revision == find_checkpoint(tiny, weights=True).revision


def test_of_two_runs_for_one_folder_neither_spoils_the_other(tiny: Path, nf4: Path, tmp_path: Path) -> None:
    def interrupted(tensor_bytes: int) -> None:
        raise KeyboardInterrupt

    once = iter([True])

    def run_another(tensor_bytes: int) -> None:
        if next(once, False):
            with pytest.raises(KeyboardInterrupt):
                quantize_checkpoint(tiny, tmp_path / "out", device="cpu", progress=interrupted)

    quantize_checkpoint(tiny, tmp_path / "out", device="cpu", progress=run_another)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert find_checkpoint(tmp_path / "out", weights=True).revision == find_checkpoint(nf4, weights=True).revision


def test_ctrl_c_says_that_nothing_is_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("workers.models.saving.quantize_checkpoint", interrupted)
    monkeypatch.setattr(sys, "argv", ["quantize.py", str(tiny), str(tmp_path / "out"), "--device", "cpu"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit, match="130"):
            runpy.run_path(str(ROOT / "jobs" / "quantize.py"), run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "interrupted: nothing is kept: the same command starts from the beginning" in capsys.readouterr().err
