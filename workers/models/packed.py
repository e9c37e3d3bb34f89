"""The matrices of a layer's experts in common tensors, in 4 bits or e4m3.

E experts, R rows and C columns of a matrix. Each matrix is quantized by itself, as bitsandbytes does it; only where its
parts lie differs, so that one kernel dequantizes many. Nothing here knows how a checkpoint names them.
"""

from typing import Any

import torch
from torch import nn

from workers.models.four_bits import STEP_BLOCK, FourBits
from workers.models.fp8 import E4M3, RowScaled
from workers.models.stored import BLOCK


class PackedStack(nn.Module):
    """A matrix for each expert, each made of P parts one below the other, such as gate and up.

    Parameters
    ----------
    shape
        E, P, R, C: experts, parts, rows and columns of a part.
    transposed
        Whether a checkpoint that has all of them in one tensor has them transposed.
    """

    def __init__(self, shape: tuple[int, int, int, int], *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.experts, self.parts, rows, self.columns = shape
        self.rows = self.parts * rows

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(self.buffers()).device

    def faults(self) -> dict[str, str]:
        """Which of its tensors are not what they should be, and what they are."""
        return {
            name: f"{tensor.dtype} on {tensor.device}, not {self._dtypes[name]}"
            for name, tensor in self.named_buffers()
            if tensor.is_meta or tensor.dtype != self._dtypes[name]
        }

    def take(self, number: int, matrix: Any) -> None:
        """Keep a matrix; those of an expert follow each other. Memory is taken with the first one."""
        raise NotImplementedError

    def part(self, first: int, last: int) -> Any:
        """The matrices of some experts."""
        raise NotImplementedError

    def _own(self, name: str, device: torch.device) -> torch.Tensor:
        """One of its tensors, with memory on the device from the first time on."""
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
    """In NF4 or FP4, on the meta device until it is loaded."""

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


class StackE4m3(PackedStack):
    """In e4m3 with one scale a row, on the meta device until it is loaded."""

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
