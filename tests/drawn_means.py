"""Documents drawn for simulations of tests of means: numbers of tokens, as counted by a jackknife."""

import numpy as np
import xarray as xr

from analysis.statistics.jackknife import UNITS, unit_of, without_each


def counted(value: np.ndarray, tokens: np.ndarray) -> xr.Dataset:
    """The result of a jackknife for documents with these means (document, cell) and tokens (document, cell)."""
    unit = unit_of(np.arange(len(tokens)), UNITS)
    totals, counts = (np.zeros((min(UNITS, len(tokens)), tokens.shape[1])) for _ in range(2))
    np.add.at(totals, unit, value * tokens)
    np.add.at(counts, unit, tokens)
    totals, counts = without_each(totals), without_each(counts)
    with np.errstate(invalid="ignore"):
        mean = xr.DataArray(totals / counts, dims=("replicate", "cell"), attrs={"amount": "tokens"})
    left_out = np.concatenate([[0], counts[0].sum() - counts[1:].sum(1)])
    return xr.Dataset(
        {"value": mean, "tokens": (("replicate", "cell"), counts)},
        {
            "replicate": np.arange(len(counts)),
            "left_out": ("replicate", left_out),
            "unit": ("replicate", np.arange(len(counts)) - 1),
        },
        {"n": int(tokens.sum()), "documents": len(tokens), "definition": "a number"},
    )


def documents(random: np.random.Generator, number: int, lengths: str, spread: float, cells: int) -> xr.Dataset:
    """Documents whose means are lognormal around 1, each with its own shares of tokens for the cells.

    `spread` is the deviation of a mean's logarithm; lengths are "equal", 200 tokens, or "unequal", lognormal around 200
    with a deviation of 1, 5 at least.
    """
    size = {"equal": np.full(number, 200.0), "unequal": np.maximum(random.lognormal(np.log(200), 1, number), 5)}
    tokens = np.rint(size[lengths][:, None] * random.dirichlet(np.full(cells, 3.0), number))
    noise = random.normal(size=tokens.shape) / np.sqrt(np.maximum(tokens, 1))
    return counted(random.lognormal(-(spread**2) / 2, spread, tokens.shape) + noise, tokens)
