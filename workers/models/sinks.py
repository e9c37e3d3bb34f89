"""The forward pass of gpt-oss: attention with sinks, in some layers within windows; experts with biases and a clamped
gate.

T tokens in B rows of P positions, N heads of width D, G heads of keys. A sink is a learned logit of each head that is
part of the sum of the softmax but adds nothing to its result (the model card, 2025, arXiv:2508.10925, section 2).
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workers.models.biased import clamped_swiglu
from workers.models.decoder import DecoderForward

varlen_attn: Callable[..., Any] | None
try:  # torch before 2.10 does not have it
    from torch.nn.attention.varlen import AuxRequest, varlen_attn
except ImportError:
    varlen_attn = None

_TAKEN = signature(varlen_attn).parameters if varlen_attn is not None else {}
FLASH_CAPABILITY = (8, 0)  # of the first GPUs for which torch has flash attention


class GptOssForward(DecoderForward):
    """gpt-oss' layers, ready to be applied. Its routers and the angles of the rotation are those of transformers.

    Parameters
    ----------
    model, matmul
        See `DecoderForward`. The gates of the experts become one step, and the norms' weights become float32, which
        does not change the result: they are multiplied before the norm is rounded.
    """

    expert_backend: ClassVar[str] = "grouped_sinks"
    """Like grouped, with attention by `attended` instead of transformers."""

    @staticmethod
    def _special(config: Any) -> bool:
        return False

    def __init__(self, model: Any, matmul: str = "bf16") -> None:
        super().__init__(model, matmul)
        config = model.config
        alpha, limit = getattr(config, "swiglu_alpha", 1.702), getattr(config, "swiglu_limit", 7.0)
        model.norm.float()
        for layer in model.layers:
            layer.input_layernorm.float()
            layer.post_attention_layernorm.float()
            if (experts := getattr(layer.mlp, "experts", None)) is not None:
                experts.gate = partial(clamped_swiglu, alpha=alpha, limit=limit)

    def _turns(self, residual_TH: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos_PD, sin_PD = (torch.cat([half, half], dim=-1) for half in super()._turns(residual_TH, place))
        return cos_PD, sin_PD

    def _attended(
        self, attention: Any, query_BPND: torch.Tensor, key_BPND: torch.Tensor, value_BPND: torch.Tensor
    ) -> torch.Tensor:
        return attended(query_BPND, key_BPND, value_BPND, attention.sinks, attention.sliding_window)


def plain_attended(
    query_BPND: torch.Tensor,
    key_BPGD: torch.Tensor,
    value_BPGD: torch.Tensor,
    sink_N: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of each position to itself and earlier positions, with the head's sink; shape (B, P, N, D).

    The sink is an additional key whose value is 0: queries have an additional column for it, which is 0 in all other
    keys. Rows are computed one after the other, so that at most one row's weights are in memory if torch keeps them.

    Parameters
    ----------
    window
        Number of positions that are attended to, including the position itself; None: all earlier ones.
    """
    positions, head = query_BPND.shape[1], query_BPND.shape[3]
    place = torch.arange(positions, device=query_BPND.device)
    back_PP = place[:, None] - place
    seen = nn.functional.pad((back_PP >= 0) & (back_PP < (window or positions)), (1, 0), value=True)
    found = []
    for query, key, value in zip(query_BPND, key_BPGD, value_BPGD, strict=True):
        query = torch.cat([query, sink_N.to(query.dtype).expand(positions, -1)[..., None]], dim=-1)
        key, value = (nn.functional.pad(part, (0, 1, 0, 0, 1, 0)) for part in (key, value))
        key[0, :, -1] = head**0.5  # times the scale: 1
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=head**-0.5, enable_gqa=True)
        found.append(mixed[0, ..., :head].transpose(0, 1))
    return torch.stack(found)


def attended(
    query_BPND: torch.Tensor,
    key_BPGD: torch.Tensor,
    value_BPGD: torch.Tensor,
    sink_N: torch.Tensor,
    window: int | None = None,
) -> torch.Tensor:
    """`plain_attended` by flash attention, whose sum of weights gives the sink's share."""
    if not _has_flash(query_BPND):
        return plain_attended(query_BPND, key_BPGD, value_BPGD, sink_N, window)
    assert varlen_attn is not None
    rows, positions = query_BPND.shape[:2]
    ends = torch.arange(0, (rows + 1) * positions, positions, dtype=torch.int32, device=query_BPND.device)
    given = (part.flatten(0, 1) for part in (query_BPND, key_BPGD, value_BPGD))
    grouped = {"enable_gqa": True} if "enable_gqa" in _TAKEN else {}  # not needed before 2.12
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found_TND, sum_NT = varlen_attn(
            *given, ends, ends, positions, positions,
            return_aux=AuxRequest(lse=True), window_size=(-1 if window is None else window - 1, 0), **grouped,
        )  # fmt: skip
    share_TN = torch.sigmoid(sum_NT.T - sink_N)
    found: torch.Tensor = found_TND.mul_(share_TN[..., None]).unflatten(0, (rows, positions))
    return found


def _has_flash(query: torch.Tensor) -> bool:
    """Whether torch supports attention in windows on this GPU in this dtype."""
    there = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and "window_size" in _TAKEN
    return bool(there and torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY)
