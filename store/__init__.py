"""The store: one Zarr group a data set, filled shard by shard, opened with xarray.

What it promises: a shard is whole or absent, a commit record is written only after the data that it names are
durable, and a reader is told what is missing. It imports nothing of the other packages.
"""

from store.coverage import Coverage, coverage
from store.group import CaptureGroup
from store.layout import Layout
from store.reader import dataset_names, open_capture, open_tree

__all__ = ["CaptureGroup", "Coverage", "Layout", "coverage", "dataset_names", "open_capture", "open_tree"]
