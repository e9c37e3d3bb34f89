"""The workers: a model, its routers' choices, and shards of rows filled with them.

- In a notebook: `capture_texts`, with a model from `load_model`, or named.
- About a model: `describe_model` and `estimate_bytes`, without its weights; `load_tokenizer`.
- `quantize_checkpoint` writes a checkpoint in 4 bits; `tiny_checkpoint` is a Mixtral small enough to try things with.

`workers.replica` and `workers.shard` fill a store. The public names are listed in `__init__.pyi`. Each is
loaded when it is first used: the store's side of a worker runs without torch and transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
