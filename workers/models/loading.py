"""A mixture-of-experts model from a checkpoint, in 4 bits, fp8, 8 bits or unquantized, ready to be captured.

Promises: the loaded model is the requested one. After every load the report of transformers is clean, every matrix of
every expert is quantized, and every router is in its full precision; otherwise a ValueError names the tensors and the
versions of the packages. `describe_model` gives the identity beforehand, without the weights.

Does not deal with tokens, hooks or stores. Files come from `workers.models.checkpoint`, shapes and names from
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
"""Suffixes of names in checkpoints with packed experts (`workers.models.saving`)."""

_PLAIN = (NonDynamicallyQuantizableLinear,)  # of torch's own attention, which reads the matrix: never quantized

SCALES_OF_ACTIVATIONS = (".input_scale", ".k_scale", ".v_scale")
"""Suffixes of names in published fp8 checkpoints that are not used: here each token has its own scale."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, without gradients and without the language-model head."""

    folder: Path
    """The checkpoint's folder on this machine, which also holds the tokenizer's files."""
    model: nn.Module
    """transformers' base model; called with ``input_ids`` and ``use_cache=False``."""
    routers: dict[int, nn.Module]
    """Maps the model's own layer numbers, ascending, to the modules that choose experts."""
    num_experts: int
    """Number of experts of each layer that has a router."""
    experts_per_token: int
    """Number of experts that a router chooses for each token."""
    provenance: dict[str, Any]
    """The fields of `ModelDescription`, then facts about this load (only JSON values)."""


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
    """Load a model for capturing, and prove that it was loaded as requested.

    Parameters
    ----------
    model
        An existing folder with a checkpoint, or a hub id.
    revision
        Branch, tag or commit of a hub model.
    quantization
        Applied while loading: ``nf4`` and ``fp4`` (double quantization, blocks of 64), ``fp8`` (e4m3 with one scale per
        row), ``int8`` (LLM.int8), or ``none``. An already quantized checkpoint (`workers.models.saving`, transformers
        with routers excluded, ``mxfp4``, or ``fp8``: e4m3 with one scale per matrix, row or block) is loaded unchanged
        and must have the requested quantization. One that was published in mxfp4 or in fp8 with blocks may be quantized
        again, to ``nf4`` or ``fp4``.
    dtype
        Compute dtype: ``float32``, ``bfloat16`` or ``float16``; by default float32 on a CPU, otherwise bfloat16.
    quantize_gates
        Round the routers' weights to `quantization` too, as transformers 4 does by default.
    matmul
        Precision of products with quantized matrices: ``bf16``, which means `dtype`, or ``fp8``.
    expert_backend
        ``unfused`` computes experts in 4 bits or fp8 like the versions before packed experts, and ``grouped`` leaves
        attention to transformers like the versions before a family's present forward pass. Captures that those versions
        started resume with it.
    device
        The device on which the model is loaded.
    gpus
        Number of GPUs over which its layers are spread, starting with `device`; more than one if one is too small.

    Returns
    -------
    LoadedModel
        A model for any number of calls of `capture_texts`.

    Raises
    ------
    ValueError
        If the checkpoint, the device or the result is not what was requested.
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
                f"{checkpoint.model} in {quantization} needs {weight_bytes // gpus:,} bytes for its weights, but "
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
    """The device with its index; a ValueError if there is none."""
    target = torch.device(device)
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device {device} was requested, but torch {torch.__version__} sees no GPU")
        return target if target.index is not None else torch.device("cuda", torch.cuda.current_device())
    if target.type != "cpu":
        raise ValueError(f"device {device} is neither cuda nor cpu")
    return target


def _devices(first: torch.device, gpus: int) -> list[torch.device]:
    """A number of devices, starting with the first one."""
    if gpus == 1:
        return [first]
    if gpus < 1 or first.type != "cuda":
        raise ValueError(f"{gpus} GPUs from {first} on were requested, but there must be at least 1")
    start, there = first.index or 0, torch.cuda.device_count()
    if start + gpus > there:
        raise ValueError(f"{gpus} GPUs from {first} on were requested, but torch sees {there}")
    return [torch.device("cuda", start + number) for number in range(gpus)]


def layer_devices(skeleton: nn.Module, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """The device of each module, as transformers' `device_map`: layers in equal parts, and everything else with the
    first layers.

    Raises
    ------
    ValueError
        When the model does not have exactly one stack of layers.
    """
    if len(devices) == 1:
        return {"": devices[0]}
    stacks = {name: child for name, child in skeleton.named_children() if isinstance(child, nn.ModuleList)}
    if list(stacks) != ["layers"]:
        raise ValueError(
            f"{type(skeleton).__name__} cannot be spread over GPUs: its stacks of layers are {list(stacks)}, not one"
        )
    placed = {name: devices[0] for name, _ in skeleton.named_children() if name != "layers"}
    many = len(stacks["layers"])
    return placed | {f"layers.{number}": devices[number * len(devices) // many] for number in range(many)}


def _from_pretrained(
    checkpoint: Checkpoint, description: ModelDescription, devices: Sequence[torch.device], dtype: torch.dtype
) -> Any:
    """Run transformers' own loader, with quantizable experts, and read its report."""
    quantization, backend = description["quantization"], description["expert_backend"]
    skeleton = build_skeleton(checkpoint, dtype)
    stored = stored_form(checkpoint)
    settings = quantization_config(loaded_form(checkpoint, quantization, description["matmul"]), skeleton, dtype)
    # Passed separately; otherwise an attention implementation that the configuration names, as some published ones do,
    # would be used.
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
    if stored is not None:
        _check_stored(checkpoint, stored, description, dtype)
        # The checkpoint's own settings either agree in everything on which its weights depend, or are the requested
        # ones with another compute dtype.
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
                ignore_mismatched_sizes=True,  # reported below with names, instead of raised without names
                output_loading_info=True,
            )
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{checkpoint.model} in {quantization} does not fit on {', '.join(map(str, devices))}: "
                f"{str(error).split('. ')[0]}; use a larger GPU, more GPUs (--gpus_per_worker), or a smaller "
                "quantization"
            ) from error
        except (RuntimeError, AttributeError) as error:
            if type(error) not in (RuntimeError, AttributeError):  # a lost GPU is handled elsewhere
                raise
            # Experts of different shapes cannot be fused, and a family's own code may use tensors of its experts that
            # are packed here.
            reason = str(error)
            if "CONVERSION" in reason:  # transformers' report, which is not shown, has a page for each tensor
                reason = f"its tensors could not be converted into what {quantization} needs: use --quantization none"
            raise ValueError(f"{checkpoint.folder} could not be loaded ({_versions()}): {reason}") from error
        except ValueError as error:
            raise ValueError(
                f"the model loaded from {checkpoint.folder} is not what was requested ({quantization}; {_versions()}):"
                f" {error}"
            ) from error
    # The base model has no head; nothing else may be missing, unexpected or of another shape.
    report["unexpected_keys"] = {
        key for key in report["unexpected_keys"] if not (_is_head(key) or key.endswith(SCALES_OF_ACTIVATIONS))
    }
    # With a quantizer, transformers 5.17 silently accepts an unquantized tensor of another shape.
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
        raise ValueError(f"{checkpoint.folder} does not match its own configuration ({_versions()}): {listed}")
    return model


