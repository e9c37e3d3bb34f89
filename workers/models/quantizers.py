"""What transformers quantizes with while we load or describe a model: `workers.models.quantizer` and `fp8_loading`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.quantizers import auto

from workers.models.fp8_loading import METHOD, RowScaledConfig, RowScaledQuantizer
from workers.models.quantizer import Packing4bit, Unfusing8bit

OURS: dict[str, Any] = {
    "bitsandbytes_4bit": Packing4bit,
    "bitsandbytes_8bit": Unfusing8bit,
    METHOD: RowScaledQuantizer,
}


@contextmanager
def own_quantizers() -> Iterator[None]:
    """Inside, transformers loads quantized models through ours; outside, as ever."""
    tables = (auto.AUTO_QUANTIZER_MAPPING, OURS), (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, {METHOD: RowScaledConfig})
    stock = [dict(table) for table, _ in tables]
    for table, ours in tables:
        table.update(ours)
    try:
        yield
    finally:
        for (table, _), before in zip(tables, stock, strict=True):
            table.clear()
            table.update(before)


def quantize_skeleton(model: nn.Module, settings: Any) -> None:
    """Give a model on the meta device the modules it will have once loaded with these settings."""
    if settings.quant_method == METHOD:
        name = METHOD
    else:
        name = "bitsandbytes_8bit" if settings.load_in_8bit else "bitsandbytes_4bit"
    with own_quantizers():
        quantizer = OURS[name](settings, pre_quantized=name == METHOD)
        quantizer.preprocess_model(model, device_map={"": "cpu"})
