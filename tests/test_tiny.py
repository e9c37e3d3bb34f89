"""The tiny Mixtral: the same bytes everywhere, the published layout, whole or absent."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from workers import tiny
from workers.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[1]
SHA256 = {
    "model-00001-of-00002.safetensors": "8982571fcfd215e4b77e522a6d90a7fcfadf95a883b9e8a7b2b47c1ad2425af0",
    "model-00002-of-00002.safetensors": "9c5f5578d03e0db9def9825d97451eddf345f510f5b4d69763e8b71a746930d2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def tensors(folder: Path) -> Iterator[tuple[str, str, torch.Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                yield file.name, name, opened.get_tensor(name)


def test_two_folders_hold_the_same_bytes_and_the_weights_are_the_pinned_ones(folder: Path, tmp_path: Path) -> None:
    again = digests(tiny_checkpoint(tmp_path / "again"))
    assert again == digests(folder)
    assert {name: again[name] for name in SHA256} == SHA256
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20e6


def test_names_shapes_and_types_are_those_of_the_published_checkpoints(folder: Path) -> None:
    found = {name: (file, tensor) for file, name, tensor in tensors(folder)}
    per_layer = {
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (64, 64),
        "self_attn.k_proj.weight": (32, 64),
        "self_attn.v_proj.weight": (32, 64),
        "self_attn.o_proj.weight": (64, 64),
        "block_sparse_moe.gate.weight": (8, 64),
        **{f"block_sparse_moe.experts.{e}.w1.weight": (128, 64) for e in range(8)},
        **{f"block_sparse_moe.experts.{e}.w2.weight": (64, 128) for e in range(8)},
        **{f"block_sparse_moe.experts.{e}.w3.weight": (128, 64) for e in range(8)},
    }
    expected = {f"model.layers.{n}.{name}": shape for n in range(8) for name, shape in per_layer.items()}
    expected |= {
        "model.embed_tokens.weight": (32000, 64),
        "lm_head.weight": (32000, 64),
        "model.norm.weight": (64,),
    }
    assert {name: tuple(tensor.shape) for name, (_, tensor) in found.items()} == expected
    assert {tensor.dtype for _, tensor in found.values()} == {torch.bfloat16}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in found.values())


def test_weights_have_the_stated_spread_and_are_rounded_as_torch_rounds(folder: Path) -> None:
    found = {name: tensor.float() for _, name, tensor in tensors(folder)}
    assert found["model.embed_tokens.weight"].std().item() == pytest.approx(1, rel=0.01)
    assert found["model.layers.3.block_sparse_moe.experts.5.w2.weight"].std().item() == pytest.approx(
        128**-0.5, rel=0.02
    )
    assert torch.equal(found["model.norm.weight"], torch.ones(64))
    name, shape = "model.layers.0.self_attn.q_proj.weight", (64, 64)
    stream = np.random.PCG64([tiny.SEED, tiny.zlib.crc32(name.encode())])
    words = [int(word) for word in stream.random_raw(64 * 64)]
    sums = [sum(word >> shift & 0xFFFF for shift in (0, 16, 32, 48)) - 2 * 0xFFFF for word in words]
    scale = np.float32(64**-0.5 / ((2**32 - 1) / 3) ** 0.5)
    expected = torch.tensor(np.array(sums, np.float32) * scale).to(torch.bfloat16).float().reshape(shape)
    assert torch.equal(found[name], expected)


def test_it_loads_cleanly_and_routes_by_token_and_context(folder: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert {key: list(value) for key, value in info.items() if value} == {}
    logits: list[torch.Tensor] = []
    gate = model.model.layers[4].mlp.gate
    gate.register_forward_pre_hook(
        lambda _, inputs: logits.append(torch.nn.functional.linear(inputs[0].reshape(-1, 64), gate.weight))
    )
    ids = torch.arange(300, 812)
    with torch.inference_mode():
        model.model(input_ids=ids[None], use_cache=False)
        model.model(input_ids=ids.flip(0)[None], use_cache=False)
    forward, backward = logits[0], logits[1].flip(0)
    assert 1 < forward.std().item() < 1.5
    load = torch.bincount(forward.topk(2).indices.flatten(), minlength=8) / 1024
    assert load.min() > 0.02  # no expert is dead
    assert load.max() - load.min() > 0.03  # and loads differ
    same = (forward.argmax(1) == backward.argmax(1)).float().mean().item()
    assert 0.25 < same < 0.95  # by chance about 1/8; by the token alone 1


def test_a_killed_maker_leaves_no_folder_of_that_name(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from workers import tiny\n"
        "tiny._write_weights = lambda folder: os._exit(9)\n"
        "tiny.tiny_checkpoint(Path(sys.argv[1]))"
    )
    target = tmp_path / "model"
    killed = subprocess.run([sys.executable, "-c", script, str(target)], cwd=ROOT, check=False)
    assert killed.returncode == 9
    assert not target.exists()
    assert [path.name.startswith(".model.partial-") for path in tmp_path.iterdir()] == [True]
    assert tiny_checkpoint(target) == target
    assert digests(target).keys() > SHA256.keys()


@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_folder_that_is_not_whole_is_refused_and_left(folder: Path, tmp_path: Path, damage: str) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    victim = broken / "model-00002-of-00002.safetensors"
    victim.unlink()
    if damage == "empty":
        victim.touch()
    before = digests(broken)
    with pytest.raises(ValueError, match=r"broken is no whole tiny Mixtral: model-00002-of-00002\.safetensors"):
        tiny_checkpoint(broken)
    assert digests(broken) == before


def test_makers_at_the_same_time_agree_on_one_folder(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from workers.tiny import *; tiny_checkpoint(Path(sys.argv[1]))"
    target = tmp_path / "model"
    makers = [subprocess.Popen([sys.executable, "-c", script, str(target)], cwd=ROOT) for _ in range(2)]
    assert [maker.wait(timeout=60) for maker in makers] == [0, 0]
    assert {name: digests(target)[name] for name in SHA256} == SHA256
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_loser_of_a_race_takes_the_winners_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    write = tiny._write_weights

    def overtaken(partial: Path) -> None:
        write(partial)
        shutil.copytree(folder, target)

    monkeypatch.setattr(tiny, "_write_weights", overtaken)
    assert tiny_checkpoint(target) == target
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_default_folder_is_in_the_cache_and_reused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = shutil.copytree(folder, tmp_path / "expert-atlas" / "tiny-mixtral-v1")
    before = os.stat(cached / "config.json").st_mtime_ns
    assert tiny_checkpoint() == cached
    assert os.stat(cached / "config.json").st_mtime_ns == before


def test_making_it_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import workers; from workers.tiny import tiny_checkpoint\n"
        "tiny_checkpoint(Path(sys.argv[1])); sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], cwd=ROOT, check=True)
