"""The steps between the products of experts with biases and a clamped gate (gpt-oss), each in one pass.

S slots sorted by expert, E experts, R rows of a matrix, I inner width. As in `workers.models.kernels`, each function
has a plain form, which is its definition, and a Triton kernel. A test compares the two.
"""

import torch

from workers.models.kernels import ROWS_WIDTH, _fused, _launch

try:  # CPU builds of torch do not include it
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def plain_add_biases(rows_SR: torch.Tensor, bias_ER: torch.Tensor, expert_S: torch.Tensor) -> None:
    """Add its expert's bias to each slot's row, in place."""
    rows_SR += bias_ER[expert_S.int()]


def plain_clamped_swiglu(both_SI2: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """``(up + 1) * gate * sigmoid(alpha * gate)``, gate and up alternating and clamped by `limit`; shape (S, I).

    The gate is clamped only from above. gpt-oss' model card (2025, arXiv:2508.10925), section 2, and its code.
    """
    both = both_SI2.float()
    gate, up = both[:, 0::2].clamp(max=limit), both[:, 1::2].clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(alpha * gate)).to(both_SI2.dtype)


if triton is not None:

    @triton.jit
    def _add_biases(rows, bias, expert, width: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        kept = column < width
        which = tl.load(expert + row).to(tl.int64)
        value = tl.load(rows + row * width + column, kept, 0.0).to(tl.float32)
        value += tl.load(bias + which * width + column, kept, 0.0).to(tl.float32)
        tl.store(rows + row * width + column, value.to(rows.dtype.element_ty), kept)

    @triton.jit
    def _clamped_swiglu(  # type: ignore[no-untyped-def]
        both, out, alpha, limit, inner: tl.constexpr, WIDTH: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        kept = column < inner
        pair = both + row * 2 * inner + 2 * column
        gate, up = tl.load(pair, kept, 0.0).to(tl.float32), tl.load(pair + 1, kept, 0.0).to(tl.float32)
        gate = tl.where(gate > limit, limit, gate)  # unlike a minimum, this keeps NaN
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        value = (up + 1) * gate / (1 + tl.exp(-alpha * gate))
        tl.store(out + row * inner + column, value.to(out.dtype.element_ty), kept)


def add_biases(rows_SR: torch.Tensor, bias_ER: torch.Tensor, expert_S: torch.Tensor) -> None:
    """`plain_add_biases`."""
    if not _fused(rows_SR):
        return plain_add_biases(rows_SR, bias_ER, expert_S)
    rows, width = rows_SR.shape
    grid = rows, -(-width // ROWS_WIDTH)
    _launch(_add_biases, grid, rows_SR, bias_ER, expert_S, width=width, WIDTH=ROWS_WIDTH)
    return None


def clamped_swiglu(both_SI2: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """`plain_clamped_swiglu`."""
    if not _fused(both_SI2):
        return plain_clamped_swiglu(both_SI2, alpha, limit)
    rows, inner = both_SI2.shape[0], both_SI2.shape[1] // 2
    out = both_SI2.new_empty(rows, inner)
    grid = rows, -(-inner // ROWS_WIDTH)
    _launch(_clamped_swiglu, grid, both_SI2, out, alpha, limit, inner=inner, WIDTH=ROWS_WIDTH)
    return out
