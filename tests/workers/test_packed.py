"""Many matrices in common tensors: each is bit-identical to what bitsandbytes makes of it alone."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from expert_matrices import by_bitsandbytes

from workers.models import fp8
from workers.models.four_bits import FourBits
from workers.models.kernels import dequantize
from workers.models.packed import PackedStack, Stack4bit, StackE4m3

# Experts, parts, rows, columns: blocks of a matrix below 256, one above, no multiple, and rows that end in a block.
SHAPES = [(3, 2, 8, 64), (2, 1, 64, 257 * 64 // 64), (2, 2, 96, 352), (4, 1, 6, 32)]


def random_matrices(shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """Matrices, expert by expert, of different magnitudes, so that each has other scales and another offset."""
    experts, parts, rows, columns = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return [
        torch.randn(rows, columns, generator=generator) * 3.0**number - number / 7 for number in range(experts * parts)
    ]


def stack_of(shape: tuple[int, int, int, int], matrices: list[torch.Tensor], kind: str) -> Stack4bit:
    stack = Stack4bit(shape)
    for number, matrix in enumerate(matrices):
        weight = Params4bit(matrix, requires_grad=False, quant_type=kind, compress_statistics=True)
        stack.take(number, FourBits.of(weight.to("cpu")))
    return stack


def alone(matrix: torch.Tensor, kind: str, dtype: torch.dtype) -> torch.Tensor:
    """A matrix from bitsandbytes, passed as rows of one block (see `expert_matrices.by_bitsandbytes`)."""
    blocks = matrix.reshape(-1, 64)
    packed, state = quantize_4bit(blocks, blocksize=64, compress_statistics=True, quant_type=kind)
    state.dtype = dtype
    return dequantize_4bit(packed, state).view_as(matrix)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_come_back_from_a_stack_as_bitsandbytes_gives_each_alone(
    shape: tuple[int, int, int, int], kind: str
) -> None:
    matrices = random_matrices(shape)
    stack, (experts, parts, rows, columns) = stack_of(shape, matrices, kind), shape
    for dtype in (torch.float32, torch.bfloat16):
        wanted = torch.stack([alone(matrix, kind, dtype) for matrix in matrices]).view(experts, -1, columns)
        for first, last in ((0, experts), (1, experts), (experts - 1, experts)):
            found = torch.empty(last - first, parts * rows, columns, dtype=dtype)
            dequantize(stack.part(first, last), found)
            assert torch.equal(found, wanted[first:last])
            last_one = by_bitsandbytes(stack.part(first, last), (last - first) * parts - 1, rows, dtype)
            assert torch.equal(last_one, wanted[last - 1, -rows:]), "what other tests compare with"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_scales_of_rows_are_those_of_each_matrix_s_rows(kind: str) -> None:
    shape = (3, 2, 10, 192)
    matrices = random_matrices(shape)
    scale = fp8.row_scales(stack_of(shape, matrices, kind).part(0, 3), 3 * 2 * 10)
    wanted = torch.cat([alone(matrix, kind, torch.float32) for matrix in matrices]).abs().amax(-1, keepdim=True) / 448
    assert scale.shape == (60, 1)
    torch.testing.assert_close(scale, wanted)


def test_matrices_in_e4m3_come_back_as_they_were_taken() -> None:
    shape = (3, 2, 16, 48)
    stack, matrices = StackE4m3(shape), [fp8.rounded(matrix) for matrix in random_matrices(shape)]
    for number, matrix in enumerate(matrices):
        stack.take(number, matrix)
    values, scale = stack.part(1, 3)
    assert values.shape == (2, 32, 48)
    assert scale.shape == (2, 32, 1)
    assert torch.equal(values.float().view(-1, 48), torch.cat([one.values.float() for one in matrices[2:]]))
    assert torch.equal(scale.view(-1, 1), torch.cat([one.scale for one in matrices[2:]]))


@pytest.mark.parametrize("kind", [Stack4bit, StackE4m3])
def test_a_stack_takes_no_memory_before_its_first_matrix(kind: type[PackedStack]) -> None:
    assert {buffer.device.type for buffer in kind((3, 2, 16, 64)).buffers()} == {"meta"}
