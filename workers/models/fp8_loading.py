"""Linears whose matrix is stored in e4m3, and the quantizer with which transformers loads models into them and into
MXFP4 experts.

A matrix is quantized while the checkpoint is read, so that the peak is one matrix above the final size. A checkpoint
that holds e4m3 with a scale for each matrix, row or block is read unchanged: compressed-tensors, FBGEMM, AutoFP8 and
ModelOpt call the scale ``weight_scale``, DeepSeek and transformers call it ``weight_scale_inv``, and all mean ``weight
* scale``. Some of them also have scales of activations. These are not used: here each token has its own scale.

Promises: the matrices of an already quantized checkpoint are multiplied with exactly the stored values and scales.
"""

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from workers.models.fp8 import E4M3, RowScaled, restored, rounded
from workers.models.published import BlockScaled, restore_blocks
from workers.models.quantizer import cast_unquantized
from workers.models.stacking import PacksExperts, one_a_row
from workers.models.stored import E4M3_FORMS, SCALE_BLOCK

METHOD = "expert_atlas"


class E4m3Linear(nn.Linear):
    """A Linear in e4m3."""

    def restore(self, into_RC: torch.Tensor) -> None:
        """The matrix, dequantized to the dtype of a tensor."""
        raise NotImplementedError

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product, in the input's dtype."""
        matrix = torch.empty(self.weight.shape, dtype=input.dtype, device=input.device)
        self.restore(matrix)
        return nn.functional.linear(input, matrix, self.bias)

    def _own(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        self.register_parameter(name, parameter)


class BlockScaledLinear(E4m3Linear):
    """A Linear with one scale for each 128 × 128 values, on the meta device until it is loaded."""

    weight_scale_inv: nn.Parameter

    def __init__(self, plain: nn.Linear) -> None:
        bias = plain.bias is not None
        dtype = plain.weight.dtype
        super().__init__(plain.in_features, plain.out_features, bias=bias, device="meta", dtype=dtype)
        self._own("weight", (self.out_features, self.in_features), E4M3)
        blocks = -(-self.out_features // SCALE_BLOCK), -(-self.in_features // SCALE_BLOCK)
        self._own("weight_scale_inv", blocks, torch.float32)

    def restore(self, into_RC: torch.Tensor) -> None:
        """See `E4m3Linear`."""
        restore_blocks(BlockScaled(self.weight.data[None], self.weight_scale_inv.data[None]), into_RC[None])


class RowScaledLinear(E4m3Linear):
    """A Linear with one scale per row, on the meta device until it is loaded.

    Parameters
    ----------
    stored_in
        The dtype of its matrix before it is loaded.
    """

    weight_scale: nn.Parameter

    def __init__(self, plain: nn.Linear, stored_in: torch.dtype) -> None:
        bias = plain.bias is not None
        dtype = plain.weight.dtype
        super().__init__(plain.in_features, plain.out_features, bias=bias, device="meta", dtype=dtype)
        self._own("weight", (self.out_features, self.in_features), stored_in)
        self._own("weight_scale", (self.out_features,), torch.float32)

    @property
    def row_scaled(self) -> RowScaled:
        """The loaded matrix."""
        return RowScaled(self.weight.data, self.weight_scale.data[:, None])

    def restore(self, into_RC: torch.Tensor) -> None:
        """See `E4m3Linear`."""
        restored(self.row_scaled, into_RC)

    def settle(self) -> None:
        """Give each row a float32 scale if the checkpoint has one scale for the whole matrix.

        Raises
        ------
        ValueError
            When the checkpoint has other scales.
        """
        self.weight_scale = nn.Parameter(one_a_row(self.weight_scale.data, self.out_features), requires_grad=False)


class StoredConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The form in which matrices are held, the names of modules that stay unchanged, and the compute dtype."""

    def __init__(
        self, form: str = "fp8", skip_modules: list[str] | None = None, dtype: str = "bfloat16", **_: Any
    ) -> None:
        self.quant_method = METHOD
        self.form = form
        self.skip_modules = skip_modules or []
        self.dtype = dtype


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Quantizes a matrix to e4m3 when it is read."""

    def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, torch.Tensor]:
        """Returns two parameters for each matrix."""
        found: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            values, scale = rounded(value[0] if isinstance(value, list) else value)
            found |= {name: values, f"{name}_scale": scale[:, 0]}
        return found


class StoredQuantizer(PacksExperts, HfQuantizer):  # type: ignore[misc]
    """Loads a model whose Linears are in e4m3 or unchanged, and whose experts are in stacks in e4m3 or MXFP4."""

    requires_calibration = False

    def _kind(self) -> tuple[str, torch.dtype]:
        return self.quantization_config.form, getattr(torch, self.quantization_config.dtype)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, **kwargs)
        form, _ = self._kind()
        for name, module in list(model.named_modules()):
            if form in E4M3_FORMS and type(module) is nn.Linear and name not in self.quantization_config.skip_modules:
                # transformers 5.17 casts tensors to this dtype before they are quantized
                stored_in = E4M3 if self.pre_quantized else module.weight.dtype
                scaled = BlockScaledLinear(module) if form == "fp8_blocks" else RowScaledLinear(module, stored_in)
                model.set_submodule(name, scaled)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> Any:
        linears = {name: module for name, module in model.named_modules() if isinstance(module, E4m3Linear)}
        for name, module in linears.items():
            try:
                if isinstance(module, RowScaledLinear):
                    module.settle()
            except ValueError as error:
                raise ValueError(f"{name}.weight {error}") from None
        if self.pre_quantized:
            stored: list[torch.Tensor] = []
            for module in linears.values():
                stored += [parameter for leaf, parameter in module.named_parameters() if leaf != "bias"]
            cast_unquantized(model, self._kind()[1], stored)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Also decides whether a shape that differs from the module's is an error."""
        owner, _, leaf = param_name.rpartition(".")
        scaled = isinstance(model.get_submodule(owner), E4m3Linear)
        own = scaled and (leaf == "weight" or (self.pre_quantized and leaf != "bias"))
        return own or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> _Quantize:
        """The operation for one matrix."""
        return _Quantize()

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """The model is never saved."""
        return False

    @property
    def is_trainable(self) -> bool:
        """The model is used only for capturing."""
        return False
