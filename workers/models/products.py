"""The two ways in which a forward pass multiplies: in the compute dtype or in fp8.

T tokens, S slots sorted by expert, E experts, H hidden, I inner, R rows and C columns of a matrix. An operand is the
left side of a product and a matrix its right side: plain tensors in one way, `workers.models.fp8.RowScaled` in the
other. Matrices are Linears in 4 bits, in e4m3 (`workers.models.fp8_loading`) or unchanged, one below the other, or
those of experts (`workers.models.packed`). Matrices are dequantized into a buffer that the next matrix of the same
place reuses. A router's product is not one of these: the router computes it itself.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from workers.models import fp8
from workers.models.four_bits import FourBits
from workers.models.fp8 import (
    E4M3,
    RowScaled,
    dequantize_rounded,
    multiply,
    rounded,
    rounded_add_norm,
    rounded_swiglu,
    row_scales,
)
from workers.models.kernels import add_norm, dequantize, swiglu
from workers.models.packed import PackedStack, Stack4bit, StackE4m3
from workers.models.stored import BLOCK

ROWS = 16_384  # slots of an expert computed at a time: bounds memory when routing is skewed (arbitrary)
FP8_ROWS = 32_768  # the same in fp8: 0.3 % faster than 16,384 at 65,536 tokens per micro-batch (an H200)
FP8_STEP = 16  # GPUs multiply in fp8 if both sizes of a matrix are multiples of it


class Products:
    """Products in the compute dtype: each matrix is dequantized just before its product.

    Parameters
    ----------
    dtype
        The compute dtype.
    """

    buffer_dtype: torch.dtype

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = self.buffer_dtype = dtype
        self._buffers: dict[tuple[Any, ...], torch.Tensor] = {}

    def prepare(self, *linears: Any) -> None:
        """Called once, after loading, for each group of matrices that are multiplied as one."""

    def prepare_stack(self, stack: PackedStack) -> None:
        """Called once, after loading, for the matrices of a layer's experts."""

    def normed(
        self, residual_TH: torch.Tensor, scale_H: torch.Tensor, eps: float, *added: torch.Tensor, routed: bool
    ) -> tuple[Any, Any]:
        """`workers.models.kernels.add_norm` as a router's input, if `routed`, and as an operand."""
        normed_TH = add_norm(residual_TH, scale_H, eps, *added)
        return normed_TH, normed_TH

    def operand(self, rows_TH: torch.Tensor) -> Any:
        """Rows in the compute dtype as an operand."""
        return rows_TH

    def gated(self, both_SI2: torch.Tensor) -> Any:
        """`workers.models.kernels.swiglu` as an operand."""
        return swiglu(both_SI2)

    def taken(self, operand: Any, token_S: torch.Tensor) -> Any:
        """The operand's rows of these tokens, for `rows`."""
        return operand, token_S

    def rows(self, taken: Any, part: slice) -> Any:
        """Some of these rows, as an operand."""
        operand, token_S = taken
        return operand[token_S[part]]

    def moved(self, operand: Any, device: torch.device) -> Any:
        """An operand on another device."""
        return operand.to(device)

    def matrix(self, place: str, *linears: Any) -> Any:
        """Matrices one below the other; valid until the next call for the same place."""
        if len(linears) == 1 and linears[0].weight.dtype == self.dtype:
            return linears[0].weight
        into_RC = self._buffer_of(place, *linears)
        start = 0
        for linear in linears:
            rows = slice(start, start + linear.out_features)
            if linear.weight.dtype == self.dtype:
                into_RC[rows] = linear.weight
            elif linear.weight.dtype == E4M3:
                linear.restore(into_RC[rows])
            else:
                dequantize(FourBits.of(linear.weight), into_RC[rows])
            start = rows.stop
        return into_RC

    def matrices(self, place: str, stack: PackedStack, first: int, last: int) -> Any:
        """The matrices of some experts, shape (N, R, C); valid until the next call for the same place."""
        into_NRC = self._buffer(place, (last - first, stack.rows, stack.columns), stack.device)
        stack.restore(first, last, into_NRC)
        return into_NRC

    def one(self, matrices: Any, number: int) -> Any:
        """One of `matrices`."""
        return matrices[number]

    def grouped(self, operand: Any, matrices: Any, ends_N: torch.Tensor) -> torch.Tensor:
        """``operand @ matrix.T`` for the rows of each expert, which end at `ends_N` (int32, on the device)."""
        if not operand.is_cuda:
            return _one_by_one(self, operand, matrices, ends_N, len(operand))
        product: torch.Tensor = torch._grouped_mm(operand, matrices.transpose(1, 2), offs=ends_N)
        return product

    def multiply(self, operand: Any, matrix: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        """``operand @ matrix.T``, in the compute dtype."""
        return operand @ matrix.T if out is None else torch.mm(operand, matrix.T, out=out)

    def parts(self, start: int, end: int) -> Iterator[slice]:
        """Ranges of slots from start to end, at most `ROWS` each."""
        for first in range(start, end, ROWS):
            yield slice(first, min(first + ROWS, end))

    def _buffer_of(self, place: str, *linears: Any) -> torch.Tensor:
        rows = sum(linear.out_features for linear in linears)
        return self._buffer(place, (rows, linears[0].in_features), linears[0].weight.device)

    def _buffer(self, place: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """The buffer of a place for matrices of this shape."""
        key = (place, shape[-2:], device)
        if key not in self._buffers or len(self._buffers[key]) < shape[0]:
            self._buffers[key] = torch.empty(shape, dtype=self.buffer_dtype, device=device)
        return self._buffers[key][: shape[0]]


class Fp8Products(Products):
    """Products in fp8: for 4-bit matrices the rows' scales are kept; matrices in e4m3 are multiplied unchanged."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.buffer_dtype = E4M3
        self._scales: dict[Any, torch.Tensor] = {}
        self._joined: dict[tuple[Any, ...], RowScaled] = {}

    def prepare(self, *linears: Any) -> None:
        """See `Products`.

        Raises
        ------
        ValueError
            When a matrix has a shape that cannot be multiplied in fp8.
        """
        stored = linears[0].weight.dtype == E4M3
        for linear in linears:
            _refuse_shape(linear.out_features, linear.in_features, FP8_STEP if stored else BLOCK)
        if stored:
            self._joined[linears] = _joined(linears)
        else:
            each = [row_scales(FourBits.of(linear.weight), linear.out_features) for linear in linears]
            self._scales[linears] = torch.cat(each)

    def prepare_stack(self, stack: PackedStack) -> None:
        """See `prepare`."""
        _refuse_shape(stack.rows, stack.columns, BLOCK if isinstance(stack, Stack4bit) else FP8_STEP)
        if isinstance(stack, Stack4bit):
            rows = row_scales(stack.part(0, stack.experts), stack.experts * stack.rows)
            self._scales[stack] = rows.view(stack.experts, stack.rows, 1)

    def normed(
        self, residual_TH: torch.Tensor, scale_H: torch.Tensor, eps: float, *added: torch.Tensor, routed: bool
    ) -> tuple[Any, Any]:
        """See `Products`."""
        return rounded_add_norm(residual_TH, scale_H, eps, *added, kept=routed)

    def operand(self, rows_TH: torch.Tensor) -> RowScaled:
        """See `Products`."""
        return rounded(rows_TH)

    def gated(self, both_SI2: torch.Tensor) -> RowScaled:
        """See `Products`."""
        return rounded_swiglu(both_SI2)

    def taken(self, operand: RowScaled, token_S: torch.Tensor) -> RowScaled:
        """See `Products`. All rows are gathered at once while the host waits: they are half as large."""
        values = operand.values.view(torch.uint8)[token_S].view(E4M3)  # torch cannot index rows of e4m3
        return RowScaled(values, operand.scale[token_S])

    def rows(self, taken: RowScaled, part: slice) -> RowScaled:
        """See `Products`."""
        if part == slice(None):
            return taken
        return RowScaled(taken.values[part], taken.scale[part].clone())  # cuBLAS needs aligned scales

    def moved(self, operand: RowScaled, device: torch.device) -> RowScaled:
        """See `Products`."""
        return RowScaled(*(part.to(device) for part in operand))

    def matrix(self, place: str, *linears: Any) -> RowScaled:
        """See `Products`."""
        if linears in self._joined:
            return self._joined[linears]
        into_RC, scale_R1 = self._buffer_of(place, *linears), self._scales[linears]
        start = 0
        for linear in linears:
            rows = slice(start, start + linear.out_features)
            dequantize_rounded(FourBits.of(linear.weight), scale_R1[rows], into_RC[rows])
            start = rows.stop
        return RowScaled(into_RC, scale_R1)

    def matrices(self, place: str, stack: PackedStack, first: int, last: int) -> RowScaled:
        """See `Products`."""
        if isinstance(stack, StackE4m3):
            return stack.part(first, last)
        into_NRC = self._buffer(place, (last - first, stack.rows, stack.columns), stack.device)
        scale_NR1 = self._scales[stack][first:last]
        dequantize_rounded(stack.part(first, last), scale_NR1.flatten(), into_NRC)
        return RowScaled(into_NRC, scale_NR1)

    def one(self, matrices: RowScaled, number: int) -> RowScaled:
        """See `Products`."""
        return RowScaled(matrices.values[number], matrices.scale[number])

    def grouped(self, operand: RowScaled, matrices: RowScaled, ends_N: torch.Tensor) -> torch.Tensor:
        """See `Products`."""
        if not operand.scale.is_cuda:
            return _one_by_one(self, operand, matrices, ends_N, len(operand.values))
        product: torch.Tensor = torch._scaled_grouped_mm(
            operand.values, matrices.values.transpose(1, 2), operand.scale.view(-1), matrices.scale.squeeze(-1),
            offs=ends_N, out_dtype=self.dtype, use_fast_accum=fp8.FAST_ACCUMULATION,
        )  # fmt: skip
        return product

    def multiply(self, operand: RowScaled, matrix: RowScaled, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Products`."""
        if out is None:
            out = operand.scale.new_empty(len(operand.values), len(matrix.values), dtype=self.dtype)
        return multiply(operand, matrix, out)

    def parts(self, start: int, end: int) -> Iterator[slice]:
        """See `Products`. The ranges have nearly equal sizes, because a product of few rows takes as long as one of
        many."""
        many = -(-(end - start) // FP8_ROWS)
        edges = [start + (end - start) * part // many for part in range(many + 1)]
        for first, last in pairwise(edges):
            yield slice(first, last)


def products_of(matmul: str, dtype: torch.dtype) -> Products:
    """The products for one of `workers.models.description.MATMULS`."""
    return Fp8Products(dtype) if matmul == "fp8" else Products(dtype)


def _one_by_one(products: Products, operand: Any, matrices: Any, ends_N: torch.Tensor, rows: int) -> torch.Tensor:
    """`Products.grouped` on devices without a grouped product."""
    taken = operand if isinstance(operand, RowScaled) else (operand, torch.arange(rows))
    parts = [
        products.multiply(products.rows(taken, slice(start, end)), products.one(matrices, number))
        for number, (start, end) in enumerate(pairwise([0, *ends_N.tolist()]))
    ]
    return torch.cat(parts)


def _refuse_shape(rows: int, columns: int, step: int) -> None:
    """Check that each block of a 4-bit matrix lies in one row, because the row's scale comes from its blocks."""
    if rows % FP8_STEP or columns % step:
        raise ValueError(
            f"a matrix of shape {(rows, columns)} cannot be multiplied in fp8, where rows must be multiples of"
            f" {FP8_STEP} and columns of {step}: use --matmul bf16"
        )


def _joined(linears: tuple[Any, ...]) -> RowScaled:
    """Join matrices in e4m3 in one tensor; the matrix of each Linear becomes a part of it."""
    values = torch.cat([linear.weight.data.view(torch.uint8) for linear in linears]).view(E4M3)
    scale = torch.cat([linear.row_scaled.scale for linear in linears])
    start = 0
    for linear in linears:
        linear.weight.data = values[start : start + linear.out_features]
        start += linear.out_features
    return RowScaled(values, scale)
