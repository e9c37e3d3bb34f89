"""Linears whose matrix is stored in e4m3 with one scale a row, and transformers loading models into them.

A matrix is quantized while the checkpoint is read, one above the final size at the peak; or it is read as it is from a
checkpoint that holds e4m3 with a scale for each matrix or each of its rows, whatever wrote it: compressed-tensors,
FBGEMM, AutoFP8 and ModelOpt all call the scale ``weight_scale`` and mean ``weight * weight_scale``. Scales of
activations, which some of them have too, are not used: here each token has its own.

Promises: the matrices of a checkpoint that is quantized already are multiplied as it holds them, scale for scale.
"""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from workers.models.fp8 import E4M3, RowScaled, restored, rounded
from workers.models.quantizer import cast_unquantized
from workers.models.stacking import PacksExperts, one_a_row

METHOD = "row_scaled_fp8"


class RowScaledLinear(nn.Linear):
    """A Linear in e4m3, on the meta device until it is loaded.

    Parameters
    ----------
    stored_in
        The dtype of its matrix until it is loaded.
    """

    weight_scale: nn.Parameter

    def __init__(self, plain: nn.Linear, stored_in: torch.dtype) -> None:
        bias = plain.bias is not None
        dtype = plain.weight.dtype
        super().__init__(plain.in_features, plain.out_features, bias=bias, device="meta", dtype=dtype)
        shape = (self.out_features, self.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=stored_in, device="meta"), requires_grad=False)
        scale = torch.empty(self.out_features, dtype=torch.float32, device="meta")
        self.weight_scale = nn.Parameter(scale, requires_grad=False)

    @property
    def row_scaled(self) -> RowScaled:
        """The matrix, once it is loaded."""
        return RowScaled(self.weight.data, self.weight_scale.data[:, None])

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """In the input's dtype."""
        matrix = torch.empty(self.weight.shape, dtype=input.dtype, device=input.device)
        restored(self.row_scaled, matrix)
        return nn.functional.linear(input, matrix, self.bias)

    def settle(self) -> None:
        """Give each row its scale, in float32, where the checkpoint has one for the whole matrix.

        Raises
        ------
        ValueError
            When it has other scales.
        """
        self.weight_scale = nn.Parameter(one_a_row(self.weight_scale.data, self.out_features), requires_grad=False)


class RowScaledConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which modules stay as they are, by name, and in which dtype."""

    def __init__(self, skip_modules: list[str] | None = None, dtype: str = "bfloat16", **_: Any) -> None:
        self.quant_method = METHOD
        self.skip_modules = skip_modules or []
        self.dtype = dtype


class _Quantize(ConversionOps):  # type: ignore[misc]
    """A matrix that was read, in e4m3."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """Two parameters for each one."""
        found: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            values, scale = rounded(value[0] if isinstance(value, list) else value)
            found |= {name: values, f"{name}_scale": scale[:, 0]}
        return found


class RowScaledQuantizer(PacksExperts, HfQuantizer):  # type: ignore[misc]
    """Loads a model whose Linears are `RowScaledLinear`, and whose experts lie in stacks in e4m3."""

    requires_calibration = False

    def _kind(self) -> tuple[str, torch.dtype]:
        return "fp8", getattr(torch, self.quantization_config.dtype)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name not in self.quantization_config.skip_modules:
                # transformers 5.17 casts what it reads to this dtype before it has it quantized
                stored_in = E4M3 if self.pre_quantized else module.weight.dtype
                model.set_submodule(name, RowScaledLinear(module, stored_in))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
        linears = row_scaled_linears(model)
        for name, module in linears.items():
            try:
                module.settle()
            except ValueError as error:
                raise ValueError(f"{name}.weight {error}") from None
        if self.pre_quantized:
            stored: list[torch.Tensor] = []
            for module in linears.values():
                stored += [module.weight, module.weight_scale]
            cast_unquantized(model, getattr(torch, self.quantization_config.dtype), stored)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Also what decides whether another shape than the module's is an error."""
        owner, _, leaf = param_name.rpartition(".")
        scaled = isinstance(model.get_submodule(owner), RowScaledLinear)
        own = scaled and leaf in (("weight", "weight_scale") if self.pre_quantized else ("weight",))
        return own or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> _Quantize:
        """For one matrix."""
        return _Quantize()

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Nothing here saves it."""
        return False

    @property
    def is_trainable(self) -> bool:
        """It is for capturing only."""
        return False


def row_scaled_linears(model: nn.Module) -> dict[str, RowScaledLinear]:
    """The modules, by name, whose matrix is in e4m3."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RowScaledLinear)}
