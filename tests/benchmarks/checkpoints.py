"""Random checkpoints in the published layouts, one file per layer: Mixtral in bf16 or NF4, gpt-oss in MXFP4."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from full_size import full_size_config, random_matrix, random_mxfp4
from safetensors.torch import save_file

from workers.models.description import quantization_config
from workers.models.saving import in_four_bits
from workers.tiny import tiny_checkpoint

HIDDEN, INNER, KEY_VALUE, VOCABULARY = 4096, 14336, 1024, 32000


def make_checkpoint(
    folder: Path, layers: int, quantization: str = "none", spill: Path | None = None, spill_from: int = 0
) -> None:
    """Create one on the GPU; with equal layers the weights are equal.

    Parameters
    ----------
    quantization
        none or nf4: as published, or as written by `jobs/quantize.py`.
    spill
        Folder on another file system for the files of later layers, starting with `spill_from`.
    """
    folder.mkdir(parents=True)
    config = full_size_config(layers)
    if quantization != "none":
        with torch.device("meta"):
            skeleton = transformers.AutoModel.from_config(config)
        config.quantization_config = quantization_config(quantization, skeleton, torch.bfloat16).to_dict()
    config.save_pretrained(folder)
    generator = torch.Generator("cuda").manual_seed(0)
    index = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        held: dict[str, torch.Tensor] = {}
        for leaf, tensor in tensors.items():
            quantized = quantization != "none" and ("_proj." in leaf or ".experts." in leaf)
            parts = in_four_bits(leaf, tensor, quantization, tensor.device) if quantized else {leaf: tensor}
            held |= {part: value.cpu() for part, value in parts.items()}
        file = folder / f"model-{name}.safetensors"
        if spill is not None and name != "embed" and int(name.removeprefix("layer-")) >= spill_from:
            file.symlink_to(spill / file.name)
        save_file(held, file.resolve(), metadata={"format": "pt"})
        index.update(dict.fromkeys(held, file.name))

    def matrix(*shape: int, std: float | None = None) -> torch.Tensor:
        return random_matrix(shape, generator, std)

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors = {f"{at}.input_layernorm.weight": ones, f"{at}.post_attention_layernorm.weight": ones.clone()}
        for leaf, rows in (("q_proj", HIDDEN), ("k_proj", KEY_VALUE), ("v_proj", KEY_VALUE), ("o_proj", HIDDEN)):
            tensors[f"{at}.self_attn.{leaf}.weight"] = matrix(rows, HIDDEN)
        tensors[f"{at}.block_sparse_moe.gate.weight"] = matrix(8, HIDDEN)
        for expert in range(8):
            for leaf, shape in (("w1", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER)), ("w3", (INNER, HIDDEN))):
                tensors[f"{at}.block_sparse_moe.experts.{expert}.{leaf}.weight"] = matrix(*shape)
        write(f"layer-{layer:02d}", tensors)
    embedding = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN, std=1.0), "model.norm.weight": ones}
    write("embed", embedding | {"lm_head.weight": matrix(VOCABULARY, HIDDEN)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file in tiny_checkpoint().glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())


def make_mxfp4(config: Any, folder: Path) -> None:
    """A checkpoint of gpt-oss in published form: codes and powers of two for the experts, bf16 for everything else.

    Parameters
    ----------
    config
        A `GptOssConfig`; transformers' names of its tensors are the published ones.
    """
    folder.mkdir(parents=True)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"quantization_config": settings}))
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, meta in skeleton.named_parameters():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        tensors = files.setdefault(f"layer-{int(layer[1]):02d}" if layer else "embed", {})
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = meta.shape
            found = random_mxfp4((experts * outputs, inputs), generator)
            tensors[f"{name}_blocks"] = found.packed.view(experts, outputs, inputs // 32, 16).cpu()
            tensors[f"{name}_scales"] = found.scale.view(experts, outputs, inputs // 32).cpu()
        elif name.endswith("norm.weight"):
            tensors[name] = torch.ones(meta.shape, dtype=torch.bfloat16)
        else:
            tensors[name] = random_matrix(tuple(meta.shape), generator, 1.0 if "embed" in name else None).cpu()
    index = {}
    for number, tensors in files.items():
        save_file(tensors, folder / f"model-{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file in tiny_checkpoint().glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())


def checkpoint_gb(folder: Path) -> float:
    """The size of its weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
