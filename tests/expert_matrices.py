"""The values of a loaded model's matrices without this project's kernels: by bitsandbytes for 4 bits, otherwise scale
by scale."""

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

from workers.models.four_bits import STEP_BLOCK, FourBits
from workers.models.stored import BLOCK


def by_bitsandbytes(matrices: FourBits, number: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One of several matrices in 4 bits, by bitsandbytes' own function, shape (rows, columns).

    It is passed as rows of one block: on CPUs with AVX-512, bitsandbytes starts a new block in each row.
    """
    packed, scale, step = (part[number] for part in (matrices.packed, matrices.scale, matrices.step))
    steps = QuantState(step, code=matrices.scale_code, blocksize=STEP_BLOCK, dtype=torch.float32)
    state = QuantState(
        scale,
        shape=torch.Size((len(scale), BLOCK)),
        blocksize=BLOCK,
        quant_type=kind_of(matrices),
        dtype=dtype,
        offset=matrices.offset[number],
        state2=steps,
    )
    return dequantize_4bit(packed.view(-1, 1), state).view(rows, -1)


def kind_of(matrices: FourBits) -> str:
    """nf4 or fp4, from the values of the codes."""
    code = matrices.code
    [kind] = [name for name in ("nf4", "fp4") if torch.equal(get_4bit_type(name, device=code.device), code)]
    return kind


def linear_matrix(linear: Any) -> torch.Tensor:
    """A loaded Linear's matrix, in float32."""
    if hasattr(linear, "row_scaled"):
        return linear.weight.float() * linear.weight_scale[:, None]
    return dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()


def expert_matrices(experts: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Gate, up and down of each expert of a `workers.models.experts.PackedExperts`, in float32."""
    for number in range(len(experts)):
        both, down = (_float(stack, number) for stack in (experts.both, experts.down))
        gate, up = both.chunk(2)
        yield gate, up, down


def _float(stack: Any, expert: int) -> torch.Tensor:
    part = stack.part(expert, expert + 1)
    if isinstance(part, FourBits):
        return torch.cat([by_bitsandbytes(part, number, stack.rows // stack.parts) for number in range(stack.parts)])
    values, scale = part
    return values[0].float() * scale[0]
