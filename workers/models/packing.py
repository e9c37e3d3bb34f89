"""The experts of a layer into common tensors, while a checkpoint is read.

transformers 5 keeps the experts of a layer as two fused three-dimensional parameters; bitsandbytes quantizes Linears
and passes those by without a word (bitsandbytes issue 1849), so that Mixtral 8x7B loads into 91 GB where 24.5 are
expected. Here `PackedExperts` take the place of each fused module while the model is on the meta device, and `Packing`
that of transformers' converters: it quantizes one matrix after the other, as if it were a Linear's, and puts each in
its place, one matrix above the final size at the peak; of a checkpoint that keeps a layer's experts in one tensor, one
such tensor.

A checkpoint holds experts in one of four ways: each matrix by itself, original or quantized; all of a layer in one
tensor, as the fused module has them; or packed, as `workers.models.saving` writes them, which are plain tensors.

Promises: a module that comes out computes what the fused one computes, which says of itself whether its matrices are
transposed, have biases, and how they are gated. Does not know routers or devices.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, WeightRenaming
from transformers.integrations.moe import _default_apply_gate

from workers.models.experts import PackedExperts
from workers.models.four_bits import FourBits
from workers.models.fp8 import E4M3, RowScaled, rounded
from workers.models.packed import PackedStack, Stack4bit, StackE4m3
from workers.models.products import Products
from workers.models.quantizing import QuantState, packed_in_four_bits
from workers.models.stored import BLOCK

FUSED = {"both": "gate_up_proj", "down": "down_proj"}
"""Names of `PackedExperts`' stacks → of transformers' fused parameters."""


# --- One matrix -------------------------------------------------------------------------------------------------------


class Reader(NamedTuple):
    """A matrix from its parts in a checkpoint."""

    quantization: str
    """nf4, fp4 or fp8."""
    stored: bool
    """Whether the checkpoint holds it quantized."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of its parts end in."""
        if not self.stored:
            return ("",)
        if self.quantization == "fp8":
            return ("", "_scale")
        state = f".quant_state.bitsandbytes__{self.quantization}"
        return ("", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", state)

    def read(self, shape: tuple[int, int], matrix: torch.Tensor, *others: torch.Tensor) -> FourBits | RowScaled:
        """A matrix that should be of some shape.

        Raises
        ------
        ValueError
            When it is not, or is quantized otherwise.
        """
        if not self.stored or self.quantization == "fp8":
            _refuse_shape(tuple(matrix.shape), shape)
        if not self.stored:
            return quantized(matrix, self.quantization)
        if self.quantization == "fp8":
            if matrix.dtype != E4M3:
                raise ValueError(f"is of {matrix.dtype}, not e4m3")
            return RowScaled(matrix, one_a_row(others[0], matrix.shape[0])[:, None])
        if matrix.dtype != torch.uint8:  # bitsandbytes may keep the bytes as numbers of another type
            raise ValueError(f"is stored in {matrix.dtype}, not in bytes (bnb_4bit_quant_storage)")
        state = QuantState.from_dict(
            {suffix[1:]: part for suffix, part in zip(self.suffixes[1:], others, strict=True)}, matrix.device
        )
        if fault := state_fault(state, self.quantization):
            raise ValueError(f"is {fault}")
        _refuse_shape(tuple(state.shape), shape)
        return FourBits.from_state(matrix, state)


def quantized(matrix: torch.Tensor, quantization: str) -> FourBits | RowScaled:
    """A matrix in nf4, fp4 or fp8, where it lies."""
    if quantization == "fp8":
        return rounded(matrix.contiguous())
    return FourBits.from_state(*packed_in_four_bits(matrix, quantization))


def state_fault(state: Any, quantization: str) -> str | None:
    """How a matrix in 4 bits is quantized instead of as it should be, or None."""
    found, wanted = (state.quant_type, state.blocksize, bool(state.nested)), (quantization, BLOCK, True)
    return None if found == wanted else f"quantized as (type, block, double) = {found}, not {wanted}"


def one_a_row(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """The scales of a matrix in e4m3, one a row, float32, where the checkpoint may have one for all.

    Raises
    ------
    ValueError
        When it has other scales.
    """
    if scale.numel() not in (1, rows):
        raise ValueError(
            f"has {rows} rows and scales of shape {tuple(scale.shape)}, which is neither one scale nor one a row"
        )
    return scale.flatten().float().expand(rows).contiguous()


def _refuse_shape(found: tuple[int, ...], wanted: tuple[int, int]) -> None:
    if found != wanted:
        raise ValueError(f"is of shape {found}, not {wanted}")


# --- The model on the meta device -------------------------------------------------------------------------------------


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """transformers' modules, by name, that hold the experts of a layer as fused parameters."""
    return {
        name: module
        for name, module in model.named_modules()
        if set(FUSED.values()) <= {leaf for leaf, _ in module.named_parameters(recurse=False)}
        and module.get_parameter("gate_up_proj").ndim == 3
    }


def pack_skeleton(model: nn.Module, quantization: str, dtype: torch.dtype) -> None:
    """Replace every fused experts module of a model on the meta device, in place.

    Parameters
    ----------
    dtype
        The compute dtype.

    Raises
    ------
    ValueError
        When a module does what `PackedExperts` do not, or a matrix does not fill blocks of 64 values.
    """
    fused, products = fused_experts(model), Products(dtype)
    if fused:
        expert_leaves(model)  # for its checks
    for name, module in fused.items():
        if "has_bias" not in vars(module) or getattr(module, "has_post_expert_norm", False):
            raise ValueError(
                f"{name} ({type(module).__name__}) does not say what its experts compute, or says that a norm follows"
                f" each, which {quantization} does not know; use --quantization none"
            )
        both, down = (_stack(module.get_parameter(leaf), module, quantization) for leaf in FUSED.values())
        biased = dtype if module.has_bias else None
        model.set_submodule(name, PackedExperts(both, down, _gate(module), products, biased))


def _stack(parameter: torch.Tensor, fused: Any, quantization: str) -> PackedStack:
    """For a fused parameter; gate and up are quantized each by itself where one lies above the other."""
    experts, rows, columns = parameter.mT.shape if fused.is_transposed else parameter.shape
    parts = 2 if parameter is fused.gate_up_proj and fused.is_concatenated else 1
    shape = experts, parts, rows // parts, columns
    if quantization == "fp8":
        return StackE4m3(shape, transposed=fused.is_transposed)
    if rows // parts * columns % BLOCK:
        raise ValueError(f"an expert's matrix of shape {shape[2:]} does not fill blocks of {BLOCK} values")
    return Stack4bit(shape, transposed=fused.is_transposed)


def _gate(fused: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What `PackedExperts` take: nothing for the plain one with SiLU, else the module's own function."""
    silu = type(getattr(fused, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")  # torch's, transformers' own
    if silu and type(fused)._apply_gate is _default_apply_gate:
        return None
    for leaf, _ in list(fused.named_parameters(recurse=False)):
        setattr(fused, leaf, None)
    gate: Callable[[torch.Tensor], torch.Tensor] = fused._apply_gate
    return gate


# --- Names ------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an expert's matrix goes."""

    stack: str
    """The model's name of it."""
    number: int | None
    """Of its matrices; None where the tensor has all of them."""


def expert_leaves(model: Any) -> dict[str, list[str]]:
    """What checkpoints call the matrices of an expert, by stack, in order; none where they keep them in one tensor.

    Read from transformers' conversion mapping.

    Raises
    ------
    ValueError
        When they keep them in a way that is not read here.
    """
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    fusing = fusing_converters(mapping)
    targets = [transform.target_patterns for transform in mapping if isinstance(transform, WeightConverter)]
    unknown = {target.rpartition(".")[2] for patterns in targets for target in patterns} & set(FUSED.values())
    if unknown != set(fusing) or len(fusing) == 1:
        raise ValueError(
            f"the checkpoints of {type(model).__name__} keep the experts' matrices in a way that is not read here"
            f" ({', '.join(sorted(unknown))}), so that they cannot be quantized; use --quantization none"
        )
    return {
        stack: [pattern.removesuffix(".weight").rpartition(".")[2] for pattern in fusing[leaf].source_patterns]
        for stack, leaf in FUSED.items()
        if leaf in fusing
    }


def fusing_converters(transforms: list[Any]) -> dict[str, Any]:
    """The converters that stack single experts into one parameter, by the last part of its name."""
    return {
        transform.target_patterns[0].rpartition(".")[2]: transform
        for transform in transforms
        if isinstance(transform, WeightConverter)
        and any(isinstance(operation, MergeModulelist) for operation in transform.operations)
        and transform.target_patterns[0].rpartition(".")[2] in FUSED.values()
    }


def expert_places(skeleton: Any) -> dict[str, Place]:
    """Where each tensor with experts' matrices goes, whichever way a checkpoint holds them, by the model's names.

    Parameters
    ----------
    skeleton
        After `pack_skeleton`.
    """
    packed = {name: module for name, module in skeleton.named_modules() if isinstance(module, PackedExperts)}
    leaves = expert_leaves(skeleton) if packed else {}
    places = {}
    for name, experts in packed.items():
        for place, fused in FUSED.items():
            stack = f"{name}.{place}"
            places[f"{name}.{fused}"] = places[f"{stack}.packed"] = Place(stack, None)
            each = leaves.get(place, [])
            for number in range(len(experts) * len(each)):
                expert, part = divmod(number, len(each))
                places[f"{name}.{expert}.{each[part]}.weight"] = Place(stack, number)
    return places


# --- Reading ----------------------------------------------------------------------------------------------------------


def matrices_of(fused: torch.Tensor, stack: PackedStack) -> Iterator[torch.Tensor]:
    """The matrices of a tensor (experts, rows, columns) that has all of a stack, in order."""
    for expert in fused:
        yield from (expert.T if stack.transposed else expert).chunk(stack.parts)


class Packing(WeightConverter):  # type: ignore[misc]
    """Makes a stack of a layer's matrices, one after the other, instead of what `fusing` makes of all together.

    Parameters
    ----------
    sources
        Patterns of the matrices' names, with * for the expert's number; or one, of a tensor with all of them.
    target
        Of the first tensor of a `PackedStack`.
    reader
        What makes a matrix of each.
    """

    def __init__(self, sources: list[str], target: str, reader: Reader) -> None:
        parts = [f"{source}{suffix}" for source in sources for suffix in reader.suffixes]
        super().__init__(sorted(parts, key=len, reverse=True), [target], operations=[reader])
        self.sources = sources

    def __deepcopy__(self, _: Any) -> "Packing":
        """transformers copies it for each tensor, and nothing in it changes but what a copy collects."""
        return Packing(self.sources, self.target_patterns[0], self.operations[0])

    def convert(self, layer_name: str, model: Any = None, **_: Any) -> dict[str, torch.Tensor]:
        """The stack's tensors by name.

        Raises
        ------
        ValueError
            When a matrix is missing, or is another one than it should be.
        """
        name = layer_name.rpartition(".")[0]
        stack, reader = model.get_submodule(name), self.operations[0]
        shape = stack.rows // stack.parts, stack.columns
        many = stack.experts * stack.parts
        found = 0
        for number, (source, parts) in enumerate(self._matrices(stack)):
            found = number + 1
            if number < many:
                try:
                    stack.take(number, reader.read(shape, *parts))
                except ValueError as error:
                    raise ValueError(f"matrix {number} of {name} ({source}) {error}") from None
        if found != many:
            raise ValueError(f"{name} has {found} matrices in the checkpoint, and {many} in the configuration")
        return {f"{name}.{leaf}": tensor for leaf, tensor in stack.named_buffers()}

    def _matrices(self, stack: PackedStack) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """The parts of each matrix, read when it is asked for, and let go with the next one."""
        suffixes = self.operations[0].suffixes
        if len(suffixes) == 1 and "*" not in self.sources[0]:
            [load] = self.collected_tensors.pop(self.sources[0])
            for matrix in matrices_of(_read(load), stack):
                yield self.sources[0], [matrix]
            return
        waiting = [
            [iter(_taken(self.collected_tensors.pop(f"{source}{suffix}", []))) for suffix in suffixes]
            for source in self.sources
        ]
        expert = 0
        while True:
            for source, parts in zip(self.sources, waiting, strict=True):
                matrix = [next(part, None) for part in parts]
                if any(part is None for part in matrix):
                    return
                yield source.replace("*", str(expert)), [part for part in matrix if part is not None]
            expert += 1


def _taken(tensors: list[Any]) -> Iterator[torch.Tensor]:
    """Each of a list, which keeps none."""
    for at, load in enumerate(tensors):
        tensors[at] = None
        yield _read(load)
        del load


def _read(load: Any) -> torch.Tensor:
    """What transformers collected: a call that reads, or the result of a thread that does."""
    tensor: torch.Tensor = load() if callable(load) else load.result()
    return tensor


class PacksExperts:
    """What quantizers add to their stock counterpart: experts in common tensors."""

    def _kind(self) -> tuple[str, torch.dtype]:
        """nf4, fp4 or fp8, and the compute dtype."""
        raise NotImplementedError

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        pack_skeleton(model, *self._kind())
        super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> Any:
        """Have experts packed where they would be fused (transformers passes the model from 5.11 or so on)."""
        kind, _ = self._kind()
        fusing = fusing_converters(weight_conversions)
        reader = Reader(kind, self.pre_quantized)  # type: ignore[attr-defined]
        first = "values" if kind == "fp8" else "packed"
        packing: list[Any] = []
        for stack, leaf in FUSED.items():
            packing.append(Packing([rf"\.{leaf}$"], f".{stack}.{first}", Reader(kind, False)))
            packing.append(WeightRenaming(rf"\.{leaf}_bias$", f".{stack}_bias"))
            if leaf in fusing:
                target = fusing[leaf].target_patterns[0].removesuffix(leaf)
                packing.append(Packing(fusing[leaf].source_patterns, f"{target}{stack}.{first}", reader))
        kept = [each for each in weight_conversions if all(each is not one for one in fusing.values())]
        return [*packing, *super().update_weight_conversions(kept, *model)]  # type: ignore[misc]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Also what decides in which dtype a tensor is read, and whether another shape is an error."""
        if isinstance(model.get_submodule(param_name.rpartition(".")[0]), PackedStack):
            return not self.pre_quantized  # type: ignore[attr-defined]
        needed: bool = super().param_needs_quantization(model, param_name, **kwargs)  # type: ignore[misc]
        return needed

    def get_new_dtype(self, converter: Any, *arguments: Any) -> Any:
        """In which dtype a tensor of a quantized checkpoint is read; None is its own."""
        if isinstance(converter, Packing):
            return None
        return super().get_new_dtype(converter, *arguments)  # type: ignore[misc]
