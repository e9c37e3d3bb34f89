"""One offline page: what it counts for each data set, what it says and what it draws."""
