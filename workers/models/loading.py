"""A mixture-of-experts model from a checkpoint, in 4 bits, fp8, 8 bits or unquantized, ready to be captured.

Promises: what is loaded is what was asked for. After every load the report of transformers is clean, every
matrix of every expert is quantized, and every router is in its full precision, or a ValueError says which
tensors are not, and with which versions. `describe_model` gives the identity beforehand, without the weights.

Does not know tokens, hooks or stores. Files come from `workers.models.checkpoint`, shapes and names from
`workers.models.description`; how experts are quantized is described in `workers.models.stacking`.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from workers.models.checkpoint import Checkpoint, find_checkpoint, read_config, tensor_names
from workers.models.description import (
    EXPERTS_OF_TRANSFORMERS,
    UNFUSED,
    ModelDescription,
    build_skeleton,
    compute_dtype,
    describe_checkpoint,
    describe_model,
    quantization_config,
)
from workers.models.experts import PackedExperts
from workers.models.family import KEPT, find_routers
from workers.models.footprint import estimate_checkpoint, option_that_fits, quantized_skeleton
from workers.models.packed import PackedStack
from workers.models.stored import BLOCK, E4M3_FORMS, FOUR_BITS, Stored, loaded_form, stored_form
from workers.shard import RoutingError

__all__ = [
    "LoadedModel",
    "ModelDescription",
    "describe_model",
    "load_model",
]


PACKED = (".both.packed", ".down.packed")
"""Ends of names in checkpoints that keep experts packed (`workers.models.saving`)."""

_PLAIN = (NonDynamicallyQuantizableLinear,)  # of torch's own attention, which reads its matrix: nothing quantizes it

SCALES_OF_ACTIVATIONS = (".input_scale", ".k_scale", ".v_scale")
"""Ends of names in published fp8 checkpoints that are not used: here each token has a scale of its own."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, without gradients and without the language-model head."""

    folder: Path
    """Where its checkpoint is on this machine; the tokenizer's files lie there too."""
    model: nn.Module
    """transformers' base model; called with ``input_ids`` and ``use_cache=False``."""
    routers: dict[int, nn.Module]
    """The model's own layer number → the module that chooses experts, in ascending order."""
    num_experts: int
    """Of each layer that has a router."""
    experts_per_token: int
    """Experts that a router chooses for each token."""
    provenance: dict[str, Any]
    """The fields of `ModelDescription`, then facts of this load (JSON values only)."""


def load_model(
    model: str | Path,
    *,
    revision: str | None = None,
    quantization: str = "nf4",
    dtype: str | None = None,
    quantize_gates: bool = False,
    matmul: str = "bf16",
    expert_backend: str | None = None,
    device: str | torch.device = "cuda",
    gpus: int = 1,
) -> LoadedModel:
    """Load a model for capturing, and prove that it was loaded as asked.

    Parameters
    ----------
    model
        An existing folder with a checkpoint, or a hub id.
    revision
        Branch, tag or commit of a hub model.
    quantization
        Applied while loading: ``nf4`` and ``fp4`` (double quantization, blocks of 64), ``fp8`` (e4m3 with one scale a
        row), ``int8`` (LLM.int8), or ``none``. A checkpoint that is quantized already (`workers.models.saving`,
        transformers with its routers left out, ``mxfp4``, or ``fp8``: e4m3 with one scale a matrix, a row or a block)
        loads as it is, and must be in what is asked for; one that was published in mxfp4 or in fp8 with blocks may be
        quantized again, to ``nf4`` or ``fp4``.
    dtype
        Compute dtype: ``float32``, ``bfloat16`` or ``float16``; by default float32 on a CPU, else bfloat16.
    quantize_gates
        Round the routers' weights to `quantization` too, as transformers 4 does by default.
    matmul
        What products with quantized matrices are computed in: ``bf16``, which stands for `dtype`, or ``fp8``.
    expert_backend
        ``unfused`` to compute experts in 4 bits or fp8 as versions before packed ones did, and ``grouped`` to leave
        attention to transformers as versions before a family's present forward did; captures that those began resume
        with it.
    device
        Where the model goes.
    gpus
        Over how many GPUs its layers are spread, from `device` on: more than one where one is too small.

    Returns
    -------
    LoadedModel
        For `capture_texts`, as often as wanted.

    Raises
    ------
    ValueError
        If the checkpoint, the device or the result is not what was asked for.
    """
    target = usable_device(device)
    checkpoint = find_checkpoint(model, revision, weights=True)
    computed_in = compute_dtype(target.type, dtype)
    description = describe_checkpoint(
        checkpoint, quantization, target.type, computed_in,
        quantize_gates=quantize_gates, matmul=matmul, expert_backend=expert_backend,
    )  # fmt: skip
    weight_bytes = estimate_checkpoint(checkpoint, quantization, computed_in)
    devices = _devices(target, gpus)
    for each in devices if target.type == "cuda" else ():
        free_bytes, _ = torch.cuda.mem_get_info(each)
        if free_bytes < weight_bytes // gpus:
            raise ValueError(
                f"{checkpoint.model} in {quantization} needs {weight_bytes // gpus:,} bytes for its weights, and "
                f"{each} has {free_bytes:,} free: use "
                + option_that_fits(checkpoint, quantization, computed_in, free_bytes)
            )
    loaded = _from_pretrained(checkpoint, description, devices, computed_in)
    loaded.eval().requires_grad_(False)
    for module in loaded.modules():
        if isinstance(module, nn.Linear) and module.weight.dtype.itemsize == 1:
            module.register_forward_pre_hook(_refuse_bytes)
    routers = find_routers(loaded)
    assert list(routers) == description["layers"], (list(routers), description["layers"])
    quantized = _check_precision(checkpoint.folder, loaded, routers, description)
    if quantize_gates:
        from workers.models.quantizing import round_gates  # bitsandbytes takes seconds to import

        round_gates(routers.values(), quantization)
    if description["expert_backend"] == UNFUSED:
        for module in loaded.modules():
            if isinstance(module, PackedExperts):
                module.compute_unfused()
    return LoadedModel(
        folder=checkpoint.folder,
        model=loaded,
        routers=routers,
        num_experts=description["num_experts"],
        experts_per_token=description["experts_per_token"],
        provenance={
            **description,
            "double_quantization": quantization in FOUR_BITS,
            "quantization_block": BLOCK if quantization in FOUR_BITS else None,
            "quantized_expert_matrices": quantized,
            "weight_bytes": weight_bytes,
            "gpus": gpus if target.type == "cuda" else 0,
            "quantized_from": read_config(checkpoint.folder).get("quantized_from"),
        },
    )


