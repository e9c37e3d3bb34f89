"""Documents drawn for simulations of a class's lift: tokens of the class and of the others, and those of an expert."""

import numpy as np
import xarray as xr
from drawn_means import counted

LIFT = 0.5 / (0.2 * 0.5 + 0.8 * 0.2)  # of the documents that `documents` draws


def documents(random: np.random.Generator, number: int, lengths: str, spread: float) -> xr.Dataset:
    """The result of `Jackknife(ClassCounts())` for documents of which on average a fifth belongs to the class.

    An expert gets half of the class and a fifth of the other tokens, on average over documents; these shares, and that
    of the class, are beta with a concentration of `spread`: the smaller it is, the more documents differ. Lengths are
    "equal", 200 tokens, or "unequal", lognormal around 200 with a deviation of 1, 20 at least.
    """
    size = {"equal": np.full(number, 200), "unequal": np.maximum(random.lognormal(np.log(200), 1, number), 20)}[lengths]
    tokens = size.astype(int)
    share, own, others = (random.beta(mean * spread, (1 - mean) * spread, number) for mean in (0.2, 0.5, 0.2))
    of_class = random.binomial(tokens, share)
    reached = random.binomial(of_class, own)
    every = reached + random.binomial(tokens - of_class, others)
    sums = {"counts": reached, "tokens": of_class, "all_counts": every, "all_tokens": tokens}
    whole = {name: counted(values[:, None].astype(float), np.ones((number, 1))) for name, values in sums.items()}
    rows = {name: (each["value"] * each["tokens"]).isel(cell=0) for name, each in whole.items()}
    left_out = np.concatenate([[0], rows["all_tokens"].values[0] - rows["all_tokens"].values[1:]])
    found = xr.Dataset({name: row.drop_attrs().round() for name, row in rows.items()})
    found = found.assign_coords(left_out=("replicate", left_out))
    found["counts"] = found["counts"].expand_dims(token_class=["own"], layer=[0], expert=[0])
    found["tokens"] = found["tokens"].expand_dims(token_class=["own"])
    found["all_counts"] = found["all_counts"].expand_dims(layer=[0], expert=[0])
    attrs = {"n": int(tokens.sum()), "documents": number, "units": found.sizes["replicate"] - 1}
    return found.assign_attrs(attrs, experts_per_token=2, experts=8, source="-")
