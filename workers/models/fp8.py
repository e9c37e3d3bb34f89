"""Numbers in float8 e4m3 with one scale per row, and products of such matrices.

T tokens, K choices per token, H hidden, I inner, R rows and C columns of a weight. As in `workers.models.kernels`, each
function has a plain form, which is its definition and runs on a CPU, and a Triton kernel, which runs on a GPU.

e4m3: Micikevicius et al. 2022, arXiv:2209.05433; rounded to nearest, ties to even. The scale of a row is its largest
absolute value over 448, the largest number of e4m3, so that nothing overflows. A product is accumulated and scaled in
float32 and rounded once.
"""

from typing import NamedTuple

import torch

from workers.models.four_bits import FourBits
from workers.models.kernels import _fused, _launch, plain_add_norm, plain_dequantize
from workers.models.stored import BLOCK

try:  # CPU builds of torch do not include it
    import triton
    import triton.language as tl
except ImportError:
    triton = None

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-12  # used as the largest value of a row of zeros (arbitrary)
PACKED_BLOCKS = 128  # blocks of 64 values in one program of `dequantize_rounded` (measured: 64 to 256 are equally fast)
FAST_ACCUMULATION = True
"""Whether a GPU may accumulate with fewer bits than float32, which is the default of Hopper's fp8 units.

Its costs and gains are in docs/design/0011-fp8.md."""


class RowScaled(NamedTuple):
    """A matrix in e4m3: each row of `values` is multiplied by its `scale`."""

    values: torch.Tensor
    """e4m3, shape (R, C)"""
    scale: torch.Tensor
    """float32, shape (R, 1)"""


def plain_rounded(rows_RC: torch.Tensor) -> RowScaled:
    """A matrix in e4m3, from any floating-point dtype."""
    rows = rows_RC.float()
    most_R1 = rows.abs().amax(-1, keepdim=True).clamp_min(SMALLEST)
    # Tensor by tensor: torch divides by a number, and a number by a tensor, through reciprocals, which moves exact
    # ties.
    largest_R1 = torch.full_like(most_R1, LARGEST)
    return RowScaled((rows * (largest_R1 / most_R1)).to(E4M3), most_R1 / largest_R1)


def plain_rounded_swiglu(both_SI2: torch.Tensor) -> RowScaled:
    """`workers.models.kernels.plain_swiglu`, rounded only once, to e4m3."""
    gate, up = both_SI2.float().chunk(2, dim=-1)
    return plain_rounded(torch.nn.functional.silu(gate) * up)


def plain_rounded_add_norm(
    residual_TH: torch.Tensor, scale_H: torch.Tensor, eps: float, *added: torch.Tensor, kept: bool = True
) -> tuple[torch.Tensor | None, RowScaled]:
    """`workers.models.kernels.plain_add_norm` with its result in e4m3.

    Parameters
    ----------
    added
        `added_SH`, `slot_TK` and `weight_TK`, if given.
    kept
        Whether to return the result in the residual's dtype too.
    """
    normed_TH = plain_add_norm(residual_TH, scale_H, eps, *added)
    return normed_TH if kept else None, plain_rounded(normed_TH)


def row_scales(matrices: FourBits, rows: int) -> torch.Tensor:
    """The e4m3 scale of each row of 4-bit matrices, for all matrices; float32, shape (`rows`, 1).

    The largest value of a block is the block's own scale, so no matrix needs to be dequantized.
    """
    most_R1: torch.Tensor = matrices.block_scales().abs().view(rows, -1).amax(1, keepdim=True).clamp_min(SMALLEST)
    return most_R1 / LARGEST


def plain_dequantize_rounded(matrices: FourBits, scale_R1: torch.Tensor, out_RC: torch.Tensor) -> None:
    """Dequantize matrices in 4 bits into `out`, one below the other, in e4m3 with the rows' scales."""
    values = torch.empty(out_RC.shape, dtype=torch.float32, device=out_RC.device)
    plain_dequantize(matrices, values)
    inverse_R1 = (torch.ones_like(scale_R1) / scale_R1).view(-1, 1)
    out_RC.copy_((values.view(len(inverse_R1), -1) * inverse_R1).view_as(out_RC))


def plain_restored(matrix: RowScaled, out_RC: torch.Tensor) -> None:
    """Write a matrix in e4m3 into `out`, in the dtype of `out`."""
    out_RC.copy_(matrix.values.float() * matrix.scale)


def plain_multiply(left_TC: RowScaled, right_RC: RowScaled, out_TR: torch.Tensor) -> torch.Tensor:
    """Write ``left @ right.T`` into `out`, in the dtype of `out`."""
    product = left_TC.values.float() @ right_RC.values.float().T
    return out_TR.copy_(product * left_TC.scale * right_RC.scale.T)


