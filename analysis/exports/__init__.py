"""Counts and routes in other tools' forms: Parquet, trainers, load balancers."""
