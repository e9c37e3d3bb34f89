"""The matrices of a layer's experts in common tensors, in 4 bits or e4m3.

E experts, R rows and C columns of a matrix. Each matrix is quantized by itself, as bitsandbytes does it; only where its
parts lie differs, so that one kernel dequantizes many. Nothing here knows how a checkpoint names them.
"""

import torch
from torch import nn

from workers.models.four_bits import BLOCK, STEP_BLOCK, FourBits
from workers.models.fp8 import E4M3, RowScaled


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
        """Keep a matrix; those of an expert follow each other. Memory is taken with the first one."""
        for name, part in matrix._asdict().items():
            if (own := getattr(self, name)).is_meta:
                own = torch.empty_like(own, device=part.device)
                setattr(self, name, own)
            if name in ("code", "scale_code"):
                own.copy_(part)
            else:
                own[number] = part[0]

    def part(self, first: int, last: int) -> FourBits:
        """The matrices of some experts."""
        which = slice(first * self.parts, last * self.parts)
        each = (part[which] for part in (self.packed, self.scale, self.step, self.offset))
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
        """As of `Stack4bit`."""
        expert, part = divmod(number, self.parts)
        rows = self.rows // self.parts
        which = expert, slice(part * rows, (part + 1) * rows)
        for name, given in matrix._asdict().items():
            if (own := getattr(self, name)).is_meta:
                own = torch.empty_like(own, device=given.device)
                setattr(self, name, own)
            own[which] = given

    def part(self, first: int, last: int) -> RowScaled:
        """The matrices of some experts: values (N, R, C), scale (N, R, 1)."""
        return RowScaled(self.values[first:last], self.scale[first:last])
