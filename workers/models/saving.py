"""Write a checkpoint in 4 bits once from the original: later starts read 25 GB of Mixtral 8x7B instead of 93.

Promises: each matrix that `workers.models.loading` would quantize while loading is quantized in the same way, and
everything else is copied. With up to `PUBLISHED` experts per layer, both files and names are those of the original, so
that other software can read the result (bitsandbytes' own format, as written by transformers). With more experts, those
of a layer are in common tensors, named as in the model (``model.layers.0.mlp.experts.both.packed``): the 18,432
matrices of Qwen3-30B-A3B become 576 tensors, which load quickly. ``quant_method`` in config.json says so, and other
software rejects such a checkpoint. One matrix is on the device at a time, and one output file and the parts of
incomplete layers are in memory. The folder appears under its name when it is complete; until then it is called
``NAME.partial-…``. A killed run leaves such a folder, which must be deleted by hand. Existing files are never changed.

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

PUBLISHED = (
    16  # experts per layer of the largest model that is published in 4 bits matrix by matrix and captured in this form
)

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
        As for `load_model`. The checkpoint must not be quantized.
    out
        A folder that does not exist yet.
    revision, quantization
        As for `load_model`.
    device
        The device on which each matrix is quantized.
    progress
        Called with the number of bytes of each tensor after it is read.

    Returns
    -------
    Path
        The written folder.

    Raises
    ------
    ValueError
        When the checkpoint or the folder is not suitable, or the disk is too small.
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
        raise ValueError(f"{checkpoint.folder} is already quantized, in {stored}: load it as it is")
    skeleton, settings = quantized_skeleton(checkpoint, quantization, dtype)
    names = tensor_names(checkpoint.folder)
    quantized = quantized_names(skeleton, names)
    packed = description["num_experts"] > PUBLISHED
    if not packed and (fused := [name for name, place in quantized.experts.items() if place.number is None]):
        raise ValueError(
            f"the checkpoint has the experts of a layer as one tensor ({fused[0]}), as transformers 5 can save them,"
            f" but 4-bit files of {PUBLISHED} experts or fewer hold one for each: capture it unchanged (it is quantized"
            " while it loads), or give the original checkpoint"
        )
    matrices = quantized.linears if packed else quantized.linears | quantized.experts.keys()
    stacks = StackWriter(skeleton, quantized.experts if packed else {}, quantization, device, dtype)
    _refuse_small_disk(out, estimate_checkpoint(checkpoint, quantization, dtype))

    partial = out.with_name(f"{out.name}.partial-{uuid4().hex}")  # another run may be writing the same folder
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
    """A matrix in bitsandbytes' format: the packed values and their scales."""
    from workers.models.quantizing import packed_in_four_bits  # bitsandbytes takes seconds to import

    packed, state = packed_in_four_bits(matrix.to(device, compute_dtype(device.type)), quantization)
    state.dtype = matrix.dtype
    parts = {name: packed} | {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
    return {part: value.cpu() for part, value in parts.items()}


def _write(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Raise an OSError for a full disk; safetensors raises its own error."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{file} could not be written: {error}") from error


def _settings(settings: Any, skeleton: Any, own: dict[str, str], *, packed: bool) -> dict[str, Any]:
    """The settings that readers need; unquantized modules are named by the last parts of their names, in the checkpoint
    and in the model."""
    weights = {f"{name}.weight" for name in unquantized(skeleton)}
    weights |= {name for name, known in own.items() if known in weights}
    kept = {name.removesuffix(".weight").rpartition(".")[2] for name in weights}
    stored: dict[str, Any] = settings.to_dict() | {
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": [*sorted(kept), "lm_head"],
    }
    if packed:  # transformers reads load_in_4bit before quant_method
        stored = {name: value for name, value in stored.items() if "load_in" not in name} | {"quant_method": PACKED}
    return stored


def refuse_existing(out: Path) -> None:
    """Reject an existing folder: nothing is overwritten, and no link is followed."""
    if os.path.lexists(out):
        raise ValueError(f"{out} exists: name a folder that does not, or delete it")


def _refuse_small_disk(out: Path, needed_bytes: int) -> None:
    """Check the free space before an hour of work."""
    existing = next(parent for parent in out.absolute().parents if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ValueError(f"{out} will take {needed_bytes:,} bytes, but {existing} has only {free_bytes:,} free")
