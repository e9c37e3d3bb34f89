"""transformers' bitsandbytes quantizers with support for experts: in common tensors in 4 bits, as Linears in 8 bits.

`workers.models.stacking` puts experts into common tensors. For 8 bits the fused module of each layer is split on the
meta device into one gated MLP per expert, whose three Linears have the checkpoint's own names (w1, w3, w2 for Mixtral),
and the converters that would have fused them are dropped. The stock loader then quantizes matrix by matrix as it reads,
or one layer's experts at a time if transformers 5 saved the checkpoint fused.

Promises: a new module computes the same as the fused one. Does not deal with checkpoints, routers or devices:
`workers.models.loading` checks after every load that the matrices really are quantized.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.integrations.moe import _default_apply_gate
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from workers.models.experts import mixed_one_by_one
from workers.models.packing import BIASES, expert_leaves, fused_experts, fusing_converters
from workers.models.stacking import PacksExperts


class ExpertLeaves(NamedTuple):
    """The names of an expert's three matrices in a checkpoint."""

    gate: str
    up: str
    down: str


class Expert(nn.Module):
    """One gated MLP: ``down(act(gate(x)) * up(x))``, under the checkpoint's names, on the meta device."""

    def __init__(self, hidden: int, inner: int, leaves: ExpertLeaves, act: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.leaves = leaves
        self.act = act
        for leaf, (inputs, outputs) in zip(leaves, [(hidden, inner), (hidden, inner), (inner, hidden)], strict=True):
            self.add_module(leaf, nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Input and output have shape (tokens, hidden), in the dtype of the input."""
        gate, up, down = (self.get_submodule(leaf) for leaf in self.leaves)
        result: torch.Tensor = down(self.act(gate(hidden_states)) * up(hidden_states))
        return result


class UnfusedExperts(nn.ModuleList):
    """The experts of one layer as Linears; replaces the fused module and has its signature."""

    def __init__(self, fused: nn.Module, leaves: ExpertLeaves) -> None:
        down_proj = fused.get_parameter("down_proj")
        num_experts, hidden, inner = down_proj.shape
        act = fused.get_submodule("act_fn")
        super().__init__(Expert(hidden, inner, leaves, act, down_proj.dtype) for _ in range(num_experts))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """See `workers.models.experts.mixed_one_by_one`."""
        return mixed_one_by_one(
            lambda expert, rows: self[expert](rows), len(self), hidden_states, top_k_index, top_k_weights
        )


class SplitExperts(ConversionOps):  # type: ignore[misc]
    """Splits the experts of a layer that a checkpoint stores as one tensor, with gate above up for each expert."""

    def __init__(self, patterns: list[str]) -> None:
        self.patterns = patterns  # patterns of an expert's matrices, with * for its number

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        """Name the matrices of one tensor (experts, rows, columns)."""
        [[fused]] = input_dict.values()
        return {
            pattern.replace("*", str(number)): matrix
            for number, expert in enumerate(fused)
            for pattern, matrix in zip(self.patterns, expert.chunk(len(self.patterns)), strict=True)
        }


class QuantizeEach(ConversionOps):  # type: ignore[misc]
    """A quantizer's own operation, which may support only one matrix, for each of several matrices."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def convert(self, input_dict: dict[str, Any], full_layer_name: str, **kwargs: Any) -> dict[str, Any]:
        """Quantize each matrix under its own name."""
        if len(input_dict) == 1:
            found: dict[str, Any] = self.stock.convert(input_dict, full_layer_name=full_layer_name, **kwargs)
            return found
        each = (self.stock.convert({name: value}, full_layer_name=name, **kwargs) for name, value in input_dict.items())
        return {name: value for quantized in each for name, value in quantized.items()}


def _splitting(fusing: Any) -> Any:
    """The converter that splits what this one fuses."""
    first = [pattern.replace("*", "0") for pattern in fusing.source_patterns]
    return WeightConverter(fusing.target_patterns, first, operations=[SplitExperts(fusing.source_patterns)])


def _leaves(model: nn.Module, fused: dict[str, nn.Module]) -> ExpertLeaves:
    """Reject experts that `Expert` cannot compute: it is the plain gated MLP with separate matrices."""
    special = {
        flag
        for module in fused.values()
        for flag in ("has_bias", "is_transposed", "has_post_expert_norm")
        if getattr(module, flag, False)
    }
    gates = {getattr(type(module), "_apply_gate", _default_apply_gate) for module in fused.values()}
    special |= {"its own gate"} if gates != {_default_apply_gate} else set()
    leaves = expert_leaves(model)
    special |= {"one tensor for the experts of a layer"} if not leaves else set()
    if special:
        raise ValueError(
            f"{type(model).__name__} has {', '.join(sorted(special))}, which int8 does not support: use --quantization"
            " nf4 or none"
        )
    return ExpertLeaves(*leaves["both"], *leaves["down"])


def unfuse_experts(model: nn.Module) -> None:
    """Replace every fused experts module of a model on the meta device, in place."""
    if fused := fused_experts(model):
        leaves = _leaves(model, fused)
        for name, module in fused.items():
            model.set_submodule(name, UnfusedExperts(module, leaves))


def cast_unquantized(model: nn.Module, dtype: torch.dtype, but: Iterable[torch.Tensor] = ()) -> None:
    """Cast all tensors that no quantizer made to the compute dtype, or to float32 if transformers says so."""
    in_full = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = set(map(id, but))
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and id(parameter) not in kept:
            parameter.data = parameter.data.to(torch.float32 if any(part in name for part in in_full) else dtype)
    for name, buffer in list(model.named_buffers()):
        if name.endswith(BIASES):
            buffer.data = buffer.data.to(dtype)


class Packing4bit(PacksExperts, Bnb4BitHfQuantizer):  # type: ignore[misc]
    """NF4 and FP4."""

    def _kind(self) -> tuple[str, torch.dtype]:
        return self.quantization_config.bnb_4bit_quant_type, self.quantization_config.bnb_4bit_compute_dtype

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
        """Make matrices be dequantized and multiplied in the compute dtype only.

        On CPUs that have AVX512-BF16 bitsandbytes' Linear4bit repacks the weight in its first forward and rounds inputs
        and scales to bfloat16: choices would differ between CPUs. An already quantized checkpoint has the dtype of the
        device that quantized it, and transformers leaves everything else in the file's dtype.
        """
        _, dtype = self._kind()
        for module in quantized_linears(model).values():
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if (state := getattr(module.weight, "quant_state", None)) is not None:
                state.dtype = dtype
        if self.pre_quantized:
            cast_unquantized(model, dtype)
        return super()._process_model_after_weight_loading(model, **kwargs)


class Unfusing8bit(Bnb8BitHfQuantizer):  # type: ignore[misc]
    """LLM.int8: experts become Linears before Linears are replaced."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        unfuse_experts(model)
        super()._process_model_before_weight_loading(model, **kwargs)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> Any:
        """Split experts where they would be fused (transformers passes the model since about 5.11)."""
        fusing = {id(converter) for converter in fusing_converters(weight_conversions).values()}
        kept = [_splitting(each) if id(each) in fusing else each for each in weight_conversions]
        return super().update_weight_conversions(kept, *model)

    def get_quantize_ops(self) -> QuantizeEach:
        """The stock operation for each matrix that a tensor holds."""
        return QuantizeEach(super().get_quantize_ops())


def quantized_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The modules, by name, whose matrix is or should be in 4 bits or in e4m3."""
    kinds = ("Linear4bit", "RowScaledLinear", "BlockScaledLinear")
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
