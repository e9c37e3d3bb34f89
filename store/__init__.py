"""The store: one Zarr group a data set, filled shard by shard, opened with xarray.

What it promises: a shard is whole or absent, a commit record is written only after the data that it names are
durable, and a reader knows what is missing. It imports nothing of the other packages.

- To read: `open_capture`, `open_tree`, `dataset_names`, `attributes`.
- To know what is there, whether it holds, and of which model it is: `coverage`, `verify`, `model_differences`.
- To write routes that are at hand: `write_capture`. To plan and capture: `CaptureGroup` with its `Layout`, `Plan` and
  `Rows`.

xarray and dask, which take two seconds, are imported only by whoever reads: drivers and workers write.
"""

from typing import TYPE_CHECKING, Any

from store.attributes import attributes
from store.coverage import Coverage, coverage
from store.group import CaptureGroup
from store.identity import model_differences
from store.layout import Layout
from store.names import dataset_names
from store.plan import Plan, Rows
from store.verification import Findings, verify
from store.writing import write_capture

if TYPE_CHECKING:
    from store.reader import open_capture, open_tree

__all__ = [
    "CaptureGroup",
    "Coverage",
    "Findings",
    "Layout",
    "Plan",
    "Rows",
    "attributes",
    "coverage",
    "dataset_names",
    "model_differences",
    "open_capture",
    "open_tree",
    "verify",
    "write_capture",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from store import reader

        return getattr(reader, name)
    raise AttributeError(f"module 'store' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
