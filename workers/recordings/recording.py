"""A recording: values besides the choices, for one micro-batch after the other, each with its proof.

T tokens of a micro-batch, S of them sampled, L layers that have experts, K choices, H hidden.

Values stay on the device until the micro-batch ends. The proof computes the sample again, independently of the recorded
values: values shifted by one token, layer or batch agree for too few tokens of the sample.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

# Relative. Another GEMM shape may round bf16 logits differently, by a step of 2^-4 each below 16, which changes a
# weight by at most e^(2 · 2^-4) - 1 = 0.133. Products in fp8 do not contribute: both answers have the same input.
WEIGHT_TOLERANCE = 0.15
SAMPLE_AGREEING = 0.75  # near-ties flip 0.2-0.75 % of choices (measured); routes of other tokens agree on 3-30 %
STEPS = 4  # of the dtype: tolerance for another shape of a product, relative to the largest value (arbitrary)
FINEST = 1e-3  # smallest tolerance in any dtype (arbitrary)


class Batch(NamedTuple):
    """A micro-batch on the model's first device; a token's number counts rows · positions."""

    token: torch.Tensor
    """int64, shape (rows, positions)."""
    sample: torch.Tensor
    """int64, shape (S,): the sampled tokens."""
    followed: torch.Tensor
    """int64, shape (N,): the tokens that are followed by another in their row."""


class Chosen(NamedTuple):
    """All choices of a micro-batch, in their routers' own order."""

    experts_LTK: torch.Tensor
    weights_LTK: torch.Tensor
    sample: torch.Tensor


class Recording:
    """One kind of values besides the choices."""

    whole = False
    """Whether all layers are run, including the last layer's experts and the final norm."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach hooks while the block runs."""
        yield

    def begin(self, batch: Batch) -> None:
        """Called before the model runs."""

    def routed(self, index: int, hidden_SH: torch.Tensor, output: Any, again: Any) -> None:
        """Called after a router.

        Parameters
        ----------
        index
            Index of the layer among those that have experts.
        hidden_SH
            The router's input for the sampled tokens.
        output, again
            The router's output, and its output when it was called with only the sampled tokens.
        """

    def ended(self, output: Any) -> None:
        """Called after the last layer with the output of the forward pass."""

    def arrays(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """The values by the name of the array in the store, with the shape (T, \\*trailing); called once, after
        `doubts`."""
        raise NotImplementedError

    def doubts(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """Maps each possible fault to the sampled tokens that show it in each layer; bool, shape (L, S)."""
        raise NotImplementedError


def doubted(agrees_LS: torch.Tensor) -> torch.Tensor:
    """The sampled tokens for which the two answers differ; none if these are few."""
    return ~agrees_LS & (agrees_LS.float().mean(dim=1, keepdim=True) < SAMPLE_AGREEING)


def near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """Where two results of products in a dtype are equal up to rounding."""
    return (found - wanted).abs() <= max(FINEST, STEPS * torch.finfo(dtype).eps) * scale


def same_choices(was: Sequence[torch.Tensor], again: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where experts and weights (..., K), in order of weight, are the same up to a near-tie; bool (...)."""
    # Near-ties may swap one expert, even the same one for every token if the text repeats one token.
    shared = (again[0][..., :, None] == was[0][..., None, :]).any(dim=-1).sum(dim=-1)
    close = (again[1] - was[1]).abs() <= WEIGHT_TOLERANCE * was[1].abs()
    return close.all(dim=-1) & (shared >= max(1, was[0].shape[-1] - 1))
