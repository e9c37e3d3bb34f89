"""How many different paths tokens take: the diversity of windows of layers, and of whole paths through all layers.

A path is the sequence of a token's first choices, as in `analysis.metrics.paths`. Windows are counted in dense tables.
Whole paths are too many for that (8**32), and mostly different: in a large capture, the frequent ones are counted
exactly and the others in a sample of all possible paths, selected by a hash, so numbers about them are unbiased
estimates.

Promises: bounded memory, and the same result in any order and any chunking; the result says whether a number is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.paths import SOURCE, WindowCounts
from analysis.scanning import Array, Block, Reducer, State, kernel, scan, sizes
from analysis.statistics.hashing import mixed
from analysis.statistics.information import entropy

TOPS = (10, 100, 1_000, 10_000)
BUCKETS = 2**22  # buckets in which paths are counted first, to find the frequent ones: 32 MB (arbitrary)


def window_diversity(
    dataset: xr.Dataset,
    lengths: Sequence[int] | None = None,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Entropy and coverage of first-choice n-grams over consecutive captured layers.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    lengths : sequence of int, optional
        Numbers of layers in a window; default 1 to 4, limited to the captured layers.
    threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        See `window_diversity_of`.

    Raises
    ------
    ValueError
        See `analysis.frequent_windows`.
    """
    lengths = range(1, min(4, dataset.sizes["layer"]) + 1) if lengths is None else lengths
    return window_diversity_of(scan(dataset, [WindowCounts(n) for n in lengths], threads=threads, progress=progress))


