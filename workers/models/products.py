"""The two ways in which a forward multiplies: in the compute dtype, or in fp8.

T tokens, S slots, H hidden, I inner, R rows and C columns of a matrix. An operand is what stands on the left of a
product, a matrix what stands on its right: plain tensors in one way, `workers.models.fp8.RowScaled` in the other.
Matrices are Linears in 4 bits or in e4m3 (`workers.models.fp8_loading`), one below the other. One that must be
dequantized goes into a buffer that the next one of its place takes. A router's product is none of these: it is the
router's own.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from workers.models.fp8 import (
    E4M3,
    RowScaled,
    dequantize_rounded,
    multiply,
    restored,
    rounded,
    rounded_add_norm,
    rounded_swiglu,
    row_scales,
)
from workers.models.kernels import add_norm, dequantize, swiglu

ROWS = 16_384  # slots of an expert that are computed at a time: bounds memory when routing is skewed (arbitrary)
FP8_ROWS = 32_768  # the same in fp8: 0.3 % faster than 16,384 at 65,536 tokens a micro-batch (an H200)
FP8_STEP = 16  # both sizes of a matrix must be multiples of it where cards multiply in fp8


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
        self._buffers: dict[tuple[str, int, int, torch.device], torch.Tensor] = {}

    def prepare(self, *linears: Any) -> None:
        """Called once for each group of matrices that are multiplied as one, after loading."""

    def normed(
        self, residual_TH: torch.Tensor, scale_H: torch.Tensor, eps: float, *added: torch.Tensor, routed: bool
    ) -> tuple[Any, Any]:
        """`workers.models.kernels.add_norm`: as a router takes it, where it is `routed`, and as an operand."""
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
        """Some of them, as an operand."""
        operand, token_S = taken
        return operand[token_S[part]]

    def moved(self, operand: Any, device: torch.device) -> Any:
        """An operand on another device."""
        return operand.to(device)

    def matrix(self, place: str, *linears: Any) -> Any:
        """Matrices one below the other; valid until the next ones of the same place."""
        into_RC = self._buffer(place, *linears)
        start = 0
        for linear in linears:
            rows = slice(start, start + linear.out_features)
            if linear.weight.dtype == E4M3:
                restored(linear.row_scaled, into_RC[rows])
            else:
                dequantize(linear.weight, into_RC[rows])
            start = rows.stop
        return into_RC

    def multiply(self, operand: Any, matrix: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        """``operand @ matrix.T``, in the compute dtype."""
        return operand @ matrix.T if out is None else torch.mm(operand, matrix.T, out=out)

    def parts(self, start: int, end: int) -> Iterator[slice]:
        """Slots from start to end, `ROWS` at a time and as many at most."""
        for first in range(start, end, ROWS):
            yield slice(first, min(first + ROWS, end))

    def _buffer(self, place: str, *linears: Any) -> torch.Tensor:
        """The place's buffer for such matrices, on their device."""
        rows, device = sum(linear.out_features for linear in linears), linears[0].weight.device
        key = (place, rows, linears[0].in_features, device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(rows, linears[0].in_features, dtype=self.buffer_dtype, device=device)
        return self._buffers[key]


class Fp8Products(Products):
    """Products in fp8: of 4-bit matrices the rows' scales are kept, those in e4m3 are multiplied as they are."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.buffer_dtype = E4M3
        self._scales: dict[tuple[Any, ...], torch.Tensor] = {}
        self._joined: dict[tuple[Any, ...], RowScaled] = {}

    def prepare(self, *linears: Any) -> None:
        """See `Products`.

        Raises
        ------
        ValueError
            When a matrix has a shape that cannot be multiplied in fp8.
        """
        for linear in linears:
            if linear.out_features % FP8_STEP or linear.in_features % FP8_STEP:
                raise ValueError(
                    f"a matrix of shape {(linear.out_features, linear.in_features)} cannot be multiplied in fp8, where"
                    f" both must be multiples of {FP8_STEP}: use --matmul bf16"
                )
        if linears[0].weight.dtype == E4M3:
            self._joined[linears] = _joined(linears)
        else:
            self._scales[linears] = torch.cat([row_scales(linear.weight) for linear in linears])

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
        """See `Products`; at once, while the host waits: they are half as large."""
        values = operand.values.view(torch.uint8)[token_S].view(E4M3)  # torch picks no rows of e4m3
        return RowScaled(values, operand.scale[token_S])

    def rows(self, taken: RowScaled, part: slice) -> RowScaled:
        """See `Products`."""
        return RowScaled(taken.values[part], taken.scale[part].clone())  # cuBLAS wants them aligned

    def moved(self, operand: RowScaled, device: torch.device) -> RowScaled:
        """See `Products`."""
        return RowScaled(*(part.to(device) for part in operand))

    def matrix(self, place: str, *linears: Any) -> RowScaled:
        """See `Products`."""
        if linears in self._joined:
            return self._joined[linears]
        into_RC, scale_R1 = self._buffer(place, *linears), self._scales[linears]
        start = 0
        for linear in linears:
            rows = slice(start, start + linear.out_features)
            dequantize_rounded(linear.weight, scale_R1[rows], into_RC[rows])
            start = rows.stop
        return RowScaled(into_RC, scale_R1)

    def multiply(self, operand: RowScaled, matrix: RowScaled, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `Products`."""
        if out is None:
            out = operand.scale.new_empty(len(operand.values), len(matrix.values), dtype=self.dtype)
        return multiply(operand, matrix, out)

    def parts(self, start: int, end: int) -> Iterator[slice]:
        """See `Products`; of nearly equal sizes, since a product of few rows takes as long as one of many."""
        many = -(-(end - start) // FP8_ROWS)
        edges = [start + (end - start) * part // many for part in range(many + 1)]
        for first, last in pairwise(edges):
            yield slice(first, last)


def products_of(matmul: str, dtype: torch.dtype) -> Products:
    """What multiplies under one of `workers.models.description.MATMULS`."""
    return Fp8Products(dtype) if matmul == "fp8" else Products(dtype)


def _joined(linears: tuple[Any, ...]) -> RowScaled:
    """Matrices in e4m3 in one tensor, of which each Linear's own becomes a part."""
    values = torch.cat([linear.weight.data.view(torch.uint8) for linear in linears]).view(E4M3)
    scale = torch.cat([linear.row_scaled.scale for linear in linears])
    start = 0
    for linear in linears:
        linear.weight.data = values[start : start + linear.out_features]
        start += linear.out_features
    return RowScaled(values, scale)
