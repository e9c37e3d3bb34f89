"""A sample of documents whose tokens are kept individually, for questions that no table of counts can answer.

Documents are sampled and not tokens, because the questions compare tokens within documents.

Promises: the sample is the same in any order of shards and any chunking, on any number of threads and machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.tokens import layer_index
from analysis.scanning import Array, Block, Reducer, State, sizes
from analysis.statistics.hashing import mixed


class SampledRoutes(Reducer):
    """The tokens of some documents, with all their choices.

    Documents are taken in the order of a hash of their ids, the rows of a document in the order of a hash of their
    place in it, until they hold `size` tokens: all documents except the last are complete.

    Parameters
    ----------
    size : int
        Size of the sample in tokens; it ends with the row that reaches it. All tokens if there are fewer.
    layers : sequence of int, optional
        The model's layer numbers to keep; default all that were captured.

    Raises
    ------
    ValueError
        When `size` is below 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"document_id", "offset"})

    def __init__(self, size: int = 65_536, layers: Sequence[int] | None = None) -> None:
        if size < 1:
            raise ValueError(f"size={size}: must be at least 1")
        self.size, self.layers = size, layers

    def init(self, dataset: xr.Dataset) -> State:
        """Empty: `order`, `document` and `tokens` of rows, `token`, `position` and `expert` of tokens, row by row."""
        index = layer_index(dataset["layer"].values, self.layers)
        return {
            "order": np.zeros((0, 2), np.uint64),
            "document": np.zeros(0, np.int64),
            "tokens": np.zeros(0, np.int64),
            "token": np.zeros(0, np.int64),
            "position": np.zeros(0, np.int64),
            "expert": np.zeros((0, index.size, dataset.sizes["k"]), dataset["expert"].dtype),
            "index": index,
            "of": np.zeros(1, np.int64),
        }

    def update(self, state: State, block: Block) -> None:
        """Add one shard, copying only rows that are still in the sample."""
        tokens, order = block["counted"].sum(axis=1), document_order(block)
        known = len(state["tokens"])
        both = np.concatenate([state["order"], order]), np.concatenate([state["tokens"], tokens])
        row = first_rows(*both, self.size) - known
        row = row[row >= 0]
        state["of"] += tokens.sum()
        if not len(row):
            return
        at, position = np.nonzero(block["counted"][row])
        own = {
            "order": order[row],
            "document": block["document_id"][row].astype(np.int64),
            "tokens": tokens[row],
            "token": block["token"][row[at], position].astype(np.int64),
            "position": position,
            "expert": block["expert"][row[at], position][:, state["index"]],
            "index": state["index"],
            "of": np.zeros(1, np.int64),
        }
        state.update(self.merge(state, own))

    def merge(self, state: State, other: State) -> State:
        """The rows of both that come first."""
        both = {name: np.concatenate([state[name], other[name]]) for name in state if name not in ("index", "of")}
        row = first_rows(both["order"], both["tokens"], self.size)
        tokens = both["tokens"][row]
        start = np.cumsum(both["tokens"])[row] - tokens
        token = np.repeat(start - np.cumsum(tokens) + tokens, tokens) + np.arange(tokens.sum())
        own = {name: both[name][row if name in ("order", "document", "tokens") else token] for name in both}
        return {**own, "index": state["index"], "of": state["of"] + other["of"]}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The tokens: `expert` (token, layer, k); `document_id`, `token_id`, `position` int64 and `piece` (token)."""
        _, choices, experts = sizes(dataset)
        result = xr.Dataset(
            {
                "expert": (("token", "layer", "k"), state["expert"]),
                "document_id": ("token", np.repeat(state["document"], state["tokens"])),
                "token_id": ("token", state["token"]),
                "position": ("token", state["position"]),
            },
            coords={
                "layer": dataset["layer"].values[state["index"]],
                "piece": ("token", dataset["piece"].values.astype(object)[state["token"]]),
            },
        )
        return described(
            result,
            n=len(state["token"]),
            estimator="sample of documents by hash",
            null=choices / experts,
            definition="the tokens of the documents whose hashes are smallest",
            source="bottom-k sketches (Cohen & Kaplan 2007)",
            of=int(state["of"][0]),
            documents=len(np.unique(state["document"])),
            experts=experts,
        )


def document_order(block: Block) -> Array:
    """The sort keys of a shard's rows, uint64 (row, 2): a hash of the document, and one of the place in it."""
    with np.errstate(over="ignore"):
        document = mixed(block["document_id"].astype(np.uint64))
        return np.stack([document, mixed(document + block["offset"].astype(np.uint64))], axis=1)


def first_rows(order: Array, tokens: Array, size: int) -> Array:
    """The first rows in order, until they hold `size` tokens; rows without a token are left out."""
    row = np.lexsort((order[:, 1], order[:, 0]))
    row = row[tokens[row] > 0]
    before = np.cumsum(tokens[row]) - tokens[row]
    first: Array = row[before < size]
    return first
