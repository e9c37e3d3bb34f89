"""A recording: values beside the choices, of one micro-batch after the other, each with its proof.

T tokens of a micro-batch, S of them sampled, L layers that have experts, K choices, H hidden.

Values stay on the device until the micro-batch ends. The proof asks again for the sample, apart from how the values
came to be: what lies one token, layer or batch beside its place agrees on too few of the sample.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

# Relative. Another GEMM shape may round bf16 logits otherwise, by a step of 2^-4 each below 16, which moves a weight by
# e^(2 · 2^-4) - 1 = 0.133 at most. Products in fp8 have no part in it: both answers have the same input.
WEIGHT_TOLERANCE = 0.15
SAMPLE_AGREEING = 0.75  # near-ties flip 0.2-0.75 % of choices (measured); routes of other tokens agree on 3-30 %
STEPS = 4  # of the dtype: by so much another shape of a product may differ, relative to the largest value (arbitrary)
FINEST = 1e-3  # and by so much in any dtype (arbitrary)


class Batch(NamedTuple):
    """A micro-batch, on the device where the model begins; a token's number counts rows · positions."""

    token: torch.Tensor
    """int64, shape (rows, positions)."""
    sample: torch.Tensor
    """int64, shape (S,): the tokens that are asked about again."""
    followed: torch.Tensor
    """int64, shape (N,): the tokens after which another stands in their row."""


class Chosen(NamedTuple):
    """All choices of a micro-batch, in their routers' own order."""

    experts_LTK: torch.Tensor
    weights_LTK: torch.Tensor
    sample: torch.Tensor


class Recording:
    """One kind of values beside the choices."""

    whole = False
    """Whether the layers are run to their end, the last layer's experts and the final norm with them."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks, while the block runs."""
        yield

    def begin(self, batch: Batch) -> None:
        """Before the model runs."""

    def routed(self, index: int, hidden_SH: torch.Tensor, output: Any, again: Any) -> None:
        """After a router.

        Parameters
        ----------
        index
            Of the layer, among those that have experts.
        hidden_SH
            What reached the router, of the sampled tokens.
        output, again
            What it returned, and what it returned when it was asked about the sampled tokens alone.
        """

    def ended(self, output: Any) -> None:
        """After the last layer, with what the forward returned."""

    def arrays(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """By name of the array of the store, with the shape (T, \\*trailing)."""
        raise NotImplementedError

    def doubts(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """What is wrong with a layer, to the sampled tokens that show it; bool, shape (L, S)."""
        raise NotImplementedError


def doubted(agrees_LS: torch.Tensor) -> torch.Tensor:
    """Of which sampled tokens the two answers differ; of none where they are few."""
    return ~agrees_LS & (agrees_LS.float().mean(dim=1, keepdim=True) < SAMPLE_AGREEING)


def near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """Where two results of products in a dtype are equal, but for how they were rounded."""
    return (found - wanted).abs() <= max(FINEST, STEPS * torch.finfo(dtype).eps) * scale


def same_choices(was: Sequence[torch.Tensor], again: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where experts and weights (..., K), in order of weight, are the same but for a near-tie; bool (...)."""
    # Near-ties may swap one expert, also the same one for every token where the text repeats one token.
    shared = (again[0][..., :, None] == was[0][..., None, :]).any(dim=-1).sum(dim=-1)
    close = (again[1] - was[1]).abs() <= WEIGHT_TOLERANCE * was[1].abs()
    return close.all(dim=-1) & (shared >= max(1, was[0].shape[-1] - 1))
