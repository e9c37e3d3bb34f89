"""Resampling, information measures and growth: what any metric may use."""
