"""Analyses of a store: each a function from a lazy capture to a small labelled Dataset.

The public names are imported from here: `from analysis import expert_load, scan`. They are listed in `__init__.pyi`,
and a module is loaded when one of its names is first used.

- `scan` decodes every shard once and feeds any number of reducers; `measure` also keeps their counts next to the store.
- A metric is a function of a capture (`transitions`) or, if several questions share counts, of a reducer's counts
  (`transitions_of`). Every result describes itself: `n`, `estimator`, `null`, `definition`, `source`.
- `write_report` puts them on one page; `write_tables` and `write_replay` export them for other tools.

Promises: memory bounded by threads × one shard plus the accumulators, results equal for any chunking and any
number of threads, and no import of torch or transformers. Does not know how a capture is made.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
