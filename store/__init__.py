"""The store: one Zarr group for each data set, filled shard by shard, opened with xarray.

Promises: a shard is complete or absent, a commit record is written only after the data that it names are durable, and a
reader knows what is missing. It imports nothing from the other packages.

- To read: `open_capture`, `open_tree`, `dataset_names`, `attributes`.
- To learn what is there, whether it is undamaged, and which model it came from: `coverage`, `verify`,
  `model_differences`.
- To write existing routes: `write_capture`. To plan and capture: `CaptureGroup` with its `Layout`, `Plan` and `Rows`.

xarray and dask, which take two seconds to import, are imported only by readers: drivers and workers write.
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
