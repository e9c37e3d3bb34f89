"""The matrices of a layer's experts in common tensors, in 4 bits or e4m3.

E experts, R rows and C columns of a matrix. Each matrix is quantized by itself, as by bitsandbytes or as published.
Only its place in memory differs, so that one kernel dequantizes many. The names in checkpoints are not known here.
"""

from typing import Any

import torch
from torch import nn

from workers.models.four_bits import STEP_BLOCK, FourBits
from workers.models.fp8 import E4M3, RowScaled, restored
from workers.models.kernels import dequantize
from workers.models.published import BlockScaled, Mxfp4, restore_blocks, restore_mxfp4
from workers.models.stored import BLOCK, FOUR_BITS, MX_BLOCK, SCALE_BLOCK


class PackedStack(nn.Module):
    """A matrix for each expert, each made of P parts one below the other, such as gate and up.

    Parameters
    ----------
    shape
        E, P, R, C: experts, parts, and the rows and columns of a part.
    transposed
        Whether a checkpoint with all matrices in one tensor has them transposed.
    """

    def __init__(self, shape: tuple[int, int, int, int], *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.experts, self.parts, rows, self.columns = shape
        self.rows = self.parts * rows

    @property
    def device(self) -> torch.device:
        """The device of the stack."""
        return next(self.buffers()).device

    def faults(self) -> dict[str, str]:
        """Tensors that are not what they should be, by name, with their faults."""
        return {
            name: f"{tensor.dtype} on {tensor.device}, not {self._dtypes[name]}"
            for name, tensor in self.named_buffers()
            if tensor.is_meta or tensor.dtype != self._dtypes[name]
        }

    def take(self, number: int, matrix: Any) -> None:
        """Keep a matrix. Those of an expert follow each other. Memory is allocated for the first one."""
        raise NotImplementedError

    def part(self, first: int, last: int) -> Any:
        """The matrices of some experts."""
        raise NotImplementedError

    def restore(self, first: int, last: int, into_NRC: torch.Tensor) -> None:
        """Dequantize the matrices of some experts into a tensor, in its dtype."""
        raise NotImplementedError

    def _own(self, name: str, device: torch.device) -> torch.Tensor:
        """One of its tensors; its memory on the device is allocated at the first call."""
        own: torch.Tensor = getattr(self, name)
        if own.is_meta:
            own = torch.empty_like(own, device=device)
            setattr(self, name, own)
        return own

    def _meta(self, **parts: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._dtypes = {name: dtype for name, (_, dtype) in parts.items()}
        for name, (shape, dtype) in parts.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))


