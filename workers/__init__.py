"""The workers: a model, its routers' choices, and shards of rows filled with them.

- In a notebook: `capture_texts`, with a model from `load_model` or the name of a model.
- About a model: `describe_model` and `estimate_bytes`, which do not need its weights, and `load_tokenizer`.
- `quantize_checkpoint` writes a checkpoint in 4 bits; `tiny_checkpoint` is a Mixtral that is small enough for trying
  things out.

`workers.replica` and `workers.shard` fill a store. The public names are listed in `__init__.pyi`. Each of them is
loaded when it is first used, so that the part of a worker that deals with the store runs without torch and
transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
