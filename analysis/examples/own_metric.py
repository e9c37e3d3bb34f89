"""Your own metric in ten lines: `python analysis/examples/own_metric.py demo.zarr/demo-prose`.

How often are the first two choices nearly tied? The metric is the share of tokens whose two largest weights differ by
less than a tenth. A reducer adds up integers, shard by shard; `scan` handles threads, memory, special tokens and tokens
that are not captured. `described` attaches the description of the result.
"""

import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import xarray as xr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for `store` and `analysis`

import store
from analysis import Block, Reducer, State, described, scan


class NearTies(Reducer):
    """Share of the tokens whose second weight is more than 0.9 of the first."""

    needs: ClassVar[frozenset[str]] = frozenset({"weight"})

    def init(self, dataset: xr.Dataset) -> State:
        return {"near": np.zeros(dataset.sizes["layer"], np.int64), "tokens": np.zeros(1, np.int64)}

    def update(self, state: State, block: Block) -> None:
        weight = block["weight"][block["counted"]].astype(float)  # (token, layer, k)
        state["near"] += (weight[..., 1] > 0.9 * weight[..., 0]).sum(axis=0)
        state["tokens"] += len(weight)

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        share = xr.DataArray(state["near"] / state["tokens"], {"layer": dataset["layer"].values}, ["layer"])
        return described(
            xr.Dataset({"share": share}),
            n=int(state["tokens"][0]),
            estimator="mean over tokens",
            null="none: there is no reference value",
            definition="share of tokens with w2 > 0.9 w1",
            source="-",
        )


def main(place: str) -> None:
    """Print the metric."""
    path, _, dataset = place.rpartition("/")
    [found] = scan(store.open_capture(path, dataset), [NearTies()])
    print(f"{dataset}: share of {found.attrs['n']:,} tokens whose two weights differ by less than a tenth")
    for layer in found["layer"].values.tolist():
        print(f"layer {layer}: {float(found['share'].sel(layer=layer)):.4f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python analysis/examples/own_metric.py STORE/DATASET")
    main(sys.argv[1])