class Stack4bit(PackedStack):
    """A stack in NF4 or FP4, on the meta device until it is loaded."""

    packed: torch.Tensor
    scale: torch.Tensor
    step: torch.Tensor
    offset: torch.Tensor
    code: torch.Tensor
    scale_code: torch.Tensor

    def __init__(self, shape: tuple[int, int, int, int], *, transposed: bool = False) -> None:
        super().__init__(shape, transposed=transposed)
        many, values = self.experts * self.parts, self.rows // self.parts * self.columns
        blocks = values // BLOCK
        self._meta(
            packed=((many, values // 2), torch.uint8),
            scale=((many, blocks), torch.uint8),
            step=((many, -(-blocks // STEP_BLOCK)), torch.float32),
            offset=((many,), torch.float32),
            code=((16,), torch.float32),
            scale_code=((STEP_BLOCK,), torch.float32),
        )

    def take(self, number: int, matrix: FourBits) -> None:
        """See `PackedStack`."""
        for name, part in matrix._asdict().items():
            own = self._own(name, part.device)
            if name in ("code", "scale_code"):
                own.copy_(part)
            else:
                own[number] = part[0]

    def part(self, first: int, last: int) -> FourBits:
        """See `PackedStack`."""
        which = slice(first * self.parts, last * self.parts)
        each = self.packed[which], self.scale[which], self.step[which], self.offset[which]
        return FourBits(*each, self.code, self.scale_code)

    def restore(self, first: int, last: int, into_NRC: torch.Tensor) -> None:
        """See `PackedStack`."""
        dequantize(self.part(first, last), into_NRC)


class StackE4m3(PackedStack):
    """A stack in e4m3 with one scale per row, on the meta device until it is loaded."""

    values: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shape: tuple[int, int, int, int], *, transposed: bool = False) -> None:
        super().__init__(shape, transposed=transposed)
        self._meta(
            values=((self.experts, self.rows, self.columns), E4M3), scale=((self.experts, self.rows, 1), torch.float32)
        )

    def take(self, number: int, matrix: RowScaled) -> None:
        """See `PackedStack`."""
        expert, part = divmod(number, self.parts)
        rows = self.rows // self.parts
        which = expert, slice(part * rows, (part + 1) * rows)
        for name, given in matrix._asdict().items():
            self._own(name, given.device)[which] = given

    def part(self, first: int, last: int) -> RowScaled:
        """See `PackedStack`; values (N, R, C), scale (N, R, 1)."""
        return RowScaled(self.values[first:last], self.scale[first:last])

    def restore(self, first: int, last: int, into_NRC: torch.Tensor) -> None:
        """See `PackedStack`."""
        part = self.part(first, last)
        restored(RowScaled(*(each.flatten(0, 1) for each in part)), into_NRC.flatten(0, 1))


class _StackAsPublished(PackedStack):
    """A stack in a form of `workers.models.published`, on the meta device until it is loaded."""

    def take(self, number: int, matrix: Mxfp4 | BlockScaled) -> None:
        """See `PackedStack`."""
        for name, given in matrix._asdict().items():
            self._own(name, given.device)[number] = given[0]

    def _part(self, name: str, first: int, last: int) -> torch.Tensor:
        tensor: torch.Tensor = getattr(self, name)
        return tensor[first * self.parts : last * self.parts]


class StackMxfp4(_StackAsPublished):
    """A stack in MXFP4."""

    packed: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shape: tuple[int, int, int, int], *, transposed: bool = False) -> None:
        super().__init__(shape, transposed=transposed)
        many, rows = self.experts * self.parts, self.rows // self.parts
        self._meta(
            packed=((many, rows, self.columns // 2), torch.uint8),
            scale=((many, rows, self.columns // MX_BLOCK), torch.uint8),
        )

    def part(self, first: int, last: int) -> Mxfp4:
        """See `PackedStack`."""
        return Mxfp4(self._part("packed", first, last), self._part("scale", first, last))

    def restore(self, first: int, last: int, into_NRC: torch.Tensor) -> None:
        """See `PackedStack`."""
        restore_mxfp4(self.part(first, last), into_NRC)


class StackBlocks(_StackAsPublished):
    """A stack in e4m3 with one scale per block of 128 × 128."""

    values: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shape: tuple[int, int, int, int], *, transposed: bool = False) -> None:
        super().__init__(shape, transposed=transposed)
        many, rows = self.experts * self.parts, self.rows // self.parts
        blocks = -(-rows // SCALE_BLOCK), -(-self.columns // SCALE_BLOCK)
        self._meta(values=((many, rows, self.columns), E4M3), scale=((many, *blocks), torch.float32))

    def part(self, first: int, last: int) -> BlockScaled:
        """See `PackedStack`."""
        return BlockScaled(self._part("values", first, last), self._part("scale", first, last))

    def restore(self, first: int, last: int, into_NRC: torch.Tensor) -> None:
        """See `PackedStack`."""
        restore_blocks(self.part(first, last), into_NRC)


STACKS: dict[str, type[PackedStack]] = {
    **dict.fromkeys(FOUR_BITS, Stack4bit),
    "fp8": StackE4m3,
    "fp8_blocks": StackBlocks,
    "mxfp4": StackMxfp4,
}
"""The classes by form."""
BLOCKS = {"mxfp4": MX_BLOCK} | dict.fromkeys(FOUR_BITS, BLOCK)
"""For each form, the number of which a matrix's number of values (for mxfp4, a row's) must be a multiple."""
