"""One file a section of the report: what it asks, how to read it, what it draws."""
