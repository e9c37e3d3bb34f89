"""Mixtral's forward up to the last router, with nothing computed that no router needs.

T tokens in B rows of P positions, K choices a token, S = T·K slots sorted by expert, H hidden, I inner width.

transformers loads the model and owns its weights; here they are applied in another order: no mask, no cache, no head.
A matrix is dequantized into one buffer, just before its product (`workers.models.products`); an expert's two first
matrices are one product. What lies between the products is fused (`workers.models.kernels`). The routers are called as
modules, so that hooks on them see what they always saw. One synchronization a layer: how many slots each expert has.
Where the layers lie on several GPUs, the hidden states go from one to the next.

Deterministic: no atomic additions; each product's shape depends on the micro-batch alone.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workers.models.kernels import rotate
from workers.models.products import products_of
from workers.models.stored import FOUR_BITS


class MixtralForward:
    """A Mixtral's layers, ready to be applied: a `workers.models.forwards.Forward`.

    Parameters
    ----------
    model
        A loaded model, for which `applies` was true.
    matmul
        bf16 or fp8.
    """

    expert_backend: ClassVar[str] = "sorted"
    """Slots are sorted by expert."""
    matmuls: ClassVar[tuple[str, ...]] = ("bf16", "fp8")

    @classmethod
    def applies(cls, model: Any, quantization: str) -> bool:
        """Whether it is a plain quantized Mixtral: every position sees all before it, and experts are gated by SiLU."""
        config = model.config
        return quantization in (*FOUR_BITS, "fp8") and not config.sliding_window and config.hidden_act == "silu"

    def __init__(self, model: Any, matmul: str = "bf16") -> None:
        config = model.config
        self.model = model
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.hidden = config.hidden_size
        self.head = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.products = products_of(matmul, model.embed_tokens.weight.dtype)
        for layer in model.layers:
            groups = [_qkv(layer.self_attn), (layer.self_attn.o_proj,)]
            for expert in getattr(layer.mlp, "experts", ()):
                groups += _linears(expert)
            for linears in groups:
                self.products.prepare(*linears)

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
        first, products = layers[0].input_layernorm, self.products
        _, operand = products.normed(residual_TH, first.weight, first.variance_epsilon, routed=False)
        for layer, following in pairwise([*layers, None]):
            if (here := layer.input_layernorm.weight.device) != residual_TH.device:  # the layers are on several GPUs
                residual_TH, cos_PD, sin_PD = (part.to(here) for part in (residual_TH, cos_PD, sin_PD))
                operand = products.moved(operand, here)
            mixed_TH = self._attention(layer.self_attn, operand, cos_PD, sin_PD)
            norm = layer.post_attention_layernorm
            normed_TH, operand = products.normed(residual_TH, norm.weight, norm.variance_epsilon, mixed_TH, routed=True)
            _, weight_TK, expert_TK = layer.mlp.gate(normed_TH)
            del mixed_TH, normed_TH  # what is large is let go before more is made
            if following is None:
                return
            rows_SH, slot_TK = self._experts(layer.mlp.experts, operand, expert_TK)
            norm, scale_H = following.input_layernorm, following.input_layernorm.weight.to(residual_TH.device)
            added = (rows_SH, slot_TK, weight_TK)
            _, operand = products.normed(residual_TH, scale_H, norm.variance_epsilon, *added, routed=False)
            del rows_SH, added

    def _attention(self, attention: Any, operand: Any, cos_PD: torch.Tensor, sin_PD: torch.Tensor) -> torch.Tensor:
        products = self.products
        qkv_TW = products.multiply(operand, products.matrix("qkv", *_qkv(attention)))
        rotate(qkv_TW, cos_PD, sin_PD, self.heads + self.groups)
        sizes = [self.heads, self.groups, self.groups]
        query, key, value = torch.split(
            qkv_TW.view(-1, len(cos_PD), sum(sizes), self.head).transpose(1, 2), sizes, dim=1
        )
        with sdpa_kernel(self._attention_backends(len(cos_PD)), set_priority=True):
            found = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        flat_TH = found.transpose(1, 2).reshape(len(qkv_TW), -1)
        return products.multiply(products.operand(flat_TH), products.matrix("o", attention.o_proj))

    @staticmethod
    def _attention_backends(positions: int) -> list[SDPBackend]:
        """The first that can is taken.

        cuDNN takes half of flash attention's time, and 0.04 to 0.6 s of planning for each new shape (an H200): it is
        for full rows, whose shape comes again and again.
        """
        full = positions >= 512 and positions & (positions - 1) == 0
        return [SDPBackend.CUDNN_ATTENTION if full else SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def _experts(self, experts: Any, operand: Any, expert_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen experts' outputs, by slot, and which slot each choice has."""
        choices = expert_TK.shape[1]
        sorted_S, order_S = expert_TK.flatten().sort(stable=True)
        slot_TK = torch.empty_like(order_S)
        slot_TK[order_S] = torch.arange(len(order_S), device=order_S.device)
        token_S = order_S // choices
        bounds = torch.searchsorted(sorted_S, torch.arange(len(experts), device=sorted_S.device), right=True)
        ends = _fetched(bounds)
        products = self.products
        taken, first = products.taken(operand, token_S), self._matrices(experts[0])  # while the ends are on their way
        rows_SH = torch.empty(len(token_S), self.hidden, dtype=products.dtype, device=token_S.device)
        for expert, (start, end) in zip(experts, pairwise([0, *ends()]), strict=True):
            if start < end:
                both, down = first if expert is experts[0] else self._matrices(expert)
                for part in products.parts(start, end):
                    both_SI2 = products.multiply(products.rows(taken, part), both)
                    products.multiply(products.gated(both_SI2), down, out=rows_SH[part])
        return rows_SH, slot_TK.view(-1, choices)

    def _matrices(self, expert: Any) -> tuple[Any, Any]:
        """An expert's, ready for its products."""
        both, down = _linears(expert)
        return self.products.matrix("both", *both), self.products.matrix("down", *down)


def _fetched(numbers: torch.Tensor) -> Callable[[], list[int]]:
    """A few numbers, once they are on the host: what is launched until they are asked for runs meanwhile."""
    copy = numbers.to("cpu", non_blocking=True)
    copied = torch.cuda.Event() if numbers.is_cuda else None  # type: ignore[no-untyped-call]
    if copied is not None:
        copied.record(torch.cuda.current_stream(numbers.device))

    def wait() -> list[int]:
        if copied is not None:
            copied.synchronize()
        found: list[int] = copy.tolist()
        return found

    return wait


def _qkv(attention: Any) -> tuple[Any, ...]:
    """Multiplied as one."""
    return attention.q_proj, attention.k_proj, attention.v_proj


def _linears(expert: Any) -> list[tuple[Any, ...]]:
    """Gate and up, which are multiplied as one, and down."""
    gate, up, down = (expert.get_submodule(leaf) for leaf in expert.leaves)
    return [(gate, up), (down,)]
