"""Put experts' matrices into the common tensors of their layer, one by one, while a checkpoint is read or written.

Each matrix is quantized as if it were a Linear's and put in its place. The peak is one matrix above the final size or,
for a checkpoint with the experts of a layer in one tensor, one such tensor.

A checkpoint holds experts in one of four ways: each matrix by itself, original or quantized; all matrices of a layer in
one tensor, as in transformers' fused module; the same in two tensors, in MXFP4; or packed as by
`workers.models.saving`, in plain tensors.
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
    """Builds a matrix from its parts in a checkpoint."""

    form: str
    """The resulting form: a key of `workers.models.packed.STACKS`."""
    stored: Stored | None
    """What the checkpoint holds."""
    dtype: torch.dtype
    """The compute dtype, to which a matrix in another form is cast before it is quantized again."""

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the names of its parts."""
        if self.stored is None:
            return ("",)
        if self.stored.form == "mxfp4":
            return ("_blocks", "_scales")
        if self.stored.form in E4M3_FORMS:
            return ("", self.stored.scale)
        state = f".quant_state.bitsandbytes__{self.stored.form}"
        return ("", ".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map", state)

    def read(self, shape: tuple[int, int], *parts: torch.Tensor) -> Matrix:
        """Build a matrix that should have a given shape.

        Raises
        ------
        ValueError
            When its shape or its quantization differs.
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
    """A matrix in the published form of gpt-oss: uint8 (R, C/32, 16) and (R, C/32).

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
    """Raise a ValueError if a matrix is not in e4m3 or has another shape."""
    _refuse_shape(tuple(matrix.shape), shape)
    if matrix.dtype != E4M3:
        raise ValueError(f"is of {matrix.dtype}, not e4m3")


def quantized(matrix: torch.Tensor, form: str) -> FourBits | RowScaled:
    """Quantize a matrix to nf4, fp4 or fp8 on its device."""
    if form == "fp8":
        return rounded(matrix.contiguous())
    return FourBits.from_state(*packed_in_four_bits(matrix, form))


def state_fault(state: Any, quantization: str) -> str | None:
    """How the quantization of a matrix in 4 bits differs from what it should be, or None."""
    found, wanted = (state.quant_type, state.blocksize, bool(state.nested)), (quantization, BLOCK, True)
    return None if found == wanted else f"quantized as (type, block, double) = {found}, not {wanted}"


def one_a_row(scale: torch.Tensor, rows: int) -> torch.Tensor:
    """The scales of a matrix in e4m3, one per row, float32. The checkpoint may have one scale for all rows.

    Raises
    ------
    ValueError
        When it has other scales.
    """
    if scale.numel() not in (1, rows):
        raise ValueError(
            f"has scales of shape {tuple(scale.shape)}, which is neither one scale nor one for each of {rows} rows"
        )
    return scale.flatten().float().expand(rows).contiguous()


def _refuse_shape(found: tuple[int, ...], wanted: tuple[int, int]) -> None:
    if found != wanted:
        raise ValueError(f"is of shape {found}, not {wanted}")


def matrices_of(fused: torch.Tensor, stack: PackedStack) -> Iterator[torch.Tensor]:
    """The matrices, in order, of a tensor (experts, rows, columns) that holds a whole stack."""
    for expert in fused:
        yield from (expert.T if stack.transposed else expert).chunk(stack.parts)


WAITING = "waiting"
"""The dtype of a `PackedStack` before it is made from the original: transformers up to 5.17 reads matrices in this
dtype."""


class Packing(WeightConverter):  # type: ignore[misc]
    """Builds a stack from a layer's matrices, one by one.

    Parameters
    ----------
    sources
        Patterns of the matrices' names, with * for the expert's number; or one pattern, of a tensor with all of them.
    target
        Name of a tensor of a `PackedStack`.
    reader
        Builds each matrix.
    end
        The end of the patterns, after the suffixes of the names of a matrix's parts.
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
            When a matrix is missing, or is not what it should be.
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
            parts.clear()  # freed before the next one is read
        if found != many:
            raise ValueError(f"{name} has {found} matrices in the checkpoint, but {many} in the configuration")
        if layer_name.endswith(f".{WAITING}"):
            delattr(stack, WAITING)
            loading_info.missing_keys.discard(layer_name)
        return {f"{name}.{leaf}": tensor for leaf, tensor in stack.named_buffers()}

    def _matrices(self, stack: PackedStack) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """The parts of each matrix, read when they are needed."""
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
    """Read each item of a list, removing the items from it."""
    for at, load in enumerate(tensors):
        tensors[at] = None
        yield _read(load)
        del load


def _read(load: Any) -> torch.Tensor:
    """A tensor that transformers collected as a call that reads it, or as the result of a thread that does."""
    tensor: torch.Tensor = load() if callable(load) else load.result()
    return tensor


class Restoring(WeightConverter):  # type: ignore[misc]
    """Reads tensors of a published checkpoint that do not belong to experts: unchanged, or converted to the module's
    form.

    Parameters
    ----------
    quantizer
        transformers' quantizer; one of this project's.
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
            When a matrix is not what it should be.
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
    """Builds the stacks of a layer's experts, one matrix after the other, for writing a checkpoint.

    Parameters
    ----------
    skeleton
        The model after `pack_skeleton`.
    places
        The place of each tensor of the original, by its name there.
    device, dtype
        The device on which each matrix is quantized, and the dtype to which it is cast before.
    """

    def __init__(
        self, skeleton: Any, places: dict[str, Place], quantization: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.skeleton, self.places, self.quantization = skeleton, places, quantization
        self.device, self.dtype = device, dtype
        self._found: dict[str, int] = {}

    def take(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Keep the content of a tensor of the original; return the stack's tensors when the stack is complete."""
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
    """What quantizers here add to the stock ones: experts in common tensors.

    transformers assumes that a quantized checkpoint needs no further quantization, so it passes each tensor in its
    stored dtype. Tensors that are held in another form than they are stored are converted here.

    Parameters
    ----------
    stored
        The form in which the checkpoint holds matrices; None if they are not quantized.
    """

    def __init__(self, *arguments: Any, stored: Stored | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stored = stored

    def _kind(self) -> tuple[str, torch.dtype]:
        """The form in which experts are held, and the compute dtype."""
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
        """Pack experts where they would be fused (transformers passes the model since about 5.11)."""
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
        """Also decides the dtype in which a tensor is read, and whether a different shape is an error."""
        if isinstance(model.get_submodule(param_name.rpartition(".")[0]), PackedStack):
            return self._stored is None
        needed: bool = super().param_needs_quantization(model, param_name, **kwargs)  # type: ignore[misc]
        return needed

    def get_new_dtype(self, converter: Any, *arguments: Any) -> Any:
        """The dtype in which a tensor of a quantized checkpoint is read; None: the stored dtype."""
        if isinstance(converter, (Packing, Restoring)):
            return None
        return super().get_new_dtype(converter, *arguments)  # type: ignore[misc]
