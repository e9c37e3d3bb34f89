"""The forward pass of DeepSeek-V2 and V3: keys and values of all heads come from one latent vector of each token.

T tokens in B rows of P positions, N heads, L width of the first product. A head's query and key have a part without
position and a rotated part, which a token's keys share (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1). Queries may
come from their own latent vector. Both latents, or the queries and one latent, are one product.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch.nn.attention import SDPBackend

from workers.models.decoder import DecoderForward
from workers.models.kernels import Place, rotate


class LatentForward(DecoderForward):
    """The layers of DeepSeek-V2 or V3, ready to be applied; see `DecoderForward`."""

    expert_backend: ClassVar[str] = "grouped_latent"
    """Like grouped, with attention computed here instead of by transformers."""

    @staticmethod
    def _special(config: Any) -> bool:
        return DecoderForward._special(config) or getattr(config, "mlp_bias", False)

    def __init__(self, model: Any, matmul: str = "bf16") -> None:
        super().__init__(model, matmul)
        self.pairs = getattr(model.config, "rope_interleave", True)  # V2 always does

    def _projections(self, attention: Any) -> Iterator[tuple[Any, ...]]:
        yield _first(attention)
        if _has_latent_queries(attention):
            yield (attention.q_b_proj,)
        yield (attention.kv_b_proj,)

    def _turns(self, residual_TH: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.model.rotary_emb(residual_TH, place)
        if torch.is_tensor(found):  # V2 has complex numbers, one for both halves
            return torch.cat([found.real, found.real], dim=-1)[0], torch.cat([found.imag, found.imag], dim=-1)[0]
        return found[0][0], found[1][0]

    def _attention(self, attention: Any, operand: Any, cos_PD: torch.Tensor, sin_PD: torch.Tensor) -> torch.Tensor:
        linears, (positions, turned) = _first(attention), cos_PD.shape
        both_TL = self.products.multiply(operand, self.products.matrix("latents", *linears))
        query_TW, latent_TW = torch.split(both_TL, [linear.out_features for linear in linears], dim=1)
        for linear, part in zip(linears, (query_TW, latent_TW), strict=True):
            if linear.bias is not None:
                part += linear.bias
        shared = Place(both_TL.shape[1] - turned, turned, pairs=self.pairs)
        rotate(both_TL, cos_PD, sin_PD, 1, place=shared)
        rows_TW = both_TL
        if _has_latent_queries(attention):
            rows_TW = query_TW = self._from_latent(query_TW, attention.q_a_layernorm, "queries", attention.q_b_proj)
        own = Place(0, attention.qk_nope_head_dim + turned, pairs=self.pairs)
        rotate(rows_TW, cos_PD, sin_PD, self.heads, place=own)
        query_BPND = query_TW.view(-1, positions, self.heads, own.head)
        key_BPND, value_BPND = self._keys_and_values(attention, latent_TW, positions)
        return self._out(attention, self._attended(attention, query_BPND, key_BPND, value_BPND))

    def _keys_and_values(
        self, attention: Any, latent_TW: torch.Tensor, positions: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of each head, from the latent vector and the shared part of the keys, which are adjacent."""
        plain, turned, wide = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
        narrow_TL, shared_TD = torch.split(latent_TW, [attention.kv_lora_rank, turned], dim=1)
        both_TW = self._from_latent(narrow_TL, attention.kv_a_layernorm, "keys and values", attention.kv_b_proj)
        both_BPND = both_TW.view(-1, positions, self.heads, plain + wide)
        key_BPND = both_BPND.new_empty(*both_BPND.shape[:3], plain + turned)
        key_BPND[..., :plain] = both_BPND[..., :plain]
        key_BPND[..., plain:] = shared_TD.view(-1, positions, 1, turned)
        return key_BPND, both_BPND[..., plain:]

    def _from_latent(self, latent_TL: torch.Tensor, norm: Any, place: str, linear: Any) -> torch.Tensor:
        products = self.products
        _, operand = products.normed(latent_TL.contiguous(), norm.weight, norm.variance_epsilon, routed=False)
        return products.multiply(operand, products.matrix(place, linear))

    @staticmethod
    def _attention_backends(positions: int) -> list[SDPBackend]:
        """Flash attention needs values as wide as keys."""
        first, *last = DecoderForward._attention_backends(positions)
        return [first, SDPBackend.EFFICIENT_ATTENTION, *last]


def _has_latent_queries(attention: Any) -> bool:
    return getattr(attention, "q_proj", None) is None


def _first(attention: Any) -> tuple[Any, Any]:
    """The matrices by which a layer's input is multiplied, for queries and for keys and values."""
    query = attention.q_a_proj if _has_latent_queries(attention) else attention.q_proj
    return query, attention.kv_a_proj_with_mqa
