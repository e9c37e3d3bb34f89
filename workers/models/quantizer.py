"""Quantizing the experts that transformers' bitsandbytes loader leaves out.

transformers 5 keeps the experts of a layer as two fused three-dimensional parameters; bitsandbytes
quantizes Linears and passes those by without a word (bitsandbytes issue 1849), so that Mixtral 8x7B loads
into 91 GB where 24.5 are expected. The quantizers here take the fused module of each layer apart on the meta
device, into one gated MLP an expert whose three Linears bear the checkpoint's own names (w1, w3, w2 for
Mixtral), and drop the converters that would have fused them. From there on the stock loader quantizes matrix
by matrix as it reads, one matrix above the final size at its peak; of a checkpoint that transformers 5 has saved
fused, one layer's experts.

Promises: a module that comes out computes what the fused one computes. Does not know checkpoints, routers or
devices: `workers.models.loading` checks after every load that the matrices really are quantized.
"""

import logging
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, MergeModulelist, WeightConverter, WeightRenaming
from transformers.integrations.moe import _default_apply_gate
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from workers.models.stored import BLOCK

# It would warn, on import, that a CPU kernel which we switch off (see Unfusing4bit) cannot be fetched.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# LLM.int8 says for every matrix that its inputs pass through float16; that is what int8 means here.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
# On import it has its optimizers and its fallbacks compiled, none of which run here; that would load torch's
# compiler, ten seconds of every process.
with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda plain: plain)):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit


