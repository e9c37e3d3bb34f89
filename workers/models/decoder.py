"""The forward pass of Mixtral and of decoders with its structure, up to the last router or the final norm.

T tokens in B rows of P positions, K choices per token, S = T·K slots sorted by expert, H hidden, I inner width.

transformers loads the model and owns its weights; here they are applied in another order, without mask, cache and head.
Matrices are dequantized into buffers just before their products (`workers.models.products`), and an expert's first two
matrices are one product. The steps between the products are fused (`workers.models.kernels`). The routers are called as
modules, so that hooks on them see the same as always. If the layers are on several GPUs, the hidden states are moved
from one to the next.

The layers of families differ: norms of queries and keys (Qwen3-MoE: for each head; OLMoE: over all heads), biases of
their projections, layers without a router, a shared expert with a gate (all three: Qwen2-MoE) or without one
(DeepSeek). Each of these is found by looking at the modules. Other kinds of attention are subclasses:
`workers.models.sinks` and `workers.models.latent`.

Deterministic: no atomic additions, and each product's shape depends only on the micro-batch.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from workers.models.experts import outputs_in_groups, outputs_one_by_one
from workers.models.forwards import LastHidden
from workers.models.kernels import HeadNorm, rotate
from workers.models.products import products_of
from workers.models.stored import FOUR_BITS


class DecoderForward:
    """A model's layers, ready to be applied: a `workers.models.forwards.Forward`.

    Parameters
    ----------
    model
        A loaded model for which `applies` is true.
    matmul
        bf16 or fp8.
    """

    expert_backend: ClassVar[str] = "grouped"
    """Slots are sorted by expert, and one product computes all experts."""
    matmuls: ClassVar[tuple[str, ...]] = ("bf16", "fp8")
    _outputs = staticmethod(outputs_in_groups)

    @classmethod
    def applies(cls, model: Any, quantization: str) -> bool:
        """Whether the model is quantized and computes nothing that this forward pass does not."""
        return quantization in (*FOUR_BITS, "mxfp4", "fp8") and not cls._special(model.config)

    @staticmethod
    def _special(config: Any) -> bool:
        """Whether a position does not attend to all earlier ones, or experts are not gated by SiLU."""
        windows = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
        rotary = getattr(config, "rope_parameters", None) or {}
        special = (
            windows,
            getattr(config, "clip_qkv", None) is not None,
            rotary.get("partial_rotary_factor", 1.0) != 1.0,
            config.hidden_act != "silu",
        )
        return any(special)

    def __init__(self, model: Any, matmul: str = "bf16") -> None:
        config = model.config
        self.model = model
        self.whole = False
        self.seen: Callable[[Any, torch.Tensor, torch.Tensor], None] | None = None
        self.used: Callable[[Any, torch.Tensor, torch.Tensor], None] | None = None
        self.attended: Callable[[int, torch.Tensor], None] | None = None
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.products = products_of(matmul, model.embed_tokens.weight.dtype)
        self._norms = {layer.self_attn: self._head_norm(layer.self_attn) for layer in model.layers}
        for layer in model.layers:
            for linears in (*self.attention_linears(layer), *dense_linears(layer)):
                self.products.prepare(*linears)
            if (experts := getattr(layer.mlp, "experts", None)) is not None:
                for stack in (experts.both, experts.down):
                    self.products.prepare_stack(stack)

    def __call__(self, input_ids: torch.Tensor, **ignored: Any) -> LastHidden | None:
        """Run the layers. Hooks on the routers read what they need and may end the run.

        Parameters
        ----------
        input_ids : int64 tensor, shape (B, P)
        ignored
            Arguments that tell other models to omit mask and cache.

        Returns
        -------
        LastHidden or None
            The last hidden states, if all layers are run (`whole`).
        """
        residual_TH = self.model.embed_tokens(input_ids).flatten(0, 1)
        first = self.model.layers[0].input_layernorm
        _, operand = self.products.normed(residual_TH, first.weight, first.variance_epsilon, routed=False)
        return self._run(0, residual_TH, operand, input_ids.shape[1])

    def resumed(self, index: int, residual_TH: torch.Tensor, positions: int) -> LastHidden:
        """Run the layers to the end, starting after the attention of one of them.

        Parameters
        ----------
        index
            Index of the layer, from 0.
        residual_TH
            The hidden states that `attended` received for it; they are overwritten.
        positions
            P.
        """
        last = self._run(index, residual_TH, None, positions)
        assert last is not None, "it is not run to the end"
        return last

    def _run(self, start: int, residual_TH: torch.Tensor, operand: Any, positions: int) -> LastHidden | None:
        """Run the layers from a given one on. Without an operand, the residual already includes the output of its
        attention."""
        layers, products = self.model.layers, self.products
        place = torch.arange(positions, device=residual_TH.device)[None]
        cos_PD, sin_PD = self._turns(residual_TH, place)
        last = self.model.norm if self.whole else None
        followed = zip(layers, [*(layer.input_layernorm for layer in layers[1:]), last], strict=True)
        for index, (layer, following) in islice(enumerate(followed), start, None):
            if (here := layer.input_layernorm.weight.device) != residual_TH.device:  # the layers are on several GPUs
                residual_TH, cos_PD, sin_PD = (part.to(here) for part in (residual_TH, cos_PD, sin_PD))
                operand = None if operand is None else products.moved(operand, here)
            mixed = () if operand is None else (self._attention(layer.self_attn, operand, cos_PD, sin_PD),)
            norm, router = layer.post_attention_layernorm, router_of(layer.mlp)
            normed_TH, operand = products.normed(
                residual_TH, norm.weight, norm.variance_epsilon, *mixed, routed=router is not None
            )
            del mixed  # large tensors are freed before more are allocated
            if self.attended is not None:
                self.attended(index, residual_TH)
            if following is None:
                if router is not None:
                    router(normed_TH)
                return None
            added = self._mlp(layer.mlp, normed_TH, operand)
            scale_H, eps = following.weight.to(residual_TH.device), following.variance_epsilon
            del normed_TH
            normed_TH, operand = products.normed(residual_TH, scale_H, eps, *added, routed=following is last)
            del added
        return LastHidden(residual_TH, normed_TH)

    def _mlp(self, mlp: Any, normed_TH: torch.Tensor, operand: Any) -> tuple[torch.Tensor, ...]:
        """What a layer adds to the residual: rows; or the rows of slots, with each token's slots and their weights."""
        if (router := router_of(mlp)) is None:
            return (self._dense(mlp, operand),)
        _, weight_TK, expert_TK = router(normed_TH)
        if self.used is not None:
            self.used(router, expert_TK, weight_TK)
        shared = list(_dense(mlp))
        rows_SH, slot_TK = self._outputs(self.products, mlp.experts, operand, expert_TK, spare=len(shared))
        if self.seen is not None:
            self.seen(router, rows_SH[: slot_TK.numel()], slot_TK)
        for expert in shared:  # counts as one more choice of each token
            tokens = len(normed_TH)
            self._dense(expert, operand, rows_SH[-tokens:])
            own_T1 = torch.arange(len(rows_SH) - tokens, len(rows_SH), device=slot_TK.device)[:, None]
            gate = getattr(mlp, "shared_expert_gate", None)
            share_T1 = weight_TK.new_ones(tokens, 1) if gate is None else gate(normed_TH).sigmoid()
            slot_TK = torch.cat([slot_TK, own_T1], dim=1)
            weight_TK = torch.cat([weight_TK, share_T1.to(weight_TK.dtype)], dim=1)
        return rows_SH, slot_TK, weight_TK

    def _dense(self, mlp: Any, operand: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        products = self.products
        both_TI2 = products.multiply(operand, products.matrix("gate and up", mlp.gate_proj, mlp.up_proj))
        return products.multiply(products.gated(both_TI2), products.matrix("dense down", mlp.down_proj), out)

    def _turns(self, residual_TH: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each position, (P, D). Each half of D holds all angles."""
        cos_PD, sin_PD = (table[0] for table in self.model.rotary_emb(residual_TH, place))
        return cos_PD, sin_PD

    def attention_linears(self, layer: Any) -> list[tuple[Any, ...]]:
        """The matrices of a layer's attention, in groups that are multiplied as one matrix."""
        return [*self._projections(layer.self_attn), (layer.self_attn.o_proj,)]

    def _projections(self, attention: Any) -> Iterator[tuple[Any, ...]]:
        """The projections before the heads."""
        yield _qkv(attention)

    def _attention(self, attention: Any, operand: Any, cos_PD: torch.Tensor, sin_PD: torch.Tensor) -> torch.Tensor:
        products = self.products
        qkv_TW = products.multiply(operand, products.matrix("qkv", *_qkv(attention)))
        if attention.q_proj.bias is not None:
            qkv_TW += torch.cat([linear.bias for linear in _qkv(attention)])
        rotate(qkv_TW, cos_PD, sin_PD, self.heads + self.groups, self._norms[attention])
        sizes = [self.heads, self.groups, self.groups]
        query, key, value = torch.split(qkv_TW.view(-1, len(cos_PD), sum(sizes), self.head), sizes, dim=2)
        return self._out(attention, self._attended(attention, query, key, value))

    def _attended(
        self, attention: Any, query_BPND: torch.Tensor, key_BPND: torch.Tensor, value_BPND: torch.Tensor
    ) -> torch.Tensor:
        """The result of attention, shape (B, P, heads, D of a value)."""
        query, key, value = (part.transpose(1, 2) for part in (query_BPND, key_BPND, value_BPND))
        with sdpa_kernel(self._attention_backends(query.shape[2]), set_priority=True):
            found = nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=attention.scaling, enable_gqa=query.shape[1] != key.shape[1]
            )
        return found.transpose(1, 2)

    def _out(self, attention: Any, found_BPND: torch.Tensor) -> torch.Tensor:
        products = self.products
        operand = products.operand(found_BPND.flatten(0, 1).flatten(1))
        mixed_TH = products.multiply(operand, products.matrix("o", attention.o_proj))
        return mixed_TH if attention.o_proj.bias is None else mixed_TH.add_(attention.o_proj.bias)

    @staticmethod
    def _attention_backends(positions: int) -> list[SDPBackend]:
        """The first backend that supports the input is used.

        cuDNN takes half of flash attention's time, and 0.04 to 0.6 s of planning for each new shape (an H200): it is
        used for full rows, whose shape recurs.
        """
        full = positions >= 512 and positions & (positions - 1) == 0
        return [SDPBackend.CUDNN_ATTENTION if full else SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

    def _head_norm(self, attention: Any) -> HeadNorm | None:
        """The norms of queries and keys, if there are any."""
        query, key = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        if query is None or key is None:
            return None
        whole = query.weight.numel() == self.heads * self.head
        scales = [
            norm.weight.view(-1, self.head).expand(many, -1) for norm, many in ((query, self.heads), (key, self.groups))
        ]
        return HeadNorm(torch.cat(scales).contiguous(), query.variance_epsilon, self.heads, whole)


class MixtralForward(DecoderForward):
    """For Mixtral: few large experts, whose matrices are multiplied one by one."""

    expert_backend: ClassVar[str] = "sorted"
    """Slots are sorted by expert."""
    _outputs = staticmethod(outputs_one_by_one)


def _qkv(attention: Any) -> tuple[Any, ...]:
    """Matrices that are multiplied as one."""
    return attention.q_proj, attention.k_proj, attention.v_proj


def dense_linears(layer: Any) -> Iterator[tuple[Any, ...]]:
    """The matrices that are applied to every token of a layer after attention, in groups that are multiplied as one."""
    for dense in _dense(layer.mlp):
        yield dense.gate_proj, dense.up_proj
        yield (dense.down_proj,)


def router_of(mlp: Any) -> Any:
    """The module that chooses a layer's experts, or None."""
    return getattr(mlp, "gate", getattr(mlp, "router", None))


def _dense(mlp: Any) -> Iterator[Any]:
    """The gated MLPs that are applied to every token of a layer."""
    if hasattr(mlp, "gate_proj"):
        yield mlp
    for name in ("shared_expert", "shared_experts"):
        if hasattr(mlp, name):
            yield getattr(mlp, name)