def _is_head(name: str) -> bool:
    """Whether a tensor belongs to the language-model head; multimodal models have it next to their text part."""
    return "lm_head" in name.split(".")


def _check_stored(checkpoint: Checkpoint, stored: Stored, description: ModelDescription, dtype: torch.dtype) -> None:
    """Reject a quantized checkpoint if loading the original one would quantize other matrices.

    transformers 4 also quantizes the routers, unless they are named in llm_int8_skip_modules.
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
    found = {name for name in found if not _is_head(name)}  # the head is not loaded
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
    """Keep transformers from printing a report that causes an error here or is expected (no head).

    Its progress bar is shown only in a terminal.
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
    """Reject quantized routers, other matrices that are not quantized, and wrong shapes; count the experts' quantized
    matrices.

    transformers has silently skipped fused experts and silently dropped them (5.0 to 5.6, and see
    `workers.models.quantizer`). Only the parameters themselves show it.
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
            f"the model loaded from {folder} is not what was requested ({quantization}; {_versions()}): "
            f"{len(found)} tensors, first {'; '.join(found[:5])}. If the checkpoint is complete, use the versions "
            "of the lock file, or --quantization none"
        )
    return count


def _refuse_bytes(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """Reject hidden states that a family's code has cast to the dtype of a quantized matrix, which is a dtype of
    bytes."""
    if args[0].dtype.itemsize == 1:
        raise RoutingError(
            f"the model's code gives hidden states of {args[0].dtype} to a quantized matrix ({type(module).__name__}):"
            " it casts them to the matrix's dtype, which destroys them; use --quantization none"
        )


def _shape_fault(linear: nn.Linear) -> str | None:
    """A shape of a Linear's matrix that differs from the configuration, or that bitsandbytes reads wrongly."""
    wanted = (linear.out_features, linear.in_features)
    state = getattr(linear.weight, "quant_state", None)
    found = tuple(linear.weight.shape if state is None else state.shape)
    if found != wanted:
        return f"of shape {found}, not {wanted}"
    if state is not None and linear.weight.device.type == "cpu" and linear.in_features % BLOCK:
        # Some CPUs give wrong values (see `workers.models.kernels.plain_dequantize`); all CPUs must give the same
        # values.
        return f"in 4 bits on a CPU with rows of {linear.in_features} values, not a multiple of {BLOCK}: use a GPU"
    return None


def _gate_fault(parameter: nn.Parameter, description: ModelDescription) -> str | None:
    """How a router's matrix differs from what it should be, or None."""
    wanted = description["compute_dtype"]
    return None if str(parameter.dtype) == f"torch.{wanted}" else f"{parameter.dtype}, not {wanted}"


def _matrix_fault(parameter: torch.Tensor, quantization: str) -> str | None:
    """How another matrix differs from what it should be, or None."""
    kind = type(parameter).__name__
    if quantization in ("none", "mxfp4"):  # in MXFP4 only experts are quantized, which are in stacks
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
    """Versions of the packages that took part in a load, for an error."""
    return ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