def window_diversity_of(counts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Entropy and coverage of first-choice n-grams, from the counts of `WindowCounts`.

    Parameters
    ----------
    counts : sequence of xr.Dataset
        From `analysis.WindowCounts`, for one capture: one for each length.

    Returns
    -------
    xr.Dataset
        Over (length, layer), where layer is a window's first one, and NaN if a window would extend beyond the last one:
        `distinct`, the number of windows that occur; `entropy` and, by Miller–Madow, `corrected` in bits; `rate`,
        entropy per layer, null log2(E); `conditional`, what the last layer of a window adds to the entropy of the
        previous ones, if the next smaller length is also given. `coverage` (length, layer, top): share of tokens that
        take one of the most frequent 10, 100, 1,000, 10,000 windows. float64.
    """
    lengths = [each.sizes["layer"] - each.sizes["start"] + 1 for each in counts]
    length = xr.DataArray(lengths, dims="length", name="length")
    joined = xr.concat([_diversity(each) for each in counts], length, join="outer")
    before = joined["entropy"].reindex(length=[n - 1 for n in lengths]).assign_coords(length=length)
    joined = joined.assign(rate=joined["entropy"] / length, conditional=joined["entropy"] - before.where(length > 1, 0))
    return described(
        joined,
        n=counts[0].attrs["n"],
        null=float(np.log2(counts[0].sizes["first"])),
        estimator="maximum likelihood",
        definition="H_n of the first choices at n captured layers in a row; rate = H_n / n; conditional = H_n - H_n-1",
        source=SOURCE,
    )


def _diversity(counts: xr.Dataset) -> xr.Dataset:
    """The diversity of windows of one length, starting at each layer."""
    starts = counts.sizes["start"]
    count = xr.DataArray(counts["counts"].values.reshape(starts, -1), dims=("layer", "window"))
    bits = entropy(count, "window")
    ordered = -np.sort(-count.values, axis=1)
    covered = np.cumsum(ordered, axis=1)[:, [min(top, ordered.shape[1]) - 1 for top in TOPS]]
    n = bits["n"].where(bits["n"] > 0)
    return xr.Dataset(
        {
            "distinct": (count > 0).sum("window"),
            "entropy": bits["entropy"].assign_attrs(units="bits"),
            "corrected": bits["corrected"].assign_attrs(units="bits", estimator="Miller–Madow"),
            "coverage": xr.DataArray(covered, dims=("layer", "top")) / n,
        },
        coords={"layer": counts["start"].values, "top": list(TOPS)},
    )


class PathBuckets(Reducer):
    """Tokens by the hash of their path, in buckets: no path is more frequent than its bucket."""

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` (bucket)."""
        return {"count": np.zeros(BUCKETS, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        _add_buckets(path_keys(block), state["count"])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The counts."""
        return described(
            xr.Dataset({"counts": ("bucket", state["count"])}),
            n=int(state["count"].sum()),
            estimator="counts",
            null=1 / BUCKETS,
            definition="tokens by the hash of their path, modulo the number of buckets",
            source="-",
        )


class Paths(Reducer):
    """Whole paths with their exact counts: all, or those of some buckets and a sample of the others.

    Parameters
    ----------
    halvings : int
        The sample covers a 2**-halvings part of all possible paths.
    kept : bool array, shape (BUCKETS,), optional
        Buckets whose paths are all kept.
    """

    def __init__(self, halvings: int = 0, kept: Array | None = None) -> None:
        self.halvings, self.kept = halvings, kept

    def init(self, dataset: xr.Dataset) -> State:
        """Empty: `key` uint64, `count` and `expert` of paths, in no order, and how many of them are `merged`."""
        layers, _, _ = sizes(dataset)
        expert = np.zeros((0, layers), dataset["expert"].dtype)
        return {
            "key": np.zeros(0, np.uint64),
            "count": np.zeros(0, np.int64),
            "expert": expert,
            "merged": np.zeros(1, int),
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard; paths are merged when their number has doubled."""
        row, position = np.nonzero(block["counted"])
        key = path_keys(block)
        wanted = self.sampled(key)
        if self.kept is not None:
            wanted |= self.kept[key % np.uint64(BUCKETS)]
        chosen = np.flatnonzero(wanted)
        own, first, count = np.unique(key[chosen], return_index=True, return_counts=True)
        first = chosen[first]
        added = {"key": own, "count": count, "expert": block["expert"][row[first], position[first], :, 0]}
        for name, values in added.items():
            state[name] = np.concatenate([state[name], values])
        if len(state["key"]) > 2 * state["merged"][0] + 65_536:
            state.update(_merged(state))

    def merge(self, state: State, other: State) -> State:
        """The paths of both, each once."""
        return _merged({name: np.concatenate([state[name], other[name]]) for name in ("key", "count", "expert")})

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The paths, most frequent first; ties go to the lower experts."""
        paths = _merged(state)
        order = np.lexsort((*paths["expert"].T[::-1], -paths["count"]))
        return described(
            xr.Dataset(
                {
                    "expert": (("path", "layer"), paths["expert"][order]),
                    "counts": ("path", paths["count"][order]),
                    "key": ("path", paths["key"][order]),
                },
                coords={"layer": dataset["layer"].values},
            ),
            n=int(paths["count"].sum()),
            estimator="counts",
            null=float(sizes(dataset)[2]) ** -dataset.sizes["layer"],
            definition="a token's path: its first choices at all captured layers",
            source="PathMoE: routing paths",
        )

    def sampled(self, key: Array) -> Array:
        """Whether paths are in the sample."""
        return np.asarray(key >> np.uint64(64 - self.halvings) == 0) if self.halvings else np.full(len(key), True)


def whole_paths(
    dataset: xr.Dataset,
    *,
    top: int = 20,
    kept: int = 2**20,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """The paths that tokens take through all captured layers.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture. It is read twice if it has more than `kept` tokens.
    top : int
        Number of paths to list.
    kept : int
        Approximate number of different paths held in each thread, 16 + L bytes each; up to so many tokens, everything
        is exact.
    threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        `expert`, in the store's type (path, layer), `counts` int64 and `share` of all tokens float64 (path): the most
        frequent ones. `coverage` float64 (top): share of tokens that take one of the 10, 100, 1,000, 10,000 most
        frequent paths, and `proven` bool (top), whether it is exact; otherwise it is a lower bound. float64, without
        dimensions: `distinct`, the number of different paths, with `distinct_sd`; `once`, those that occur once; and
        `unseen`, the share of future tokens that would take a new one (Good 1953); `entropy`, and by Miller–Madow
        `corrected`, in bits, and `rate`, the entropy per layer: exact if `distinct_sd` is 0. If most paths occur once,
        an entropy says more about the number of tokens than about the model.

    Raises
    ------
    ValueError
        When `top` or `kept` is below 1, or nothing was captured.
    """
    if top < 1 or kept < 1:
        raise ValueError(f"top={top}, kept={kept}: both must be at least 1")
    layers, _, experts = sizes(dataset)
    halvings = max(0, int(np.ceil(np.log2(max(1, int(dataset["length"].sum())) / kept))))
    frequent, most_elsewhere = None, 0
    if halvings:
        bucket = scan(dataset, [PathBuckets()], threads=threads, progress=progress)[0]["counts"].values
        many = min(BUCKETS >> halvings, kept)
        seen = bucket[bucket > 0]  # partitioning millions of zeros takes seconds
        most_elsewhere = int(np.partition(seen, -many - 1)[-many - 1]) if len(seen) > many else 0
        frequent = bucket > most_elsewhere
        n = int(bucket.sum())
    wanted = Paths(halvings, frequent)
    paths = scan(dataset, [wanted], threads=threads, progress=progress)[0]
    count = paths["counts"].values
    if not halvings:
        n = int(count.sum())
    if not n:
        raise ValueError("no token is captured, so there are no paths")
    of_sample = (
        ~frequent[paths["key"].values % np.uint64(BUCKETS)] if frequent is not None else np.full(len(count), False)
    )
    stands_for = np.where(of_sample, 2.0**halvings, 1.0)
    plain = float(-(stands_for * (count / n) * np.log2(count / n)).sum())
    distinct = float(stands_for.sum())
    covered, room = np.cumsum(count), min(top, len(count))
    tops = [min(number, len(count)) for number in TOPS]
    proven = [not halvings or (number <= len(count) and int(count[number - 1]) >= most_elsewhere) for number in TOPS]
    once = float(stands_for[count == 1].sum())
    listed: dict[str, Any] = {
        "expert": paths["expert"][:room].variable,
        "counts": ("path", count[:room], {"units": "tokens"}),
        "share": ("path", count[:room] / n),
        "coverage": ("top", covered[np.array(tops) - 1] / n),
        "proven": ("top", proven),
        "distinct": distinct,
        "distinct_sd": float(np.sqrt(2.0**halvings * (2.0**halvings - 1) * of_sample.sum())),
        "once": once,
        "unseen": once / n,
        "entropy": plain,
        "corrected": plain + (distinct - 1) / (2 * np.log(2) * n),
        "rate": plain / layers,
    }
    coords = {"layer": paths["layer"].values, "path": np.arange(1, room + 1), "top": list(TOPS)}
    return described(
        xr.Dataset(listed, coords),
        n=n,
        null=float(experts) ** -layers,
        estimator="exact" if not halvings else f"frequent paths exact, others from a 1 in {2**halvings} sample by hash",
        definition="a token's path: its first choices at all captured layers; rate = entropy / layers",
        source="PathMoE: routing paths; Good 1953; Horvitz & Thompson 1952",
    )


def path_keys(block: Block) -> Array:
    """A hash of the path of each counted token, in reading order; uint64. Among 10**8, the probability of a collision
    is 3 in 10,000."""
    with np.errstate(over="ignore"):
        return mixed(_digits(block["expert"], block["counted"]))


def _merged(paths: State) -> State:
    """Each path once."""
    key, first, inverse = np.unique(paths["key"], return_index=True, return_inverse=True)
    count = np.zeros(len(key), np.int64)
    np.add.at(count, inverse, paths["count"])
    return {"key": key, "count": count, "expert": paths["expert"][first], "merged": np.array([len(key)])}


@kernel
def _digits(expert: Array, counted: Array) -> Array:
    rows, positions, layers, _ = expert.shape
    key = np.zeros(counted.sum(), np.uint64)
    token = 0
    for row in range(rows):
        for position in range(positions):
            if counted[row, position]:
                digits = np.uint64(0)
                for layer in range(layers):
                    digits = digits * np.uint64(0x2545F4914F6CDD1D) + np.uint64(expert[row, position, layer, 0] + 1)
                key[token] = digits
                token += 1
    return key


@kernel
def _add_buckets(key: Array, count: Array) -> None:
    for token in range(key.size):
        count[key[token] % np.uint64(count.size)] += 1
