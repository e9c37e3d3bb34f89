"""Documents drawn for simulations of the effect: differences of tokens by class, as counted by a jackknife."""

import numpy as np
import xarray as xr
from drawn_means import counted

SHAPES = ("normal", "skewed", "long tails", "with length")
LENGTHS = ("equal", "unequal")


def documents(random: np.random.Generator, number: int, lengths: str, shape: str, classes: int) -> xr.Dataset:
    """The result of `Jackknife(Effects())` for documents whose effects average 0 over tokens.

    Lengths are "equal", 200 tokens, or "unequal", lognormal around 200 with a deviation of 1, 5 at least. A document's
    effect is normal, lognormal with a deviation of 1 less its mean, Student's t of 3 degrees, or normal and larger in
    longer documents. A class of a document deviates from the document, and single tokens deviate from the class.
    """
    size = {"equal": np.full(number, 200.0), "unequal": np.maximum(random.lognormal(np.log(200), 1, number), 5)}[
        lengths
    ]
    own = {
        "normal": random.normal(size=number),
        "skewed": random.lognormal(0, 1, number) - np.exp(0.5),
        "long tails": random.standard_t(3, number),
        # E[T log(T / 200)] / E[T] of a lognormal T is the square of the deviation of its logarithm.
        "with length": random.normal(size=number) + np.log(size / 200) - (lengths == "unequal"),
    }[shape]
    tokens = np.rint(size[:, None] * random.dirichlet(np.full(classes, 3.0), number))
    value = own[:, None] + random.normal(size=tokens.shape) * (0.5 + 3 / np.sqrt(np.maximum(tokens, 1)))
    total = tokens.sum(1, keepdims=True)
    whole, by_class = counted((value * tokens).sum(1, keepdims=True) / total, total), counted(value, tokens)
    return xr.Dataset(
        {
            "effect": whole["value"].isel(cell=0),
            "tokens": whole["tokens"].isel(cell=0),
            "of_class": by_class["value"].rename(cell="token_class").assign_attrs(amount="class_tokens"),
            "class_tokens": by_class["tokens"].rename(cell="token_class"),
        },
        attrs=whole.attrs | {"units": whole.sizes["replicate"] - 1},
    )
