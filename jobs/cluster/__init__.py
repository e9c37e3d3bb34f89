"""A capture, or a scan, on many workers: the rules, and Ray at the edge."""
