"""The paths of tokens through the layers: frequent windows, and the paths of one document.

A path here is the sequence of a token's first choices. "Neighbouring" layers are neighbours among those captured (some
models have dense layers between them). Promises exact counts; windows whose dense table would not fit are rejected, not
sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.scanning import (
    Array,
    Block,
    Reducer,
    Selection,
    State,
    kernel,
    scan,
    selected_labels,
    sizes,
    special_tokens,
)

ROUNDING_BITS = 1e-6  # a surprise below it is rounding
MAX_WINDOWS = 2**24  # distinct windows counted at once: 128 MiB per thread; arbitrary
SOURCE = "PathMoE: routing paths as n-grams over layers"

WindowOrder = Literal["count", "surprise"]


class WindowCounts(Reducer):
    """Exact counts of first-choice n-grams through `n` consecutive layers.

    Parameters
    ----------
    n : int
        Layers in a window.
    """

    def __init__(self, n: int = 3) -> None:
        self.n = n

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `count` (start layer, first expert, the other experts**(n-1)) and `tokens`."""
        layers, _, experts = sizes(dataset)
        if not 1 <= self.n <= layers:
            raise ValueError(f"windows of n={self.n} layers, but the capture has {layers}: n must be 1 to {layers}")
        num_windows = (layers - self.n + 1) * experts**self.n
        if num_windows > MAX_WINDOWS:
            raise ValueError(
                f"{num_windows} windows of n={self.n} through {experts} experts are more than {MAX_WINDOWS}: "
                "use a smaller n, or fewer layers with dataset.sel(layer=...)"
            )
        shape = (layers - self.n + 1, experts, experts ** (self.n - 1))
        return {"count": np.zeros(shape, dtype=np.int64), "tokens": np.zeros(1, dtype=np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        starts, experts, _ = state["count"].shape
        count = state["count"].reshape(starts, -1)  # a view: sums are written to the state
        _add_windows(block["expert"], block["counted"], self.n, experts, count, state["tokens"])

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The counts, labelled: `counts` int64 (start, first, rest), where `rest` is a number in base E."""
        layer = dataset["layer"].values
        coords = {"start": layer[: len(layer) - self.n + 1], "layer": layer}
        return described(
            xr.Dataset({"counts": (("start", "first", "rest"), state["count"], {"units": "tokens"})}, coords),
            n=int(state["tokens"][0]),
            estimator="counts",
            null="even tables",
            definition=f"tokens by their first choices at {self.n} captured layers in a row, starting at layer `start`",
            source=SOURCE,
        )


def frequent_windows(
    dataset: xr.Dataset,
    n: int = 3,
    *,
    top: int = 20,
    by: WindowOrder = "count",
    threads: int | None = None,
) -> xr.Dataset:
    """The most frequent or most surprising sequences of first choices through `n` consecutive captured layers.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture.
    n : int
        Layers in a window.
    top, by
        See `frequent_windows_of`.
    threads : int, optional
        Shards decoded at the same time; default one per processor.

    Returns
    -------
    xr.Dataset
        See `frequent_windows_of`.

    Raises
    ------
    ValueError
        When the capture has fewer than `n` layers or too many possible windows for an exact table, or the order is
        unknown.
    """
    _check_order(by)
    return frequent_windows_of(scan(dataset, [WindowCounts(n)], threads=threads)[0], top=top, by=by)


def frequent_windows_of(counts: xr.Dataset, *, top: int = 20, by: WindowOrder = "count") -> xr.Dataset:
    """The first windows in the requested order, from the counts of `WindowCounts`.

    Parameters
    ----------
    counts : xr.Dataset
        From `WindowCounts`.
    top : int
        Number of windows to list.
    by : {"count", "surprise"}
        Order by how often a window occurs, or by its contribution to the likelihood ratio of the windows to the product
        of the transitions between their layers, count · log2(count / expected). With two layers nothing is surprising,
        because the transitions are the whole window.

    Returns
    -------
    xr.Dataset
        `layer` and `expert` int64 (window, step), `counts` int64, `share` of all tokens and `expected`, the count
        predicted by the transitions, float64 (window). Null of `share`: E**-n. Ties go to the earlier layer, then to
        the lower experts.

    Raises
    ------
    ValueError
        When the order is unknown.
    """
    _check_order(by)
    num_experts, layer, tokens = counts.sizes["first"], counts["layer"].values, int(counts.attrs["n"])
    n = len(layer) - counts.sizes["start"] + 1
    tables = counts["counts"].values.reshape(-1, *[num_experts] * n)
    count, expected = tables.ravel(), np.stack([_expected(table) for table in tables]).ravel()
    # Windows that are as frequent as expected, or rarer, are not surprising.
    times = np.divide(count, expected, out=np.ones_like(expected), where=(count > 0) & (expected > 0))
    score = count if by == "count" else count * np.log2(times)
    order = np.argsort(-score, kind="stable")[:top]
    order = order[score[order] > ROUNDING_BITS]
    start, code = np.divmod(order, num_experts**n)
    steps = np.arange(n)
    return described(
        xr.Dataset(
            {
                "layer": (("window", "step"), layer[start[:, None] + steps]),
                "expert": (("window", "step"), code[:, None] // num_experts ** (n - 1 - steps) % num_experts),
                "counts": ("window", count[order], {"units": "tokens"}),
                "share": ("window", count[order] / max(tokens, 1), {"long_name": "share of all tokens"}),
                "expected": (
                    "window",
                    expected[order],
                    {"long_name": "predicted by the transitions", "units": "tokens"},
                ),
            },
            coords={"window": np.arange(1, order.size + 1)},
        ),
        n=tokens,
        estimator="maximum likelihood",
        null=float(num_experts) ** -n,
        definition=f"share of tokens whose first choices at {n} captured layers in a row are this window; expected:"
        " tokens, if a choice only depended on the choice at the previous layer",
        source=SOURCE,
    )


def _check_order(by: WindowOrder) -> None:
    if by not in ("count", "surprise"):
        raise ValueError(f"by={by!r}: must be 'count' or 'surprise'")


def _expected(table: Array) -> Array:
    """The counts of n-grams predicted by their transitions, float64: N · P(e1) · Π P(e(i+1) | e(i))."""
    axes = range(table.ndim)
    single = [table.sum(tuple(other for other in axes if other != axis)) for axis in axes]
    expected: Array = single[0].astype(np.float64).reshape(-1, *[1] * (table.ndim - 1))
    for axis in axes[1:]:
        pair = table.sum(tuple(other for other in axes if other not in (axis - 1, axis))).astype(np.float64)
        step = pair / np.maximum(single[axis - 1], 1)[:, None]
        expected = expected * step.reshape(*[1] * (axis - 1), *step.shape, *[1] * (table.ndim - axis - 1))
    return expected


def document_path(
    dataset: xr.Dataset, document: int | str, *, roles: Sequence[str] = (), phases: Sequence[str] = ()
) -> xr.Dataset:
    """Every captured token of one document in reading order, with all its choices and weights.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture; only this document's rows are decoded.
    document : int or str
        The document's id, or its name if that is unique.
    roles, phases : sequence of str, optional
        Only tokens of these speakers, or of these phases ("prompt", "generated"); default all.

    Returns
    -------
    xr.Dataset
        Over `position`, the token's number in its document: `token` int32, `piece` str, `row` int64; over (position,
        layer, k): `expert`, in the store's type, and `weight` float16, if the capture has it; and over `position`, if
        the capture has them, `role` and `phase` str, "" if there is none. Special tokens have no position and are left
        out; tokens that are not yet captured are left out and counted in the attribute `tokens_missing`.

    Raises
    ------
    ValueError
        When no document, or more than one, matches `document`, or the capture has no such roles or phases.
    """
    only = selected_labels(dataset, Selection(roles=tuple(roles) or None, phases=tuple(phases) or None))
    number = document_number(dataset, document)
    rows = np.flatnonzero(dataset["document_id"].values == number)
    routes = [name for name in ("expert", "weight") if name in dataset]
    labels = {name: _label_names(dataset[name]) for name in ("role", "phase") if name in dataset}
    own = xr.Dataset({name: dataset[name].variable for name in ("token", "length", "offset", *routes, *labels)})
    own = own.isel(doc=rows).load()
    order = np.argsort(own["offset"].values, kind="stable")
    own, rows = own.isel(doc=order).transpose("doc", "position", "layer", "k"), rows[order]
    token = own["token"].values
    inside = np.arange(token.shape[1]) < own["length"].values[:, None]
    is_text = inside & ~np.isin(token, special_tokens(dataset))
    expert = own["expert"].values
    kept = is_text & (expert[:, :, 0, 0] != np.iinfo(expert.dtype).max)
    if "captured" in dataset:
        kept &= dataset["captured"].values[rows, None]
    missing = int(is_text.sum() - kept.sum())
    for name, numbers in only.items():
        kept &= np.isin(own[name].values, numbers)
    position = own["offset"].values[:, None] + np.cumsum(is_text, axis=1) - 1
    ids = token[kept]
    path = xr.Dataset(
        {
            "token": ("position", ids),
            "row": ("position", np.broadcast_to(rows[:, None], token.shape)[kept]),
            **{name: (("position", "layer", "k"), own[name].values[kept]) for name in routes},
            **{name: ("position", names[own[name].values[kept]]) for name, names in labels.items()},
        },
        coords={
            "position": position[kept],
            "layer": dataset["layer"].values,
            "piece": ("position", dataset["piece"].values.astype(object)[ids]),
        },
    )
    return described(
        path,
        n=int(kept.sum()),
        tokens_missing=missing,
        document=number,
        name=str(dataset["name"].values[number]),
        estimator="exact",
        null="none: choices, not a statistic",
        definition="k choices and weights of each token at each layer, largest weight first",
        source="-",
    )


def _label_names(label: xr.DataArray) -> Array:
    """The names of a label's numbers, "" for those without one."""
    names = np.full(256, "", dtype=object)
    given = str(label.attrs.get("flag_meanings", "")).split()
    names[: len(given)] = given
    return names


def document_number(dataset: xr.Dataset, document: int | str) -> int:
    """The id of a document given by id or name."""
    num_documents = dataset.sizes["document"]
    if not isinstance(document, str):
        if not 0 <= document < num_documents:
            raise ValueError(f"document {document}: the capture has documents 0 to {num_documents - 1}")
        return int(document)
    numbers = np.flatnonzero(dataset["name"].values == document)
    if numbers.size != 1:
        found = f"documents {numbers[:5].tolist()} have" if numbers.size else "no document has"
        raise ValueError(f"{found} the name {document!r}: use a document's id, 0 to {num_documents - 1}")
    return int(numbers[0])


@kernel
def _add_windows(expert: Array, counted: Array, n: int, num_experts: int, count: Array, tokens: Array) -> None:
    """Read a row's first choices at n layers as numbers in base E, layer by layer.

    Takes a quarter of the time of going token by token (measured).
    """
    rows, positions, layers, _ = expert.shape
    first = np.empty((layers, positions + 16), np.int32)  # padded so that layers do not share places in the cache
    code = np.empty(positions, np.int32)
    for row in range(rows):
        found = 0
        for position in range(positions):
            if counted[row, position]:
                for layer in range(layers):
                    first[layer, found] = expert[row, position, layer, 0]
                found += 1
        tokens[0] += found
        for start in range(len(count)):
            code[:] = 0
            for layer in range(start, start + n):
                _append(code, first[layer], np.int32(num_experts), found)
            for token in range(found):
                count[start, code[token]] += 1


@kernel
def _append(code: Array, first: Array, num_experts: Any, size: int) -> None:
    """Append one digit to each number; the compiler vectorizes this."""
    for token in range(size):
        code[token] = np.int32(code[token] * num_experts + first[token])
