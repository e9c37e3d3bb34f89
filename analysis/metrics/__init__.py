"""One file per metric: what is counted, and the functions of the counts."""
