"""Rows of some documents with the log-probability of each token, to compare two captures of one text without reading
them together.

Promises: the sample is the same in any order of shards and any chunking, and the same documents of the same text in any
capture of it. Does not keep routes: the sample is a small capture of one layer with one expert, so that
`analysis.effect` can compare the `common_rows` of two.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.sample import document_order, first_rows
from analysis.scanning import Block, Reducer, State

UNKNOWN = np.iinfo(np.uint8).max  # the expert of tokens that are not counted or not captured


class SampledPredictions(Reducer):
    """The rows of some documents, with the tokens and their log-probabilities.

    Rows are selected as in `SampledRoutes`: documents in the order of a hash, until they hold `size` counted tokens.

    Parameters
    ----------
    size : int
        Size of the sample in counted tokens; it ends with the row that reaches it.

    Raises
    ------
    ValueError
        When `size` is below 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"document_id", "offset", "logprob"})

    def __init__(self, size: int = 262_144) -> None:
        if size < 1:
            raise ValueError(f"size={size}: must be at least 1")
        self.size = size

    def init(self, dataset: xr.Dataset) -> State:
        """Empty: rows' `order`, `tokens`, `document`, `offset` and `length`; by position `counted`, `token`, and the
        `bits` of log-probabilities; and `of`, the total number of tokens."""
        of_position = {"counted": bool, "token": np.int32, "bits": np.uint32}
        return {
            "order": np.zeros((0, 2), np.uint64),
            **{name: np.zeros(0, np.int64) for name in ("tokens", "document", "offset", "length")},
            **{name: np.zeros((0, dataset.sizes["position"]), dtype) for name, dtype in of_position.items()},
            "of": np.zeros(1, np.int64),
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard, copying only rows that are still in the sample."""
        tokens, order = block["counted"].sum(axis=1), document_order(block)
        known = len(state["tokens"])
        both = np.concatenate([state["order"], order]), np.concatenate([state["tokens"], tokens])
        row = first_rows(*both, self.size) - known
        row = row[row >= 0]
        own = {
            "order": order,
            "tokens": tokens,
            "document": block["document_id"].astype(np.int64),
            "offset": block["offset"].astype(np.int64),
            "length": block["length"].astype(np.int64),
            "counted": block["counted"],
            "token": block["token"],
            "bits": np.ascontiguousarray(block["logprob"], np.float32).view(np.uint32),
        }
        state.update(
            self.merge(state, {**{name: values[row] for name, values in own.items()}, "of": tokens.sum(keepdims=True)})
        )

    def merge(self, state: State, other: State) -> State:
        """The rows of both that come first."""
        both = {name: np.concatenate([state[name], other[name]]) for name in state if name != "of"}
        row = first_rows(both["order"], both["tokens"], self.size)
        return {**{name: values[row] for name, values in both.items()}, "of": state["of"] + other["of"]}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """A capture of one layer in which counted tokens have expert 0: `expert` uint8 (doc, position, layer, k),
        `token` int32 and `logprob` float32 (doc, position), `length`, `document_id` and `offset` int64 (doc), and
        `piece` (token_id)."""
        expert = np.where(state["counted"], 0, UNKNOWN).astype(np.uint8)[..., None, None]
        found = xr.Dataset(
            {
                "expert": (("doc", "position", "layer", "k"), expert),
                "token": (("doc", "position"), state["token"]),
                "logprob": (("doc", "position"), state["bits"].view(np.float32)),
                "length": ("doc", state["length"]),
                "document_id": ("doc", state["document"]),
                "offset": ("doc", state["offset"]),
                "piece": ("token_id", dataset["piece"].values.astype(object)),
            },
            {"layer": [0]},
        )
        return described(
            found,
            n=int(state["tokens"].sum()),
            estimator="sample of documents by hash",
            null="none: a sample, not a statistic",
            definition="the tokens of the documents whose hashes are smallest",
            source="bottom-k sketches (Cohen & Kaplan 2007)",
            of=int(state["of"][0]),
            num_experts=1,
            special_token_ids=[],
            rows_per_shard=max(1, len(state["tokens"])),
        )


def common_rows(one: xr.Dataset, other: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset] | None:
    """Two samples, reduced to the rows of the same places of the same documents; None if there are none, or their
    tokens differ."""
    keys = [
        {key: row for row, key in enumerate(zip(each["document_id"].values, each["offset"].values, strict=True))}
        for each in (one, other)
    ]
    rows = [(row, keys[1][key]) for key, row in keys[0].items() if key in keys[1]]
    if not rows or one.sizes["position"] != other.sizes["position"] or one.sizes["token_id"] != other.sizes["token_id"]:
        return None
    here, there = (each.isel(doc=list(own)) for each, own in zip((one, other), zip(*rows, strict=True), strict=True))
    return (here, there) if np.array_equal(here["token"], there["token"]) else None
