"""Matrices of models published in 4 and 8 bits: MXFP4 (gpt-oss) and e4m3 with a scale per block (DeepSeek-V3).

M matrices of R rows and C columns. As in `workers.models.kernels`, each function has a plain form, which is its
definition and runs on a CPU, and a Triton kernel, which runs on a GPU. Both are exact in float32, and round once if
`out` has fewer bits.
"""

from typing import NamedTuple

import torch

from workers.models.kernels import _fused, _launch
from workers.models.stored import MX_BLOCK, SCALE_BLOCK

try:  # CPU builds of torch do not include it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

MX_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of the 16 codes of E2M1."""
MX_BYTES = 4096  # bytes of packed values that one program of `restore_mxfp4` reads (like NF4; not measured separately)


class Mxfp4(NamedTuple):
    """M matrices in E2M1 with a power of two for every 32 values of a row (OCP Microscaling Formats 1.0, 2023)."""

    packed: torch.Tensor
    """uint8, shape (M, R, C/2): two values per byte, the first in the lower half."""
    scale: torch.Tensor
    """uint8, shape (M, R, C/32): exponents of two, with a bias of 127."""


class BlockScaled(NamedTuple):
    """M matrices in e4m3 with a scale for every 128 × 128 values (DeepSeek-AI 2024, arXiv:2412.19437, 3.3)."""

    values: torch.Tensor
    """e4m3, shape (M, R, C)"""
    scale: torch.Tensor
    """float32, shape (M, ⌈R/128⌉, ⌈C/128⌉)"""


def plain_restore_mxfp4(matrices: Mxfp4, out_MRC: torch.Tensor) -> None:
    """Dequantize matrices in MXFP4 into `out`, in the dtype of `out`."""
    codes = torch.stack([matrices.packed & 15, matrices.packed >> 4], dim=-1).flatten(-2).int()
    values = torch.tensor(MX_VALUES, device=codes.device)[codes]
    exponent = matrices.scale.repeat_interleave(MX_BLOCK, dim=-1).int() - 127
    out_MRC.copy_(torch.ldexp(values, exponent).view_as(out_MRC))


def plain_restore_blocks(matrices: BlockScaled, out_MRC: torch.Tensor) -> None:
    """Dequantize matrices in e4m3 with a scale per block into `out`, in the dtype of `out`."""
    scale = matrices.scale
    for dim, size in ((1, matrices.values.shape[1]), (2, matrices.values.shape[2])):
        scale = scale.repeat_interleave(SCALE_BLOCK, dim=dim).narrow(dim, 0, size)
    out_MRC.copy_((matrices.values.float() * scale).view_as(out_MRC))


if triton is not None:

    @triton.jit
    def _restore_mxfp4(packed, scale, out, count, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
        first = tl.program_id(0).to(tl.int64) * BYTES
        byte = first + tl.arange(0, BYTES)
        pair = tl.load(packed + byte, byte < count, 0).to(tl.int32)
        exponent = tl.load(scale + byte // 16, byte < count, 127).to(tl.int32) - 127
        # In two steps, because 2^127 and 2^-127 cannot be built from the bits of a normal float32.
        half = exponent >> 1
        size = ((half + 127) << 23).to(tl.float32, bitcast=True)
        rest = ((exponent - half + 127) << 23).to(tl.float32, bitcast=True)
        low, high = _e2m1(pair & 15) * size * rest, _e2m1(pair >> 4) * size * rest
        value = 2 * first + tl.arange(0, 2 * BYTES)
        tl.store(out + value, tl.interleave(low, high).to(out.dtype.element_ty), value < 2 * count)

    @triton.jit
    def _e2m1(code):  # type: ignore[no-untyped-def]
        """Zero and 0.5 have no exponent; the others are 2^(exponent - 1), and half as much more with the last bit."""
        last = (code & 1).to(tl.float32)
        exponent = (code >> 1) & 3
        power = ((exponent + 126) << 23).to(tl.float32, bitcast=True)
        size = tl.where(exponent == 0, 0.5 * last, power * (1 + 0.5 * last))
        return tl.where(code >= 8, -size, size)

    @triton.jit
    def _restore_blocks(  # type: ignore[no-untyped-def]
        values, scale, out, rows, columns, down, across, WIDTH: tl.constexpr
    ):
        line = tl.program_id(0).to(tl.int64)
        matrix, row = line // rows, line % rows
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        kept = column < columns
        block = (matrix * down + row // 128) * across + column // 128
        value = tl.load(values + line * columns + column, kept, 0.0).to(tl.float32) * tl.load(scale + block, kept, 0.0)
        tl.store(out + line * columns + column, value.to(out.dtype.element_ty), kept)


def restore_mxfp4(matrices: Mxfp4, out_MRC: torch.Tensor) -> None:
    """`plain_restore_mxfp4`."""
    if not _fused(out_MRC):
        return plain_restore_mxfp4(matrices, out_MRC)
    count = matrices.packed.numel()
    _launch(_restore_mxfp4, (-(-count // MX_BYTES),), *matrices, out_MRC, count, BYTES=MX_BYTES)
    return None


def restore_blocks(matrices: BlockScaled, out_MRC: torch.Tensor) -> None:
    """`plain_restore_blocks`."""
    if not _fused(out_MRC):
        return plain_restore_blocks(matrices, out_MRC)
    many, rows, columns = matrices.values.shape
    grid = many * rows, -(-columns // 1024)
    _launch(_restore_blocks, grid, *matrices, out_MRC, rows, columns, *matrices.scale.shape[1:], WIDTH=1024)
    return None


def restored_matrix(matrix: Mxfp4 | BlockScaled, dtype: torch.dtype) -> torch.Tensor:
    """One matrix (M is 1) in some dtype; shape (R, C)."""
    rows, columns = matrix[0].shape[1], matrix[0].shape[2] * (2 if isinstance(matrix, Mxfp4) else 1)
    out = torch.empty(1, rows, columns, dtype=dtype, device=matrix[0].device)
    if isinstance(matrix, Mxfp4):
        restore_mxfp4(matrix, out)
    else:
        restore_blocks(matrix, out)
    return out[0]
