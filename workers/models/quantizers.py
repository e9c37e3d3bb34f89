"""The quantizers for loading or describing a model with transformers: `workers.models.quantizer` and `fp8_loading`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers.quantizers import auto

from workers.models.fp8_loading import METHOD, StoredConfig, StoredQuantizer
from workers.models.quantizer import Packing4bit, Unfusing8bit
from workers.models.stored import Stored

OURS: dict[str, Any] = {
    "bitsandbytes_4bit": Packing4bit,
    "bitsandbytes_8bit": Unfusing8bit,
    METHOD: StoredQuantizer,
}


@contextmanager
def own_quantizers(stored: Stored | None = None) -> Iterator[None]:
    """Within the block, transformers loads quantized models with this project's quantizers.

    Parameters
    ----------
    stored
        The form in which the checkpoint holds its matrices.
    """
    ours = {name: partial(quantizer, stored=stored) for name, quantizer in OURS.items()}
    tables = (auto.AUTO_QUANTIZER_MAPPING, ours), (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, {METHOD: StoredConfig})
    stock = [dict(table) for table, _ in tables]
    for table, added in tables:
        table.update(added)
    try:
        yield
    finally:
        for (table, _), before in zip(tables, stock, strict=True):
            table.clear()
            table.update(before)


def quantize_skeleton(model: nn.Module, settings: Any) -> None:
    """Give a model on the meta device the modules that it has after loading with these settings."""
    quantizer: Any
    if settings.quant_method == METHOD:
        quantizer = StoredQuantizer(settings, pre_quantized=True)
    else:
        quantizer = (Unfusing8bit if settings.load_in_8bit else Packing4bit)(settings, pre_quantized=False)
    with own_quantizers():
        quantizer.preprocess_model(model, device_map={"": "cpu"})
