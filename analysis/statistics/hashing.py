"""Deterministic pseudo-random numbers: the same for a document wherever and whenever it is read."""

from __future__ import annotations

import numpy as np

from analysis.scanning import Array


def mixed(number: Array) -> Array:
    """SplitMix64's finalizer (Steele et al. 2014): a bijection of uint64; the caller silences overflow warnings."""
    number = number + np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = number ^ (number >> np.uint64(31))
    return mixed


def uniform(document: Array, numbers: int, seed: int = 0) -> Array:
    """A number in [0, 1) for each index and each document: float64 (number, document)."""
    with np.errstate(over="ignore"):
        key = mixed(np.asarray(document).astype(np.uint64) + np.uint64(seed) * np.uint64(0xD1342543DE82EF95))
        step = np.arange(1, numbers + 1, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        return mixed(key + step) / 2.0**64
