"""One file per section of the report: what it counts, how to read it, what it draws."""
