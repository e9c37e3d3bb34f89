"""One offline page: what it asks of each data set, what it says and draws."""
