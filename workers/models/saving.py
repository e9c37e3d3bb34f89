"""A checkpoint in 4 bits, written once from the original: later starts read 25 GB of Mixtral 8x7B, and not 93.

Promises: each matrix that `workers.models.loading` would quantize while it loads is quantized in the same way, and
everything else is copied. With up to `PUBLISHED` experts a layer both files and names are the original's, so that other
software reads the result too (bitsandbytes' own format, as transformers writes it). With more, those of a layer lie in
common tensors, named as in the model (``model.layers.0.mlp.experts.both.packed``): 18,432 matrices of Qwen3-30B-A3B are
576 tensors then, and its start is quick. ``quant_method`` in config.json says so, and other software refuses it. One
matrix is on the device at a time, and one output file in memory with what is there of layers not yet whole. The folder
appears when it is whole, under its name; until then it is called ``NAME.partial-…``, as is what a killed run leaves, to
be deleted by hand. Nothing that is there already is touched.

Does not build a model: shapes and names come from the configuration.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from workers.models.checkpoint import INDEX, find_checkpoint, read_config, tensor_names, weight_files
from workers.models.description import compute_dtype, describe_checkpoint
from workers.models.family import unquantized
from workers.models.footprint import estimate_checkpoint, quantized_skeleton
from workers.models.loading import usable_device
from workers.models.stored import FOUR_BITS, PACKED, stored_quantization

PUBLISHED = 16  # experts a layer, of the largest model that is published in 4 bits matrix by matrix and captured so

COPIED = ("*.json", "tokenizer*", "merges.txt", "*.jinja", "LICENSE*")


def quantize_checkpoint(
    model: str | Path,
    out: Path,
    *,
    revision: str | None = None,
    quantization: str = "nf4",
    device: str | torch.device = "cuda",
    progress: Callable[[int], None] = lambda tensor_bytes: None,
) -> Path:
    """Write a checkpoint whose matrices are in 4 bits.

    Parameters
    ----------
    model
        As for `load_model`; the checkpoint must not be quantized already.
    out
        A folder that does not exist yet.
    revision, quantization
        As for `load_model`.
    device
        Where each matrix is quantized.
    progress
        Called with the number of bytes of each tensor that was read.

    Returns
    -------
    Path
        The folder that was written.

    Raises
    ------
    ValueError
        When the checkpoint or the folder does not fit, or the disk is too small.
    OSError
        When the result cannot be written.
    """
    from workers.models.names import own_names, quantized_names  # bitsandbytes takes seconds to import
    from workers.models.stacking import StackWriter

    device = usable_device(device)
    if quantization not in FOUR_BITS:
        raise ValueError(f"quantization {quantization!r} is none of {', '.join(FOUR_BITS)}")
    refuse_existing(out)
    checkpoint = find_checkpoint(model, revision, weights=True)
    dtype = compute_dtype(device.type)
    description = describe_checkpoint(checkpoint, quantization, device.type, dtype, quantize_gates=False)
    if (stored := stored_quantization(checkpoint)) is not None:
        raise ValueError(f"{checkpoint.folder} is quantized already, in {stored}: it loads as it is")
    skeleton, settings = quantized_skeleton(checkpoint, quantization, dtype)
    names = tensor_names(checkpoint.folder)
    quantized = quantized_names(skeleton, names)
    packed = description["num_experts"] > PUBLISHED
    if not packed and (fused := [name for name, place in quantized.experts.items() if place.number is None]):
        raise ValueError(
            f"the checkpoint keeps the experts of a layer as one tensor ({fused[0]}), as transformers 5 can save them,"
            f" and 4-bit files of {PUBLISHED} experts or fewer hold one for each: capture it as it is, it is quantized"
            " while it loads, or give the original checkpoint"
        )
    matrices = quantized.linears if packed else quantized.linears | quantized.experts.keys()
    stacks = StackWriter(skeleton, quantized.experts if packed else {}, quantization, device, dtype)
    _refuse_small_disk(out, estimate_checkpoint(checkpoint, quantization, dtype))

    partial = out.with_name(f"{out.name}.partial-{uuid4().hex}")  # another run may be writing the same
    partial.mkdir(parents=True)
    try:
        places: dict[str, str] = {}
        total_bytes = 0
        for file in weight_files(checkpoint.folder):
            tensors: dict[str, torch.Tensor] = {}
            for name, tensor in _read(file):
                progress(tensor.nbytes)
                if name in stacks.places:
                    tensors |= stacks.take(name, tensor)
                elif name in matrices:
                    tensors |= in_four_bits(name, tensor, quantization, device)
                else:
                    tensors[name] = tensor
            _write(tensors, partial / file.name)
            shutil.copymode(file, partial / file.name)
            places |= dict.fromkeys(tensors, file.name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        for pattern in COPIED:
            for file in filter(Path.is_file, checkpoint.folder.glob(pattern)):
                shutil.copyfile(file, partial / file.name)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(places.items()))}
        config = read_config(checkpoint.folder) | {
            "quantization_config": _settings(settings, skeleton, own_names(skeleton, names), packed=packed),
            "quantized_from": {"model": checkpoint.model, "revision": checkpoint.revision},
        }
        for name, content in (INDEX, index), ("config.json", config):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _read(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor after the other."""
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            yield name, tensors.get_tensor(name)


def in_four_bits(name: str, matrix: torch.Tensor, quantization: str, device: torch.device) -> dict[str, torch.Tensor]:
    """A matrix as bitsandbytes stores it: the packed values and, beside them, what they are scaled by."""
    from workers.models.quantizing import packed_in_four_bits  # bitsandbytes takes seconds to import

    packed, state = packed_in_four_bits(matrix.to(device, compute_dtype(device.type)), quantization)
    state.dtype = matrix.dtype
    parts = {name: packed} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    return {part: value.cpu() for part, value in parts.items()}


def _write(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """safetensors has an error of its own for a full disk."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} could not be written: {error}") from error


def _settings(settings: Any, skeleton: Any, own: dict[str, str], *, packed: bool) -> dict[str, Any]:
    """What readers must know; what is not quantized by the last part of its name, the checkpoint's and the model's."""
    weights = {f"{name}.weight" for name in unquantized(skeleton)}
    weights |= {name for name, known in own.items() if known in weights}
    kept = {name.removesuffix(".weight").rpartition(".")[2] for name in weights}
    stored: dict[str, Any] = settings.to_dict() | {
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": [*sorted(kept), "lm_head"],
    }
    if packed:  # transformers asks load_in_4bit before it asks quant_method
        stored = {name: value for name, value in stored.items() if "load_in" not in name} | {"quant_method": PACKED}
    return stored


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten, nor a link followed."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: name a folder that does not, or delete it")


def _refuse_small_disk(out: Path, needed_bytes: int) -> None:
    """Before an hour's work, not after it."""
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ValueError(f"{out} will take {needed_bytes:,} bytes, and {existing} has {free_bytes:,} free")
