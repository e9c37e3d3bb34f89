"""Experts' matrices into the common tensors of their layer, one after the other, while a checkpoint is read or written.

Each is quantized as if it were a Linear's, and put in its place: one matrix above the final size at the peak; of a
checkpoint that keeps the experts of a layer in one tensor, one such tensor.

A checkpoint holds experts in one of four ways: each matrix by itself, original or quantized; all of a layer in one
tensor, as transformers' fused module has them; or packed, as `workers.models.saving` writes them, which are plain
tensors.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming

from workers.models.four_bits import FourBits
from workers.models.fp8 import E4M3, RowScaled, rounded
from workers.models.packed import PackedStack
from workers.models.packing import FUSED, Place, fusing_converters, pack_skeleton
from workers.models.quantizing import QuantState, packed_in_four_bits
from workers.models.stored import BLOCK


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
            f"has scales of shape {tuple(scale.shape)}, which is neither one scale nor one a row of {rows}"
        )
    return scale.flatten().float().expand(rows).contiguous()


def _refuse_shape(found: tuple[int, ...], wanted: tuple[int, int]) -> None:
    if found != wanted:
        raise ValueError(f"is of shape {found}, not {wanted}")


def matrices_of(fused: torch.Tensor, stack: PackedStack) -> Iterator[torch.Tensor]:
    """The matrices of a tensor (experts, rows, columns) that has all of a stack, in order."""
    for expert in fused:
        yield from (expert.T if stack.transposed else expert).chunk(stack.parts)


WAITING = "waiting"
"""Of a `PackedStack`, until it is made from the original: transformers up to 5.17 reads matrices in its dtype."""


class Packing(WeightConverter):  # type: ignore[misc]
    """Makes a stack of a layer's matrices, one after the other.

    Parameters
    ----------
    sources
        Patterns of the matrices' names, with * for the expert's number; or one, of a tensor with all of them.
    target
        Of a tensor of a `PackedStack`.
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

    def convert(
        self, layer_name: str, model: Any = None, loading_info: Any = None, **_: Any
    ) -> dict[str, torch.Tensor]:
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
            parts.clear()  # before the next one is read
        if found != many:
            raise ValueError(f"{name} has {found} matrices in the checkpoint, and {many} in the configuration")
        if layer_name.endswith(f".{WAITING}"):
            delattr(stack, WAITING)
            loading_info.missing_keys.discard(layer_name)
        return {f"{name}.{leaf}": tensor for leaf, tensor in stack.named_buffers()}

    def _matrices(self, stack: PackedStack) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """The parts of each matrix, read when it is asked for."""
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
                there = [part for part in (next(part, None) for part in parts) if part is not None]
                if len(there) < len(parts):
                    return
                yield source.replace("*", str(expert)), there
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


class StackWriter:
    """Stacks of a layer's experts, made one matrix after the other, to be written to a checkpoint.

    Parameters
    ----------
    skeleton
        After `pack_skeleton`.
    places
        Where each tensor of the original goes, by its name there.
    device, dtype
        Where each matrix is quantized, and what it is cast to before.
    """

    def __init__(
        self, skeleton: Any, places: dict[str, Place], quantization: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.skeleton, self.places, self.quantization = skeleton, places, quantization
        self.device, self.dtype = device, dtype
        self._found: dict[str, int] = {}

    def take(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keep what a tensor of the original holds; the stack's tensors, once it is whole."""
        own, number = self.places[name]
        stack: Any = self.skeleton.get_submodule(own)
        matrices = [tensor] if number is not None else matrices_of(tensor, stack)
        for at, matrix in enumerate(matrices, number or 0):
            made = quantized(matrix.to(self.device, self.dtype), self.quantization)
            stack.take(at, type(made)(*(part.cpu() for part in made)))
            self._found[own] = self._found.get(own, 0) + 1
        if self._found[own] < stack.experts * stack.parts:
            return {}
        whole = {leaf: part for leaf, part in stack.named_buffers() if leaf != WAITING}
        stack.to("meta")
        return {f"{self.skeleton.base_model_prefix}.{own}.{leaf}": part for leaf, part in whole.items()}


class PacksExperts:
    """What quantizers add to their stock counterpart: experts in common tensors."""

    def _kind(self) -> tuple[str, torch.dtype]:
        """nf4, fp4 or fp8, and the compute dtype."""
        raise NotImplementedError

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        kind, dtype = self._kind()
        pack_skeleton(model, kind, dtype)
        if not self.pre_quantized:  # type: ignore[attr-defined]
            for module in list(model.modules()):
                if isinstance(module, PackedStack):
                    module.register_buffer(WAITING, torch.empty(0, dtype=dtype, device="meta"))
        super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> Any:
        """Have experts packed where they would be fused (transformers passes the model from 5.11 or so on)."""
        kind, _ = self._kind()
        fusing = fusing_converters(weight_conversions)
        stored = self.pre_quantized  # type: ignore[attr-defined]
        first = WAITING if not stored else "values" if kind == "fp8" else "packed"
        packing: list[Any] = []
        for stack, leaf in FUSED.items():
            if not stored:
                packing.append(Packing([rf"\.{leaf}$"], f".{stack}.{first}", Reader(kind, stored)))
            packing.append(WeightRenaming(rf"\.{leaf}_bias$", f".{stack}_bias"))
            if leaf in fusing:
                target = fusing[leaf].target_patterns[0].removesuffix(leaf)
                packing.append(Packing(fusing[leaf].source_patterns, f"{target}{stack}.{first}", Reader(kind, stored)))
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
