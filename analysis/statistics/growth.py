"""How many tokens are enough? Any metric for parts of a capture of increasing size, from one scan.

Parts are nested: each holds about half of the documents of the next larger one, selected by a hash of their ids, so a
part is a sample of the data set and not its beginning. Promises: the same parts in any order. Does not know any metric.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import Block, Reducer, State, labelled, scan
from analysis.statistics.parts import Parts, nested


class Tokens(Reducer):
    """The number of counted tokens, and nothing else."""

    stacks = True

    def init(self, dataset: xr.Dataset) -> State:
        """Zero: `tokens`, shape (1,)."""
        return {"tokens": np.zeros(1, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        state["tokens"] += np.count_nonzero(block["counted"])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The number of tokens."""
        return described(
            xr.Dataset({"tokens": labelled(state["tokens"][..., 0]).assign_attrs(units="tokens")}),
            n=int(state["tokens"].flat[0]),
            estimator="counts",
            null="none: a number of tokens",
            definition="counted tokens",
            source="-",
        )


def growth(
    dataset: xr.Dataset,
    reducer: Reducer,
    *,
    halvings: int = 8,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """A reducer's result for the whole capture, for about half of its documents, a quarter, and so on.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    reducer : Reducer
        A reducer whose accumulators are small and sums, such as `Load()` or `Choices(joint=False)`.
    halvings : int
        Number of parts besides the whole.
    threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        The reducer's result along `part`, 0 the whole, with the coordinate `tokens` int64 (part). Functions of counts,
        such as `analysis.balance_of`, accept it directly.

    Raises
    ------
    ValueError
        When `halvings` is below 1, or the reducer's accumulators are not sums.
    """
    if halvings < 1:
        raise ValueError(f"halvings={halvings}: must be at least 1")
    found, counted = scan(
        dataset,
        [Parts(each, halvings, partial(nested, halvings=halvings)) for each in (reducer, Tokens())],
        threads=threads,
        progress=progress,
    )
    found = found.rename(replicate="part").drop_attrs(deep=False)
    tokens = counted["tokens"].rename(replicate="part")
    return described(
        found.assign_coords(tokens=tokens),
        n=int(tokens[0]),
        null="that of the metric",
        estimator="that of the metric, for each part",
        definition="part p: documents whose hash, a number in [0, 1), is below 2**-p",
        source="-",
    )


def enough(values: Any, tolerance: float) -> Any:
    """The fewest tokens from which a metric stays near its value for the whole capture.

    Parameters
    ----------
    values : xr.DataArray
        A metric along `part`, with the coordinate `tokens`, computed from the result of `growth`.
    tolerance : float
        The largest distance from the whole's value that counts as near, in the metric's units.

    Returns
    -------
    xr.DataArray
        Tokens, float64, with the dims of `values` except `part`: those of the smallest part that is near together with
        all larger ones; those of the whole if not even half of the documents are near; NaN if the whole has no value.
    """
    near = (abs(values - values.isel(part=0)) <= tolerance).cumprod("part").astype(bool)
    return values["tokens"].where(near).min("part").assign_attrs(units="tokens", tolerance=tolerance)