class ExpertLeaves(NamedTuple):
    """What a checkpoint calls the three matrices of one expert."""

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

    def stacked(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
        """Its Linears, those that are multiplied as one together: gate and up, and down."""
        gate, up, down = (self.get_submodule(leaf) for leaf in self.leaves)
        return (gate, up), (down,)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Shape (tokens, hidden) in and out, in the dtype of the input."""
        (gate, up), (down,) = self.stacked()
        result: torch.Tensor = down(self.act(gate(hidden_states)) * up(hidden_states))
        return result


def gated_by(act: nn.Module, both_SI2: torch.Tensor) -> torch.Tensor:
    """``act(gate) * up``, gate first; shape (S, I)."""
    gate, up = both_SI2.chunk(2, dim=-1)
    gated: torch.Tensor = act(gate) * up
    return gated


class UnfusedExperts(nn.ModuleList):
    """The experts of one layer as Linears; takes the place and the signature of the fused module.

    Shape letters: T tokens, K choices a token, S = T·K slots sorted by expert, H hidden.
    """

    def __init__(self, fused: nn.Module, leaves: ExpertLeaves) -> None:
        down_proj = fused.get_parameter("down_proj")
        num_experts, hidden, inner = down_proj.shape
        act = fused.get_submodule("act_fn")
        super().__init__(Expert(hidden, inner, leaves, act, down_proj.dtype) for _ in range(num_experts))
        silu = type(act).__name__ in ("SiLU", "SiLUActivation")  # torch's, or transformers' own
        self.gate = None if silu else partial(gated_by, act)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Mix the chosen experts' outputs, in float32; an expert without a token is not run.

        One synchronization a call. Deterministic: within one ``index_add_`` no token comes twice, and the
        calls follow each other in the order of experts.
        """
        slot_expert_S, slot_S = top_k_index.flatten().sort(stable=True)
        token_S = slot_S // top_k_index.shape[-1]
        weight_S = top_k_weights.flatten()[slot_S]
        experts = torch.arange(len(self), device=slot_S.device)
        ends = torch.searchsorted(slot_expert_S, experts, right=True).tolist()
        mixed_TH = torch.zeros_like(hidden_states, dtype=torch.float32)
        for expert, (start, end) in zip(self, pairwise([0, *ends]), strict=True):
            if start < end:
                token = token_S[start:end]
                output = expert(hidden_states[token])
                mixed_TH.index_add_(0, token, output.float() * weight_S[start:end, None].float())
        return mixed_TH.to(hidden_states.dtype)


def _fusing_converters(transforms: list[Any]) -> dict[str, Any]:
    """The converters that stack single experts into one parameter, by the last part of its name."""
    return {
        transform.target_patterns[0].rpartition(".")[2]: transform
        for transform in transforms
        if isinstance(transform, WeightConverter)
        and any(isinstance(operation, MergeModulelist) for operation in transform.operations)
        and transform.target_patterns[0].rpartition(".")[2] in ("gate_up_proj", "down_proj")
    }


def _expert_leaves(model: nn.Module) -> ExpertLeaves:
    """Read from transformers' conversion mapping what the checkpoint calls the matrices."""
    converters = _fusing_converters(get_model_conversion_mapping(model, add_legacy=False))
    leaves = [
        pattern.removesuffix(".weight").rpartition(".")[2]
        for target in ("gate_up_proj", "down_proj")
        if target in converters
        for pattern in converters[target].source_patterns
    ]
    if len(leaves) != 3:
        raise ValueError(
            f"the checkpoints of {type(model).__name__} do not keep the experts as separate gate, up and "
            f"down matrices (found {leaves}), so bitsandbytes cannot quantize them; use --quantization none"
        )
    return ExpertLeaves(*leaves)


class SplitExperts(ConversionOps):  # type: ignore[misc]
    """Takes the experts of a layer apart that a checkpoint keeps as one tensor: of each expert, gate above up."""

    def __init__(self, patterns: list[str]) -> None:
        self.patterns = patterns  # of an expert's matrices, with * for its number

    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        """Name the matrices of one tensor (experts, rows, columns)."""
        [[fused]] = input_dict.values()
        return {
            pattern.replace("*", str(number)): matrix
            for number, expert in enumerate(fused)
            for pattern, matrix in zip(self.patterns, expert.chunk(len(self.patterns)), strict=True)
        }


class QuantizeEach(ConversionOps):  # type: ignore[misc]
    """A quantizer's own operation for each of several matrices; it may know of one only."""

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
    """The converter that takes apart what this one fuses."""
    first = [pattern.replace("*", "0") for pattern in fusing.source_patterns]
    return WeightConverter(fusing.target_patterns, first, operations=[SplitExperts(fusing.source_patterns)])


def _refuse_special(name: str, fused: nn.Module) -> None:
    """`Expert` is the plain gated MLP; a family whose experts do more must not be computed as one."""
    special = [flag for flag in ("has_bias", "is_transposed", "has_post_expert_norm") if getattr(fused, flag, False)]
    if not getattr(fused, "is_concatenated", True):
        special.append("interleaved gate and up")
    if getattr(type(fused), "_apply_gate", _default_apply_gate) is not _default_apply_gate:
        special.append("a gate of its own")
    if special:
        raise ValueError(
            f"{name} ({type(fused).__name__}) has {', '.join(special)}, which the 4- and 8-bit loader does "
            "not know; use --quantization none"
        )


def unfuse_experts(model: nn.Module) -> None:
    """Replace every fused experts module of a model on the meta device, in place."""
    fused = {
        name: module
        for name, module in model.named_modules()
        if {"gate_up_proj", "down_proj"} <= {leaf for leaf, _ in module.named_parameters(recurse=False)}
        and module.get_parameter("gate_up_proj").ndim == 3
    }
    if not fused:
        return
    leaves = _expert_leaves(model)
    for name, module in fused.items():
        _refuse_special(name, module)
        model.set_submodule(name, UnfusedExperts(module, leaves))


class Unfusing:
    """What quantizers add to their stock counterpart: experts as Linears, before those are replaced."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        unfuse_experts(model)
        super()._process_model_before_weight_loading(model, **kwargs)  # type: ignore[misc]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> Any:
        """Have experts taken apart where they would be fused (transformers passes the model from 5.11 or so on)."""
        fusing = {id(converter) for converter in _fusing_converters(weight_conversions).values()}
        kept = [_splitting(each) if id(each) in fusing else each for each in weight_conversions]
        return super().update_weight_conversions(kept, *model)  # type: ignore[misc]

    def get_quantize_ops(self) -> QuantizeEach:
        """The stock operation, for as many matrices as one tensor holds."""
        return QuantizeEach(super().get_quantize_ops())  # type: ignore[misc]


def cast_unquantized(model: nn.Module, dtype: torch.dtype, but: Iterable[torch.Tensor] = ()) -> None:
    """Have all that no quantizer made in the compute dtype, or in float32 where transformers says so."""
    in_full = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = set(map(id, but))
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and id(parameter) not in kept:
            parameter.data = parameter.data.to(torch.float32 if any(part in name for part in in_full) else dtype)


class Unfusing4bit(Unfusing, Bnb4BitHfQuantizer):  # type: ignore[misc]
    """NF4 and FP4."""

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
        """Have the compute dtype decide, and nothing else, in what matrices are dequantized and multiplied.

        On CPUs that have AVX512-BF16 bitsandbytes' Linear4bit repacks the weight in its first forward and rounds
        inputs and scales to bfloat16: choices would differ from one CPU to the next. A checkpoint that is quantized
        already brings the dtype of the device that quantized it, and transformers leaves all else in the file's.
        """
        dtype = self.quantization_config.bnb_4bit_compute_dtype
        for module in quantized_linears(model).values():
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if (state := getattr(module.weight, "quant_state", None)) is not None:
                state.dtype = dtype
        if self.pre_quantized:
            cast_unquantized(model, dtype)
        return super()._process_model_after_weight_loading(model, **kwargs)


class Unfusing8bit(Unfusing, Bnb8BitHfQuantizer):  # type: ignore[misc]
    """LLM.int8."""


def quantized_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The modules, by name, whose matrix is in 4 bits or in e4m3, or should be."""
    kinds = ("Linear4bit", "RowScaledLinear")
    return {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}


def packed_in_four_bits(matrix: torch.Tensor, quantization: str) -> tuple[torch.Tensor, Any]:
    """What nf4 and fp4 mean here: packed values, and bitsandbytes' QuantState that tells how they are scaled."""
    packed, state = quantize_4bit(matrix, blocksize=BLOCK, compress_statistics=True, quant_type=quantization)
    return packed, state


def round_gates(routers: Iterable[nn.Module], quantization: str) -> None:
    """Give each matrix of the routers the values that it would have as a Linear4bit."""
    for router in routers:
        for parameter in router.parameters():
            if parameter.ndim == 2:
                parameter.data = dequantize_4bit(*packed_in_four_bits(parameter.data, quantization))


def own_names(skeleton: Any, names: Iterable[str]) -> dict[str, str]:
    """What the base model calls each tensor of a checkpoint, had it one; by the checkpoint's name."""
    renamings = [
        transform
        for transform in get_model_conversion_mapping(skeleton, add_legacy=False)
        if isinstance(transform, WeightRenaming)
    ]
    found = {}
    for name in names:
        own = name
        for renaming in renamings:
            own, _ = renaming.rename_source_key(own)
        found[name] = own.removeprefix(f"{skeleton.base_model_prefix}.")
    return found


def quantized_names(skeleton: Any, names: Iterable[str]) -> dict[str, str]:
    """Which tensors of a checkpoint are matrices of the model that are quantized.

    Parameters
    ----------
    skeleton
        Of the base model, after `workers.models.quantizers.quantize_skeleton`.
    names
        As the checkpoint calls them.

    Returns
    -------
    dict
        The checkpoint's name of each matrix's weight → the model's.

    Raises
    ------
    ValueError
        When a quantized matrix of the model has no tensor.
    """
    wanted = {f"{name}.weight" for name in quantized_linears(skeleton)}
    found = {name: own for name, own in own_names(skeleton, names).items() if own in wanted}
    if missing := sorted(wanted - set(found.values())):
        if fused := [name for name in names if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
            raise ValueError(
                f"the checkpoint keeps the experts of a layer as one tensor ({fused[0]}), as transformers 5 can save"
                " them, and 4-bit files hold one for each expert: capture it as it is, it is quantized while it loads,"
                " or give the original checkpoint"
            )
        raise ValueError(
            f"{len(missing)} of the {len(wanted)} matrices that should be quantized are not in the checkpoint:"
            f" {', '.join(missing[:5])}"
        )
    return found
