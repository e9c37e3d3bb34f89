"""The workers: a model, its routers' choices, and shards of rows filled with them.

`capture_texts` is the short way, for a notebook; `workers.shard` fills a store. Importing this package imports
neither torch nor transformers: the store's side of a worker runs without them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workers.notebook import capture_texts

__all__ = ["capture_texts"]


def __getattr__(name: str) -> Any:
    if name == "capture_texts":
        from workers.notebook import capture_texts

        return capture_texts
    raise AttributeError(f"module 'workers' has no attribute {name!r}")
