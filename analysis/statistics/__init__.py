"""Resampling, information measures and growth, for use by any metric."""
