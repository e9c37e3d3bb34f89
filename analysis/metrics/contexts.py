"""Where an expert weighs most: the places of its largest weights.

Promises: the same places in whatever order the shards come, at most one a row, so that one text does not fill the list.
Does not know text: places are rows and positions.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import Array, Block, Reducer, State, kernel, scan, sizes


class TopContexts(Reducer):
    """The places where each expert has its largest weights, one a row at most.

    Parameters
    ----------
    top : int
        Places kept for an expert.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(self, top: int = 20) -> None:
        if top < 1:
            raise ValueError(f"top={top}: at least 1")
        self.top = top

    def init(self, dataset: xr.Dataset) -> State:
        """No places: `row` and `position` are -1, and `weight` (float16's bits, which order as the numbers do) 0."""
        layers, _, experts = sizes(dataset)
        shape = (layers, experts, self.top)
        places = {name: np.full(shape, -1, dtype=np.int64) for name in ("row", "position")}
        return {"weight": np.zeros(shape, dtype=np.uint16), **places}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        bits = block["weight"].view(np.uint16)
        _add_places(block["expert"], bits, block["counted"], block["row"], *state.values())

    def merge(self, state: State, other: State) -> State:
        """The larger weights of both."""
        both = {name: np.concatenate([state[name], other[name]], axis=-1) for name in state}
        empty = both["row"] < 0
        order = np.lexsort((both["row"], -both["weight"].astype(np.int32), empty), axis=-1)[..., : self.top]
        return {name: np.take_along_axis(array, order, -1) for name, array in both.items()}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The places, the largest weight first."""
        known = state["row"] >= 0
        variables = {
            "row": (state["row"], "row of the capture"),
            "position": (state["position"], "position in the row"),
            "weight": (np.where(known, state["weight"].view(np.float16), np.float16(np.nan)), "weight of the choice"),
        }
        coords = {"layer": dataset["layer"].values, "expert": np.arange(sizes(dataset)[2])}
        found = {
            name: (("layer", "expert", "place"), values, {"long_name": about})
            for name, (values, about) in variables.items()
        }
        return described(
            xr.Dataset(found, {**coords, "place": np.arange(1, self.top + 1)}),
            n=int(known.sum()),
            counted="places",
            estimator="exact",
            null="none: places, not a statistic",
            definition="the tokens at which the expert has its largest weights, at most one in a row; ties go to the"
            " earlier row, then to the earlier position",
            source="top activating contexts, as of neurons in a dense model (Bills et al. 2023)",
        )


def top_contexts(dataset: xr.Dataset, *, top: int = 20, threads: int | None = None) -> xr.Dataset:
    """The places where each expert has its largest weights.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    top : int
        Places kept for an expert, one a row at most.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        Over (layer, expert, place): `row` and `position` int64, -1 where the expert was chosen in fewer rows, and
        `weight` float16, there NaN.

    Raises
    ------
    ValueError
        When `top` is below 1.
    """
    return scan(dataset, [TopContexts(top)], threads=threads)[0]


@kernel
def _add_places(
    expert: Array, bits: Array, counted: Array, number: Array, weight: Array, row_of: Array, position_of: Array
) -> None:
    """Put each row's best place of every expert where it belongs among those that are kept."""
    rows, positions, layers, choices = expert.shape
    _, experts, top = weight.shape
    best = np.empty((layers, experts), dtype=np.int64)
    at = np.empty((layers, experts), dtype=np.int64)
    for row in range(rows):
        best[:] = -1
        for position in range(positions):
            if counted[row, position]:
                for layer in range(layers):
                    for k in range(choices):
                        e, value = expert[row, position, layer, k], np.int64(bits[row, position, layer, k])
                        if value > best[layer, e]:
                            best[layer, e], at[layer, e] = value, position
        for layer in range(layers):
            for e in range(experts):
                if best[layer, e] < 0:
                    continue
                slot = top
                while slot > 0 and (
                    row_of[layer, e, slot - 1] < 0
                    or weight[layer, e, slot - 1] < best[layer, e]
                    or (weight[layer, e, slot - 1] == best[layer, e] and row_of[layer, e, slot - 1] > number[row])
                ):
                    slot -= 1
                if slot == top:
                    continue
                for other in range(top - 1, slot, -1):
                    weight[layer, e, other] = weight[layer, e, other - 1]
                    row_of[layer, e, other] = row_of[layer, e, other - 1]
                    position_of[layer, e, other] = position_of[layer, e, other - 1]
                weight[layer, e, slot] = np.uint16(best[layer, e])
                row_of[layer, e, slot] = number[row]
                position_of[layer, e, slot] = at[layer, e]
