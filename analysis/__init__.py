"""Questions asked of a store: each a function from a lazy capture to a small labelled Dataset.

- `analysis.scanning` decodes every shard once and feeds any number of reducers; all metrics stand on it.
- `analysis.metrics.load`, `analysis.metrics.tokens`, `analysis.metrics.paths` are the metrics, with their nulls.
- `analysis.charts.theme` draws those results; `analysis.report.page` puts them on one page.

Promises: memory bounded by threads × one shard plus the accumulators, results equal for any chunking and any
number of threads, and no import of torch or transformers. Does not know how a capture is made.
"""
