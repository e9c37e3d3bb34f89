"""Questions asked of a store: each a function from a lazy capture to a small labelled Dataset.

- `analysis.scan` decodes every shard once and feeds any number of reducers; all metrics stand on it.
- `analysis.load`, `analysis.tokens`, `analysis.paths` are the metrics, with their nulls.
- `analysis.charts` draws those results; `analysis.report` puts them on one page.

Promises: memory bounded by threads × one shard plus the accumulators, results equal for any chunking and any
number of threads, and no import of torch or transformers. Does not know how a capture is made.
"""
