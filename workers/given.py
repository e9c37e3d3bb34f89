"""Routes that are given to a model: those of another capture for the same tokens, shard by shard."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from store.coverage import coverage
from store.group import CaptureGroup
from store.identity import LATER, TEXT, differences, identity_hash
from store.plan import Rows
from workers.shard import Routes, RoutingError

SAME = {*TEXT, "tokenizer", "model", "layers", "num_experts", "experts_per_token"} - {
    *("record", "top_logits", "weight_bits", "effect_layers", "batch_tokens", "schema_version"),
}
"""Fields of the identity that two captures must share, besides those of the text: the rows, their tokens, and the
choices that a model can make. The weights and the precision of the computation may differ."""


@dataclass(frozen=True)
class GivenRoutes:
    """The routes of another capture.

    Parameters
    ----------
    path, dataset
        Where the capture is. Other machines receive this path and must be able to read it too.
    weights
        Whether the weights of its choices are given as well.
    """

    path: str
    dataset: str
    weights: bool = False

    @property
    def identity(self) -> str:
        """The hash of the capture's identity."""
        return identity_hash(self._group.identity)

    def refuse_unfit(self, identity: Mapping[str, Any]) -> None:
        """Reject a capture that is incomplete, or of other tokens or another model, before any row is read.

        Raises
        ------
        ValueError, FileNotFoundError
            The message names every field of the identities that differs.
        """
        group, place = self._group, f"--routes_from {self.path}/{self.dataset}"
        stored, wanted = (
            {name: value for name, value in (LATER | dict(side)).items() if name in SAME or name.startswith("text_")}
            for side in (group.identity, identity)
        )
        if lines := differences(stored, wanted):
            raise ValueError(
                f"{place} holds routes of other tokens, or of another model:\n  "
                + "\n  ".join(lines)
                + "\nuse a capture of the same text by the same model, or omit --routes_from"
            )
        if self.weights and not group.layout.weights:
            raise ValueError(f"{place} holds no weights: omit --routes_weights")
        if not (state := coverage(self.path, self.dataset)).complete:
            raise ValueError(f"{place} is not complete: {state}. Finish that capture first")

    def of(self, shard: int, rows: Rows) -> Routes:
        """The choices of a shard's rows, and their weights if these are given too.

        Raises
        ------
        RoutingError
            When the capture holds other tokens there, or a token without choices; the message names the first.
        """
        group, place = self._group, f"{self.path}/{self.dataset}"
        there = group.read_rows(shard)
        if there.token.shape != rows.token.shape:
            raise RoutingError(
                f"{place} has {len(there.token)} rows in shard {shard}, but {len(rows.token)} are needed"
            )
        if (other := np.argwhere(there.token != rows.token)).size:
            row, position = other[0].tolist()
            found, wanted = there.token[row, position], rows.token[row, position]
            raise RoutingError(
                f"{place} has other tokens: row {row} of shard {shard} has {found} at position {position}, but {wanted}"
                " is needed"
            )
        span = group.span(shard, group.plan)
        routes = {name: group.values(name, *span) for name in ("expert", *["weight"] * self.weights)}
        unknown = (routes["expert"] == group.layout.missing_expert).any(axis=(2, 3)) & (rows.token >= 0)
        if unknown.any():
            row, position = np.argwhere(unknown)[0].tolist()
            raise RoutingError(f"{place} has no choices in row {row} of shard {shard} at position {position}")
        return routes

    @property
    def _group(self) -> CaptureGroup:
        return CaptureGroup(self.path, self.dataset)
