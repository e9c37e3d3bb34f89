"""Questions asked of a store: each a function from a lazy capture to a small labelled Dataset.

The public names are imported from here: `from analysis import expert_load, scan`. They are listed in `__init__.pyi`,
and a name's module is loaded when the name is first used.

- `scan` decodes every shard once and feeds any number of reducers; `measure` keeps what they counted beside the store.
- A metric is a function of a capture (`transitions`), and where several questions share counts a function of what a
  reducer counted (`transitions_of`). Every result says what it is: `n`, `estimator`, `null`, `definition`, `source`.
- `write_report` puts them on one page; `write_tables` and `write_replay` hand them to other tools.

Promises: memory bounded by threads × one shard plus the accumulators, results equal for any chunking and any
number of threads, and no import of torch or transformers. Does not know how a capture is made.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