def usable_device(device: str | torch.device) -> torch.device:
    """The device with its index; a ValueError where there is none."""
    target = torch.device(device)
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device} was asked for, and torch {torch.__version__} sees no GPU")
        return target if target.index is not None else torch.device("cuda", torch.cuda.current_device())
    if target.type != "cpu":
        raise ValueError(f"device {device} is neither cuda nor cpu")
    return target


def _devices(first: torch.device, gpus: int) -> list[torch.device]:
    """So many devices from the first on."""
    if gpus == 1:
        return [first]
    if gpus < 1 or first.type != "cuda":
        raise ValueError(f"{gpus} GPUs from {first} on: there must be one or more")
    start, there = first.index or 0, torch.cuda.device_count()
    if start + gpus > there:
        raise ValueError(f"{gpus} GPUs from {first} on were asked for, and torch sees {there}")
    return [torch.device("cuda", start + number) for number in range(gpus)]


def layer_devices(skeleton: nn.Module, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Which module goes where, as transformers' `device_map`: layers in equal parts, all else with the first ones.

    Raises
    ------
    ValueError
        When the model's layers are not one stack of its own.
    """
    if len(devices) == 1:
        return {"": devices[0]}
    stacks = {name: child for name, child in skeleton.named_children() if isinstance(child, nn.ModuleList)}
    if list(stacks) != ["layers"]:
        raise ValueError(f"{type(skeleton).__name__} is not spread over GPUs: its stacks of layers are {list(stacks)}")
    placed = {name: devices[0] for name, _ in skeleton.named_children() if name != "layers"}
    many = len(stacks["layers"])
    return placed | {f"layers.{number}": devices[number * len(devices) // many] for number in range(many)}


def _from_pretrained(
    checkpoint: Checkpoint, description: ModelDescription, devices: Sequence[torch.device], dtype: torch.dtype
) -> Any:
    """Run transformers' own loader, with experts that can be quantized, and read its report."""
    quantization, backend = description["quantization"], description["expert_backend"]
    skeleton = build_skeleton(checkpoint, dtype)
    stored = stored_form(checkpoint)
    settings = quantization_config(loaded_form(checkpoint, quantization, description["matmul"]), skeleton, dtype)
    # Given by itself: else an attention that it names, as some published ones do, would have the last word.
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    if stored is not None:
        _check_stored(checkpoint, stored, description, dtype)
        # The checkpoint's own settings are equal in all that its weights depend on, or these are what is wanted, and
        # tell another compute dtype.
        config.quantization_config = settings.to_dict()
        settings = None
    with _quiet(), _quantizers(quantization, stored):
        try:
            model, report = transformers.AutoModel.from_pretrained(
                checkpoint.folder,
                config=config,
                quantization_config=settings,
                device_map=layer_devices(skeleton, devices),
                dtype=dtype,
                attn_implementation=description["attention"],
                experts_implementation=backend if backend in EXPERTS_OF_TRANSFORMERS else "eager",
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, with names, instead of raised without
                output_loading_info=True,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{checkpoint.model} in {quantization} does not fit on {', '.join(map(str, devices))}: "
                f"{str(error).split('. ')[0]}; use a larger card, more of them (--gpus_per_worker), or a smaller "
                "quantization"
            ) from error
        except (RuntimeError, AttributeError) as error:
            if type(error) not in (RuntimeError, AttributeError):  # a lost GPU is another matter
                raise
            # Experts that differ in shape cannot be fused; a family's own code may ask its experts for what is packed.
            reason = str(error)
            if "CONVERSION" in reason:  # transformers' report, which is not shown, has a page for each tensor
                reason = f"its tensors could not be converted into what {quantization} needs: use --quantization none"
            raise ValueError(f"{checkpoint.folder} could not be loaded ({_versions()}): {reason}") from error
        except ValueError as error:
            raise ValueError(
                f"the model loaded from {checkpoint.folder} is not what was asked for ({quantization}; {_versions()}):"
                f" {error}"
            ) from error
    # The base model leaves the head out; nothing else may be missing, left over or of another shape.
    report["unexpected_keys"] = {
        key for key in report["unexpected_keys"] if not (_is_head(key) or key.endswith(SCALES_OF_ACTIVATIONS))
    }
    # Under a quantizer, transformers 5.17 takes an unquantized tensor of another shape without a word.
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    report["mismatched_keys"] = {
        *report["mismatched_keys"],
        *(
            (name, parameter.shape, shapes[name])
            for name, parameter in model.named_parameters()
            if type(parameter) is nn.Parameter and parameter.shape != shapes.get(name, parameter.shape)
        ),
    }
    faults = {name: sorted(map(str, found)) for name, found in report.items() if found}
    if faults:
        listed = "; ".join(f"{len(found)} {name}: {', '.join(found[:5])}" for name, found in faults.items())
        raise ValueError(f"{checkpoint.folder} does not fit its own configuration ({_versions()}): {listed}")
    return model


def _is_head(name: str) -> bool:
    """Whether a tensor is the language-model head's; models that see or hear have it beside their text part."""
    return "lm_head" in name.split(".")


def _check_stored(checkpoint: Checkpoint, stored: Stored, description: ModelDescription, dtype: torch.dtype) -> None:
    """Refuse a quantized checkpoint that has other matrices quantized than a load of the original one would have.

    transformers 4 quantizes the routers too, unless they are named in llm_int8_skip_modules.
    """
    from workers.models.names import quantized_names  # bitsandbytes takes seconds to import

    skeleton, _ = quantized_skeleton(checkpoint, stored.quantization, dtype)
    names = tensor_names(checkpoint.folder)
    if stored.form in E4M3_FORMS:
        found = {name.removesuffix(stored.scale) for name in names if name.endswith(f".weight{stored.scale}")}
    elif stored.form == "mxfp4":
        found = {name for name in names if name.endswith("_blocks")}
    else:
        found = {name.partition(".quant_state.")[0] for name in names if ".quant_state." in name}
        found |= {name for name in names if name.endswith(PACKED)}
    found = {name for name in found if not _is_head(name)}  # which is not loaded
    quantized = quantized_names(skeleton, names)
    wanted = {*quantized.linears, *quantized.experts}
    for what, matrices in (("must not be", found - wanted), ("should be", wanted - found)):
        if matrices:
            first = ", ".join(sorted(matrices)[:5])
            raise ValueError(
                f"{checkpoint.folder} has {len(matrices)} matrices that {what} quantized, first {first}: here all but"
                " the routers and the head are, so that its choices would be others; give the original checkpoint"
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing a report that ends in an error here, or is as expected (no head).

    Its progress bar is shown in a terminal only.
    """
    verbosity = transformers.logging.get_verbosity()
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bar:
            transformers.logging.enable_progress_bar()


def _quantizers(quantization: str, stored: Stored | None) -> AbstractContextManager[None]:
    if quantization == "none":
        return nullcontext()
    from workers.models.quantizers import own_quantizers  # bitsandbytes takes seconds to import

    return own_quantizers(stored)


def _check_precision(
    folder: Path, model: nn.Module, routers: dict[int, nn.Module], description: ModelDescription
) -> int:
    """Refuse a quantized router, another matrix that is not, and a wrong shape; count the experts' quantized matrices.

    transformers has skipped fused experts and dropped them, both without a word (5.0 to 5.6, and see
    `workers.models.quantizer`); only looking at the parameters themselves shows it.
    """
    quantization = description["quantization"]
    names = {module: name for name, module in model.named_modules()}
    faults: dict[str, str | None] = {}
    count = 0
    for router in routers.values():
        block = names[router].rpartition(".")[0]
        for leaf, parameter in model.get_submodule(block).named_parameters(prefix=block):
            if parameter.ndim < 2 or leaf.endswith("_scale_inv"):
                continue
            gate = leaf.startswith(f"{names[router]}.")
            faults[leaf] = _gate_fault(parameter, description) if gate else _matrix_fault(parameter, quantization)
            count += not gate and quantization != "none"
    for name, module in model.named_modules():
        if isinstance(module, PackedStack):
            faults |= {f"{name}.{leaf}": fault for leaf, fault in module.faults().items()}
            count += module.experts * module.parts
    for name, module in model.named_modules():
        leaf = f"{name}.weight"
        if isinstance(module, nn.Linear) and type(module) not in _PLAIN and not faults.get(leaf):
            wanted = "none" if name.rpartition(".")[2] == KEPT else quantization
            fault = None if leaf in faults else _matrix_fault(module.weight, wanted)
            faults[leaf] = fault or _shape_fault(module)
    found = [f"{leaf} is {fault}" for leaf, fault in faults.items() if fault]
    if found:
        raise ValueError(
            f"the model loaded from {folder} is not what was asked for ({quantization}; {_versions()}): "
            f"{len(found)} tensors, first {'; '.join(found[:5])}. If the checkpoint is whole, use the versions "
            "of the lock file, or --quantization none"
        )
    return count


def _refuse_bytes(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """Refuse hidden states that a family's code has cast to the dtype of a quantized matrix, which is that of bytes."""
    if args[0].dtype.itemsize == 1:
        raise RoutingError(
            f"the model's code gives hidden states of {args[0].dtype} to a quantized matrix ({type(module).__name__}):"
            " it casts them to the matrix's dtype, so that they are lost; use --quantization none"
        )


def _shape_fault(linear: nn.Linear) -> str | None:
    """Another shape than the configuration asks, of a Linear's matrix, or one that bitsandbytes reads wrongly."""
    wanted = (linear.out_features, linear.in_features)
    state = getattr(linear.weight, "quant_state", None)
    found = tuple(linear.weight.shape if state is None else state.shape)
    if found != wanted:
        return f"of shape {found}, not {wanted}"
    if state is not None and linear.weight.device.type == "cpu" and linear.in_features % BLOCK:
        # Some CPUs give wrong values (see `workers.models.kernels.plain_dequantize`); no CPU shall give others than the
        # next.
        return f"in 4 bits on a CPU with rows of {linear.in_features} values, no multiple of {BLOCK}: use a GPU"
    return None


def _gate_fault(parameter: nn.Parameter, description: ModelDescription) -> str | None:
    """What a router's matrix is instead of what it should be, or None."""
    wanted = description["compute_dtype"]
    return None if str(parameter.dtype) == f"torch.{wanted}" else f"{parameter.dtype}, not {wanted}"


def _matrix_fault(parameter: torch.Tensor, quantization: str) -> str | None:
    """What a matrix that is no router's is instead of what it should be, or None."""
    kind = type(parameter).__name__
    if quantization in ("none", "mxfp4"):  # in MXFP4 only experts are, which lie in stacks
        return None if parameter.is_floating_point() else f"{parameter.dtype}, not floating point"
    if quantization == "int8":
        fits = kind == "Int8Params" and parameter.dtype == torch.int8
        return None if fits else f"a {kind} of {parameter.dtype}, not int8"
    if quantization == "fp8":
        return None if parameter.dtype == torch.float8_e4m3fn else f"a {kind} of {parameter.dtype}, not e4m3"
    state = getattr(parameter, "quant_state", None)
    if kind != "Params4bit" or state is None:
        return f"a {kind} of {parameter.dtype}, not a quantized Params4bit"
    if parameter.dtype != torch.uint8:  # bitsandbytes may keep the bytes as numbers of another type
        return f"stored in {parameter.dtype}, not in bytes (bnb_4bit_quant_storage)"
    from workers.models.stacking import state_fault  # bitsandbytes takes seconds to import

    return state_fault(state, quantization)


def _versions() -> str:
    """Versions of what took part in a load, for an error."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
