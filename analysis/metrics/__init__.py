"""One file a metric: what is counted, and the functions of the counts."""
