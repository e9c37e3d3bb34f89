"""Matrices in 4 bits as bitsandbytes stores them; several may share tensors.

M matrices of R rows and C columns, n = R·C/64 blocks of 64 values per matrix.
"""

from typing import Any, NamedTuple

import torch

from workers.models.stored import BLOCK

STEP_BLOCK = 256  # scales that share a second scale under double quantization; the value of bitsandbytes


class FourBits(NamedTuple):
    """M matrices in NF4 or FP4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314)."""

    packed: torch.Tensor
    """uint8, shape (M, R·C/2): two values per byte, the first in the upper half."""
    scale: torch.Tensor
    """uint8, shape (M, n): index of each block's scale in `scale_code`."""
    step: torch.Tensor
    """float32, shape (M, ⌈n/256⌉): factor of 256 scales."""
    offset: torch.Tensor
    """float32, shape (M,): offset of the scales of a matrix."""
    code: torch.Tensor
    """float32, shape (16,): the values."""
    scale_code: torch.Tensor
    """float32, shape (256,)"""

    @classmethod
    def of(cls, weight: Any) -> "FourBits":
        """bitsandbytes' Params4bit."""
        return cls.from_state(weight.data, weight.quant_state)

    @classmethod
    def from_state(cls, packed: torch.Tensor, state: Any) -> "FourBits":
        """The matrix's values and bitsandbytes' QuantState."""
        assert (state.blocksize, state.state2.blocksize) == (BLOCK, STEP_BLOCK), "loading checks it"
        values, scale, step = (each.reshape(1, -1) for each in (packed, state.absmax, state.state2.absmax))
        return cls(values, scale, step, state.offset.reshape(1), state.code, state.state2.code)

    def block_scales(self) -> torch.Tensor:
        """The scale of each block; float32, shape (M, n)."""
        steps = self.step.repeat_interleave(STEP_BLOCK, dim=1)[:, : self.scale.shape[1]]
        return self.scale_code[self.scale.int()] * steps + self.offset[:, None]
