"""Mixtral's forward up to the last router, with nothing computed that no router needs.

T tokens in B rows of P positions, K choices a token, S = T·K slots sorted by expert, H hidden, I inner width.

transformers loads the model and owns its weights; here they are applied in another order: no mask, no cache, no head.
A 4-bit matrix is dequantized into one buffer, just before its product; an expert's two first matrices are one
product. What lies between the products is fused (`workers.models.kernels`). The routers are called as modules, so that
hooks on them see what they always saw. One synchronization a layer: how many slots each expert has. Where the layers
lie on several GPUs, the hidden states go from one to the next.

Deterministic: no atomic additions; each product's shape depends on the micro-batch alone.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workers.models.description import FOUR_BITS
from workers.models.kernels import add_norm, dequantize, rotate, swiglu

ROWS = 16_384  # slots of an expert that are computed at a time: bounds memory when routing is skewed (arbitrary)


class MixtralForward:
    """A Mixtral's layers, ready to be applied: a `workers.models.forwards.Forward`.

    Parameters
    ----------
    model
        A loaded model, for which `applies` was true.
    """

    expert_backend: ClassVar[str] = "sorted"
    """Slots are sorted by expert."""

    @classmethod
    def applies(cls, model: Any, quantization: str) -> bool:
        """Whether it is a plain Mixtral in 4 bits: every position sees all before it, and experts are gated by SiLU."""
        config = model.config
        return quantization in FOUR_BITS and not config.sliding_window and config.hidden_act == "silu"

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self.model: Any = model
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self._buffers: dict[tuple[str, int, int, torch.device], torch.Tensor] = {}

    def __call__(self, input_ids: torch.Tensor, **ignored: Any) -> None:
        """Run the layers; hooks on the routers take what they want, and may end it.

        Parameters
        ----------
        input_ids : int64 tensor, shape (B, P)
        ignored
            Arguments that other models need, to leave out mask and cache.
        """
        layers, positions = self.model.layers, input_ids.shape[1]
        residual_TH = self.model.embed_tokens(input_ids).flatten(0, 1)
        place = torch.arange(positions, device=input_ids.device)[None]
        cos_PD, sin_PD = (table[0] for table in self.model.rotary_emb(residual_TH, place))
        first = layers[0].input_layernorm
        normed_TH = add_norm(residual_TH, first.weight, first.variance_epsilon)
        for layer, following in pairwise([*layers, None]):
            if (here := layer.input_layernorm.weight.device) != residual_TH.device:  # the layers are on several GPUs
                residual_TH, normed_TH, cos_PD, sin_PD = (
                    part.to(here) for part in (residual_TH, normed_TH, cos_PD, sin_PD)
                )
            mixed_TH = self._attention(layer.self_attn, normed_TH, cos_PD, sin_PD)
            norm = layer.post_attention_layernorm
            normed_TH = add_norm(residual_TH, norm.weight, norm.variance_epsilon, mixed_TH)
            _, weight_TK, expert_TK = layer.mlp.gate(normed_TH)
            if following is None:
                return
            rows_SH, slot_TK = self._experts(layer.mlp.experts, normed_TH, expert_TK)
            norm, scale_H = following.input_layernorm, following.input_layernorm.weight.to(residual_TH.device)
            normed_TH = add_norm(residual_TH, scale_H, norm.variance_epsilon, rows_SH, slot_TK, weight_TK)

    def _attention(
        self, attention: Any, normed_TH: torch.Tensor, cos_PD: torch.Tensor, sin_PD: torch.Tensor
    ) -> torch.Tensor:
        weight = self._weights("qkv", attention.q_proj, attention.k_proj, attention.v_proj)
        qkv_TW = normed_TH @ weight.T
        rotate(qkv_TW, cos_PD, sin_PD, self.heads + self.groups)
        sizes = [self.heads, self.groups, self.groups]
        query, key, value = torch.split(
            qkv_TW.view(-1, len(cos_PD), sum(sizes), self.head).transpose(1, 2), sizes, dim=1
        )
        with sdpa_kernel(self._attention_backends(len(cos_PD)), set_priority=True):
            found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        flat_TH = found.transpose(1, 2).reshape(len(normed_TH), -1)
        return flat_TH @ self._weights("o", attention.o_proj).T

    @staticmethod
    def _attention_backends(positions: int) -> list[SDPBackend]:
        """The first that can is taken.

        cuDNN takes half of flash attention's time, and 0.04 to 0.6 s of planning for each new shape (an H200): it is
        for full rows, whose shape comes again and again.
        """
        full = positions >= 512 and positions & (positions - 1) == 0
        return [SDPBackend.CUDNN_ATTENTION if full else SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def _experts(
        self, experts: Any, normed_TH: torch.Tensor, expert_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen experts' outputs, by slot, and which slot each choice has."""
        choices = expert_TK.shape[1]
        sorted_S, order_S = expert_TK.flatten().sort(stable=True)
        slot_TK = torch.empty_like(order_S)
        slot_TK[order_S] = torch.arange(len(order_S), device=order_S.device)
        token_S = order_S // choices
        ends = torch.searchsorted(sorted_S, torch.arange(len(experts), device=sorted_S.device), right=True).tolist()
        rows_SH = normed_TH.new_empty(len(token_S), normed_TH.shape[1])
        for expert, (start, end) in zip(experts, pairwise([0, *ends]), strict=True):
            if start < end:
                gate, up, down = (expert.get_submodule(leaf) for leaf in expert.leaves)
                both_WH, down_HI = self._weights("both", gate, up), self._weights("down", down)
                for part in _parts(start, end):
                    inner = swiglu(normed_TH[token_S[part]] @ both_WH.T)
                    torch.mm(inner, down_HI.T, out=rows_SH[part])
        return rows_SH, slot_TK.view(-1, choices)

    def _weights(self, place: str, *linears: Any) -> torch.Tensor:
        """4-bit matrices one below the other, in the compute dtype; in a buffer that the next ones take."""
        rows, columns = sum(linear.out_features for linear in linears), linears[0].in_features
        weight = linears[0].weight
        key = (place, rows, columns, weight.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(rows, columns, dtype=weight.quant_state.dtype, device=weight.device)
        start = 0
        for linear in linears:
            dequantize(linear.weight, self._buffers[key][start : start + linear.out_features])
            start += linear.out_features
        return self._buffers[key]


def _parts(start: int, end: int) -> Iterator[slice]:
    """Slots from start to end, `ROWS` at a time and as many at most."""
    for first in range(start, end, ROWS):
        yield slice(first, min(first + ROWS, end))
