"""The workers: a model, its routers' choices, and shards of rows filled with them.

- In a notebook: `capture_texts`, with a model from `load_model`, or named.
- About a model: `describe_model` and `estimate_bytes`, without its weights; `load_tokenizer`.
- `quantize_checkpoint` writes a checkpoint in 4 bits; `tiny_checkpoint` is a Mixtral small enough to try things with.

`workers.replica` and `workers.shard` fill a store. Importing this package imports neither torch nor transformers, and
each name is loaded when it is first used: the store's side of a worker runs without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.models.description import ModelDescription, describe_model
    from workers.models.footprint import estimate_bytes
    from workers.models.loading import LoadedModel, load_model
    from workers.models.saving import quantize_checkpoint
    from workers.notebook import capture_texts
    from workers.text.tokenizer import TextTokenizer, load_tokenizer
    from workers.tiny import tiny_checkpoint

_HOMES = {
    "LoadedModel": "workers.models.loading",
    "ModelDescription": "workers.models.description",
    "TextTokenizer": "workers.text.tokenizer",
    "capture_texts": "workers.notebook",
    "describe_model": "workers.models.description",
    "estimate_bytes": "workers.models.footprint",
    "load_model": "workers.models.loading",
    "load_tokenizer": "workers.text.tokenizer",
    "quantize_checkpoint": "workers.models.saving",
    "tiny_checkpoint": "workers.tiny",
}

__all__ = [
    "LoadedModel",
    "ModelDescription",
    "TextTokenizer",
    "capture_texts",
    "describe_model",
    "estimate_bytes",
    "load_model",
    "load_tokenizer",
    "quantize_checkpoint",
    "tiny_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'workers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