if triton is not None:
    from workers.models.kernels import added_and_normed

    @triton.jit
    def _store_rounded(values, out, scale, row, column, kept, width: tl.constexpr):  # type: ignore[no-untyped-def]
        """Store a row of float32 values in e4m3, and its scale."""
        most = tl.maximum(tl.max(tl.abs(values)), 1e-12)
        tl.store(out + row * width + column, (values * tl.div_rn(448.0, most)).to(out.dtype.element_ty), kept)
        tl.store(scale + row, tl.div_rn(most, 448.0))

    @triton.jit
    def _rounded(rows, out, scale, width: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, WIDTH)
        kept = column < width
        values = tl.load(rows + row * width + column, kept, 0.0).to(tl.float32)
        _store_rounded(values, out, scale, row, column, kept, width)

    @triton.jit
    def _rounded_swiglu(both, out, scale, inner: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, WIDTH)
        kept = column < inner
        gate = tl.load(both + row * 2 * inner + column, kept, 0.0).to(tl.float32)
        up = tl.load(both + row * 2 * inner + inner + column, kept, 0.0).to(tl.float32)
        _store_rounded(gate / (1 + tl.exp(-gate)) * up, out, scale, row, column, kept, inner)

    @triton.jit
    def _rounded_add_norm(  # type: ignore[no-untyped-def]
        residual, weight_of_norm, normed, out, scale, added, slot, weight, eps,
        hidden: tl.constexpr, K: tl.constexpr, KEPT: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """`workers.models.kernels._add_norm` with its result rounded."""
        token = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, WIDTH)
        kept = column < hidden
        result = added_and_normed(residual, weight_of_norm, added, slot, weight, eps, token, column, kept, hidden, K)
        if KEPT:
            tl.store(normed + token * hidden + column, result, kept)
        _store_rounded(result.to(tl.float32), out, scale, token, column, kept, hidden)

    @triton.jit
    def _four_codes(code, size, inverse, FIRST: tl.constexpr):  # type: ignore[no-untyped-def]
        """The e4m3 values of four of the 16 codes in a block, as the bytes of an integer."""
        first = tl.load(code + FIRST) * size * inverse
        second = tl.load(code + FIRST + 1) * size * inverse
        third = tl.load(code + FIRST + 2) * size * inverse
        fourth = tl.load(code + FIRST + 3) * size * inverse
        return tl.inline_asm_elementwise(
            """{ .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high}; }""",
            "=r,f,f,f,f", [first, second, third, fourth], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip

    @triton.jit
    def _dequantize_rounded(  # type: ignore[no-untyped-def]
        packed, scale, step, offset, code, scale_code, row_scale, out, blocks, steps, row_blocks, BLOCKS: tl.constexpr
    ):
        """64 values have only 16 results, so each is computed once and then selected by `prmt`, four values at a time.

        A word holds eight codes, the first of each byte in its upper half. `picks` has them in the order of the values:
        their lower three bits select one of eight bytes, and their fourth bit selects one of the two groups of eight.
        """
        matrix = tl.program_id(1).to(tl.int64)
        block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
        there = block < blocks
        size = tl.load(scale_code + tl.load(scale + matrix * blocks + block, there, 0).to(tl.int32))
        size = size * tl.load(step + matrix * steps + block // 256, there, 0.0) + tl.load(offset + matrix)
        row = matrix * (blocks // row_blocks) + block // row_blocks
        inverse = tl.div_rn(1.0, tl.load(row_scale + row, there, 1.0))
        table_0, table_4 = _four_codes(code, size, inverse, 0), _four_codes(code, size, inverse, 4)
        table_8, table_12 = _four_codes(code, size, inverse, 8), _four_codes(code, size, inverse, 12)
        block = matrix * blocks + block
        word = tl.load(packed.to(tl.pointer_type(tl.int32)) + block * 8 + tl.arange(0, 8)[None, :], there, 0)
        table_0, table_4 = tl.broadcast_to(table_0, word.shape), tl.broadcast_to(table_4, word.shape)
        table_8, table_12 = tl.broadcast_to(table_8, word.shape), tl.broadcast_to(table_12, word.shape)
        low, high = tl.inline_asm_elementwise(
            """{ .reg .b32 picks, eight, which, lower, upper;
            and.b32 picks, $2, 0x0F0F0F0F; shl.b32 picks, picks, 4;
            shr.u32 eight, $2, 4; and.b32 eight, eight, 0x0F0F0F0F; or.b32 picks, picks, eight;
            and.b32 eight, picks, 0x77777777;
            and.b32 which, picks, 0x88888888; shr.u32 which, which, 1; or.b32 which, which, 0x32103210;
            prmt.b32 lower, $3, $4, eight; prmt.b32 upper, $5, $6, eight; prmt.b32 $0, lower, upper, which;
            shr.u32 eight, eight, 16; shr.u32 which, which, 16;
            prmt.b32 lower, $3, $4, eight; prmt.b32 upper, $5, $6, eight; prmt.b32 $1, lower, upper, which; }""",
            "=&r,=&r,r,r,r,r,r", [word, table_0, table_4, table_8, table_12], dtype=(tl.int32, tl.int32), is_pure=True,
            pack=1,
        )  # fmt: skip
        place = out.to(tl.pointer_type(tl.int32)) + block * 16 + tl.arange(0, 16)[None, :]
        tl.store(place, tl.interleave(low, high), there)

    @triton.jit
    def _restored(values, scale, out, width: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, WIDTH)
        kept = column < width
        value = tl.load(values + row * width + column, kept, 0.0).to(tl.float32) * tl.load(scale + row)
        tl.store(out + row * width + column, value.to(out.dtype.element_ty), kept)


def rounded(rows_RC: torch.Tensor) -> RowScaled:
    """`plain_rounded`."""
    if not _fused(rows_RC):
        return plain_rounded(rows_RC)
    found = _empty(rows_RC, *rows_RC.shape)
    width, rows = rows_RC.shape[1], rows_RC.contiguous()
    _launch(_rounded, (len(rows),), rows, *found, width=width, WIDTH=triton.next_power_of_2(width), num_warps=8)
    return found


def rounded_swiglu(both_SI2: torch.Tensor) -> RowScaled:
    """`plain_rounded_swiglu`."""
    if not _fused(both_SI2):
        return plain_rounded_swiglu(both_SI2)
    rows, inner = both_SI2.shape[0], both_SI2.shape[1] // 2
    found = _empty(both_SI2, rows, inner)
    width = triton.next_power_of_2(inner)
    _launch(_rounded_swiglu, (rows,), both_SI2, *found, inner=inner, WIDTH=width, num_warps=16)
    return found


def rounded_add_norm(
    residual_TH: torch.Tensor, scale_H: torch.Tensor, eps: float, *added: torch.Tensor, kept: bool = True
) -> tuple[torch.Tensor | None, RowScaled]:
    """`plain_rounded_add_norm`."""
    if not _fused(residual_TH):
        return plain_rounded_add_norm(residual_TH, scale_H, eps, *added, kept=kept)
    hidden = residual_TH.shape[1]
    choices = {0: 0, 1: -1, 3: added[1].shape[1] if len(added) == 3 else 0}[len(added)]
    normed_TH = torch.empty_like(residual_TH) if kept else None
    found = _empty(residual_TH, *residual_TH.shape)
    given = [*added, *[residual_TH] * (3 - len(added))]
    _launch(
        _rounded_add_norm, (len(residual_TH),), residual_TH, scale_H, residual_TH if normed_TH is None else normed_TH,
        *found, *given, eps, hidden=hidden, K=choices, KEPT=kept, WIDTH=triton.next_power_of_2(hidden), num_warps=8,
    )  # fmt: skip
    return normed_TH, found


def dequantize_rounded(matrices: FourBits, scale_R1: torch.Tensor, out_RC: torch.Tensor) -> None:
    """`plain_dequantize_rounded`."""
    if not _fused(out_RC):
        return plain_dequantize_rounded(matrices, scale_R1, out_RC)
    many, blocks = matrices.scale.shape
    sizes = blocks, matrices.step.shape[1], out_RC.shape[-1] // BLOCK
    grid = (-(-blocks // PACKED_BLOCKS), many)
    _launch(_dequantize_rounded, grid, *matrices, scale_R1, out_RC, *sizes, BLOCKS=PACKED_BLOCKS)
    return None


def restored(matrix: RowScaled, out_RC: torch.Tensor) -> None:
    """`plain_restored`."""
    if not _fused(out_RC):
        return plain_restored(matrix, out_RC)
    width = out_RC.shape[1]
    _launch(_restored, (len(out_RC),), *matrix, out_RC, width=width, WIDTH=triton.next_power_of_2(width), num_warps=8)
    return None


def multiply(left_TC: RowScaled, right_RC: RowScaled, out_TR: torch.Tensor) -> torch.Tensor:
    """`plain_multiply`; on a GPU the result is bfloat16, and C and R must be multiples of 16."""
    if not out_TR.is_cuda:
        return plain_multiply(left_TC, right_RC, out_TR)
    scales = {"scale_a": left_TC.scale, "scale_b": right_RC.scale.view(1, -1)}
    product: torch.Tensor = torch._scaled_mm(
        left_TC.values, right_RC.values.T, **scales, out_dtype=out_TR.dtype, use_fast_accum=FAST_ACCUMULATION,
        out=out_TR,
    )  # fmt: skip
    return product


def _empty(like: torch.Tensor, rows: int, columns: int) -> RowScaled:
    return RowScaled(like.new_empty(rows, columns, dtype=E4M3), like.new_empty(rows, 1, dtype=torch.float32))
