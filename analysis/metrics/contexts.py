"""The places of an expert's largest weights.

Promises: the same places for any order of the shards, and at most one per row, so that one text does not fill the list.
Does not know text: places are rows and positions.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import Array, Block, Reducer, State, kernel, scan, sizes


class TopContexts(Reducer):
    """The places where each expert has its largest weights, at most one per row.

    Parameters
    ----------
    top : int
        Number of places kept per expert.
    around : int, optional
        Also keep the weights for the expert of so many tokens on both sides of a place, and of the token there.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})

    def __init__(self, top: int = 20, around: int | None = None) -> None:
        if top < 1 or (around is not None and around < 0):
            raise ValueError(f"top={top}, around={around}: must be at least 1 and at least 0")
        self.top, self.around = top, around

    def init(self, dataset: xr.Dataset) -> State:
        """No places: `row` and `position` are -1, and `weight` (the bits of float16, which sort like the numbers) 0."""
        layers, _, experts = sizes(dataset)
        shape = (layers, experts, self.top)
        state: State = {"weight": np.zeros(shape, dtype=np.uint16)}
        state |= {name: np.full(shape, -1, dtype=np.int64) for name in ("row", "position")}
        if self.around is not None:
            state["around"] = np.zeros((*shape, 2 * self.around + 1), dtype=np.uint16)
        return state

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        bits, before = block["weight"].view(np.uint16), state["row"].copy()
        places = [state[name] for name in ("weight", "row", "position")]
        _add_places(block["expert"], bits, block["counted"], block["row"], *places)
        if "around" in state:
            where = before, state["row"], state["position"]
            _add_around(block["expert"], bits, block["length"], block["row"], *where, state["around"])

    def merge(self, state: State, other: State) -> State:
        """The larger weights of both."""
        both = {name: np.concatenate([state[name], other[name]], axis=2) for name in state}
        empty = both["row"] < 0
        order = np.lexsort((both["row"], -both["weight"].astype(np.int32), empty), axis=-1)[..., : self.top]
        layer, expert = np.ogrid[: order.shape[0], : order.shape[1]]
        return {name: array[layer[..., None], expert[..., None], order] for name, array in both.items()}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The places, the largest weight first."""
        known = state["row"] >= 0
        variables = {
            "row": (state["row"], "row of the capture"),
            "position": (state["position"], "position in the row"),
            "weight": (np.where(known, state["weight"].view(np.float16), np.float16(np.nan)), "weight of the choice"),
        }
        coords = {"layer": dataset["layer"].values, "expert": np.arange(sizes(dataset)[2])}
        found: dict[str, Any] = {
            name: (("layer", "expert", "place"), values, {"long_name": about})
            for name, (values, about) in variables.items()
        }
        if "around" in state:
            about = {"long_name": "weights of the surrounding tokens for the expert, 0 if they did not choose it"}
            found["around"] = (("layer", "expert", "place", "offset"), state["around"].view(np.float16), about)
        return described(
            xr.Dataset(found, {**coords, "place": np.arange(1, self.top + 1)}),
            n=int(known.sum()),
            counted="places",
            estimator="exact",
            null="none: places, not a statistic",
            definition="the tokens at which the expert has its largest weights, at most one per row; ties go to the"
            " earlier row, then to the earlier position",
            source="top activating contexts, as for neurons of a dense model (Bills et al. 2023)",
        )


def top_contexts(dataset: xr.Dataset, *, top: int = 20, threads: int | None = None) -> xr.Dataset:
    """The places where each expert has its largest weights.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    top : int
        Number of places kept per expert, at most one per row.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        Over (layer, expert, place): `row` and `position` int64, -1 if the expert was chosen in fewer rows, and `weight`
        float16, NaN in that case.

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
    """Insert each row's best place of every expert into the kept places."""
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


@kernel
def _add_around(
    expert: Array,
    bits: Array,
    length: Array,
    number: Array,
    before: Array,
    row_of: Array,
    position_of: Array,
    around: Array,
) -> None:
    """Store the weights around each place: for places in this block, whose rows are consecutive, from its arrays; for
    kept places, from their previous slot."""
    layers, experts, top, width = around.shape
    for layer in range(layers):
        for e in range(experts):
            kept = around[layer, e].copy()
            for slot in range(top):
                at = row_of[layer, e, slot] - number[0]
                if 0 <= at < number.size:
                    around[layer, e, slot, :] = 0
                    first = position_of[layer, e, slot] - width // 2
                    for offset in range(max(0, -first), min(width, length[at] - first)):
                        for k in range(expert.shape[3]):
                            if expert[at, first + offset, layer, k] == e:
                                around[layer, e, slot, offset] = bits[at, first + offset, layer, k]
                elif row_of[layer, e, slot] >= 0:
                    for old in range(top):
                        if before[layer, e, old] == row_of[layer, e, slot]:
                            around[layer, e, slot] = kept[old]
