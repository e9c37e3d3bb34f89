"""Counts and routes in the formats of other tools: Parquet, trainers, load balancers."""
