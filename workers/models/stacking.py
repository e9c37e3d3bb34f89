"""Experts' matrices into the common tensors of their layer, one after the other, while a checkpoint is read or written.

Each is quantized as if it were a Linear's, and put in its place: one matrix above the final size at the peak; of a
checkpoint that keeps the experts of a layer in one tensor, one such tensor.

A checkpoint holds experts in one of four ways: each matrix by itself, original or quantized; all of a layer in one
tensor, as transformers' fused module has them, or in MXFP4 in two; or packed, as `workers.models.saving` writes them,
which are plain tensors.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter, WeightRenaming

from workers.models.four_bits import FourBits
from workers.models.fp8 import E4M3, RowScaled, rounded
from workers.models.packed import PackedStack
from workers.models.packing import FUSED, Place, fusing_converters, pack_skeleton
from workers.models.published import BlockScaled, Mxfp4, restored_matrix
from workers.models.quantizing import QuantState, packed_in_four_bits
from workers.models.stored import BLOCK, E4M3_FORMS, MX_BLOCK, PUBLISHED, SCALE_BLOCK, Stored

Matrix = FourBits | RowScaled | Mxfp4 | BlockScaled


class Reader(NamedTuple):
    """A matrix from its parts in a checkpoint."""

    form: str
    """What it becomes: a key of `workers.models.packed.STACKS`."""
    stored: Stored | None
    """What the checkpoint holds."""
    dtype: torch.dtype
    """The compute dtype: of a matrix that is stored otherwise, before it is quantized again."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """What the names of its parts end in."""
        if self.stored is None:
            return ("",)
        if self.stored.form == "mxfp4":
            return ("_blocks", "_scales")
        if self.stored.form in E4M3_FORMS:
            return ("", self.stored.scale)
        state = f".quant_state.bitsandbytes__{self.stored.form}"
        return ("", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", state)

    def read(self, shape: tuple[int, int], *parts: torch.Tensor) -> Matrix:
        """A matrix that should be of some shape.

        Raises
        ------
        ValueError
            When it is not, or is quantized otherwise.
        """
        if self.stored is None:
            _refuse_shape(tuple(parts[0].shape), shape)
            return quantized(parts[0], self.form)
        found = self._as_stored(self.stored.form, shape, *parts)
        if self.form == self.stored.form or not isinstance(found, (Mxfp4, BlockScaled)):
            return found
        return quantized(restored_matrix(found, self.dtype), self.form)

    def _as_stored(self, form: str, shape: tuple[int, int], *parts: torch.Tensor) -> Matrix:
        if form == "mxfp4":
            return mxfp4_of(*parts, shape=shape)
        if form == "fp8_blocks":
            return blocks_of(*parts, shape=shape)
        matrix, *others = parts
        if form == "fp8":
            refuse_other_e4m3(matrix, shape)
            return RowScaled(matrix, one_a_row(others[0], matrix.shape[0])[:, None])
        if matrix.dtype != torch.uint8:  # bitsandbytes may keep the bytes as numbers of another type
            raise ValueError(f"is stored in {matrix.dtype}, not in bytes (bnb_4bit_quant_storage)")
        state = QuantState.from_dict(
            {suffix[1:]: part for suffix, part in zip(self.suffixes[1:], others, strict=True)}, matrix.device
        )
        if fault := state_fault(state, form):
            raise ValueError(f"is {fault}")
        _refuse_shape(tuple(state.shape), shape)
        return FourBits.from_state(matrix, state)


def mxfp4_of(blocks: torch.Tensor, scales: torch.Tensor, *, shape: tuple[int, int]) -> Mxfp4:
    """A matrix as gpt-oss is published: uint8 (R, C/32, 16) and (R, C/32).

    Raises
    ------
    ValueError
        When it is of another shape or dtype.
    """
    rows, columns = shape
    wanted = (rows, columns // MX_BLOCK, MX_BLOCK // 2), (rows, columns // MX_BLOCK)
    found = tuple(blocks.shape), tuple(scales.shape)
    if found != wanted or {blocks.dtype, scales.dtype} != {torch.uint8}:
        raise ValueError(
            f"has blocks of {blocks.dtype} {found[0]} and scales of {scales.dtype} {found[1]}, not of torch.uint8"
            f" {wanted[0]} and {wanted[1]}"
        )
    return Mxfp4(blocks.reshape(1, rows, -1), scales[None])


def blocks_of(values: torch.Tensor, scale: torch.Tensor, *, shape: tuple[int, int]) -> BlockScaled:
    """A matrix in e4m3 (R, C) with floating-point scales (⌈R/128⌉, ⌈C/128⌉).

    Raises
    ------
    ValueError
        When it is of another shape or dtype.
    """
    refuse_other_e4m3(values, shape)
    wanted = tuple(-(-size // SCALE_BLOCK) for size in shape)
    if tuple(scale.shape) != wanted or scale.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"has scales of {scale.dtype} {tuple(scale.shape)}, not of float32 or bfloat16 {wanted}")
    return BlockScaled(values[None], scale.float()[None])


def refuse_other_e4m3(matrix: torch.Tensor, shape: tuple[int, int]) -> None:
    """A ValueError where a matrix is not in e4m3, or of another shape."""
    _refuse_shape(tuple(matrix.shape), shape)
    if matrix.dtype != E4M3:
        raise ValueError(f"is of {matrix.dtype}, not e4m3")


def quantized(matrix: torch.Tensor, form: str) -> FourBits | RowScaled:
    """A matrix in nf4, fp4 or fp8, where it lies."""
    if form == "fp8":
        return rounded(matrix.contiguous())
    return FourBits.from_state(*packed_in_four_bits(matrix, form))


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
    end
        Of the patterns, behind what the names of a matrix's parts end in.
    """

    def __init__(self, sources: list[str], target: str, reader: Reader, end: str = "") -> None:
        self.ends = [f"{suffix}{end}" for suffix in reader.suffixes]
        self.end = end
        parts = [f"{source}{each}" for source in sources for each in self.ends]
        super().__init__(sorted(parts, key=len, reverse=True), [target], operations=[reader])
        self.sources = sources

    def __deepcopy__(self, _: Any) -> "Packing":
        """transformers copies it for each tensor, and nothing in it changes but what a copy collects."""
        return Packing(self.sources, self.target_patterns[0], self.operations[0], self.end)

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
        if "*" not in self.sources[0]:
            loads = [self.collected_tensors.pop(f"{self.sources[0]}{end}", [None])[0] for end in self.ends]
            if None in loads:
                return
            whole = [_read(load) for load in loads]
            each: list[Iterable[torch.Tensor]] = [*whole] if len(whole) > 1 else [matrices_of(whole[0], stack)]
            for matrix in zip(*each, strict=True):
                yield self.sources[0], list(matrix)
            return
        waiting = [
            [iter(_taken(self.collected_tensors.pop(f"{source}{end}", []))) for end in self.ends]
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


class Restoring(WeightConverter):  # type: ignore[misc]
    """Reads what is no expert's of a published checkpoint: as it is stored, or made into what the module holds.

    Parameters
    ----------
    quantizer
        transformers' quantizer, one of ours.
    """

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer
        scale = quantizer._stored.scale
        sources = ["weight$", f"weight{scale}$"] if scale else ["weight$"]
        super().__init__(sources, ["weight"], operations=[quantizer])

    def __deepcopy__(self, _: Any) -> "Restoring":
        """transformers copies it for each tensor, and nothing in it changes but what a copy collects."""
        return Restoring(self.quantizer)

    def convert(self, layer_name: str, model: Any = None, **others: Any) -> dict[str, torch.Tensor]:
        """The tensors of a module, by name.

        Raises
        ------
        ValueError
            When a matrix is another one than it should be.
        """
        module, (_, dtype) = model.get_submodule(layer_name.rpartition(".")[0]), self.quantizer._kind()
        weight, *scales = (_read(self.collected_tensors[source][0]) for source in sorted(self.collected_tensors))
        if scales:
            try:
                blocks = blocks_of(weight, scales[0], shape=(module.out_features, module.in_features))
            except ValueError as error:
                raise ValueError(f"{layer_name} {error}") from None
            if type(module).__name__ == "BlockScaledLinear":
                return {layer_name: blocks.values[0], f"{layer_name}_scale_inv": blocks.scale[0]}
            weight = restored_matrix(blocks, dtype)
        if type(module).__name__ not in ("Linear4bit", "RowScaledLinear"):
            return {layer_name: weight}
        given, quantize = {layer_name: weight.to(dtype)}, self.quantizer.get_quantize_ops().convert
        made: dict[str, torch.Tensor] = quantize(given, full_layer_name=layer_name, model=model)
        return made


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
    """What quantizers add to their stock counterpart: experts in common tensors.

    To transformers every checkpoint that is quantized is one that needs no quantizing, so that it hands each tensor
    over in the dtype that it is stored in; what is held otherwise than it is stored is made here.

    Parameters
    ----------
    stored
        In what the checkpoint holds matrices; None where they are not quantized.
    """

    def __init__(self, *arguments: Any, stored: Stored | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stored = stored

    def _kind(self) -> tuple[str, torch.dtype]:
        """The form that experts are held in, and the compute dtype."""
        raise NotImplementedError

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        form, dtype = self._kind()
        pack_skeleton(model, form, dtype)
        if self._stored is None or self._stored.form != form:
            for module in list(model.modules()):
                if isinstance(module, PackedStack):
                    module.register_buffer(WAITING, torch.empty(0, dtype=dtype, device="meta"))
        super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> Any:
        """Have experts packed where they would be fused (transformers passes the model from 5.11 or so on)."""
        form, dtype = self._kind()
        fusing = fusing_converters(weight_conversions)
        reader = Reader(form, self._stored, dtype)
        as_stored = self._stored is not None and self._stored.form == form
        first = WAITING if not as_stored else "values" if form in E4M3_FORMS else "packed"
        packing: list[Any] = []
        for stack, leaf in FUSED.items():
            if self._stored is None or self._stored.form == "mxfp4":
                packing.append(Packing([rf"\.{leaf}"], f".{stack}.{first}", reader, end="$"))
            packing.append(WeightRenaming(rf"\.{leaf}_bias$", f".{stack}_bias"))
            if leaf in fusing:
                target = fusing[leaf].target_patterns[0].removesuffix(leaf)
                packing.append(Packing(fusing[leaf].source_patterns, f"{target}{stack}.{first}", reader))
        kept = [each for each in weight_conversions if all(each is not one for one in fusing.values())]
        if self._stored is not None and self._stored.form in PUBLISHED:
            kept.append(Restoring(self))
        return [*packing, *super().update_weight_conversions(kept, *model)]  # type: ignore[misc]

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Also what decides in which dtype a tensor is read, and whether another shape is an error."""
        if isinstance(model.get_submodule(param_name.rpartition(".")[0]), PackedStack):
            return self._stored is None
        needed: bool = super().param_needs_quantization(model, param_name, **kwargs)  # type: ignore[misc]
        return needed

    def get_new_dtype(self, converter: Any, *arguments: Any) -> Any:
        """In which dtype a tensor of a quantized checkpoint is read; None is its own."""
        if isinstance(converter, (Packing, Restoring)):
            return None
        return super().get_new_dtype(converter, *arguments)  # type: ignore[misc]
