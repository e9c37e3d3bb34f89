"""Routes that are given: those of another capture, shard by shard, for the same tokens."""

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
"""Fields of the identity that two captures must share, beside those of the text: which rows there are, of what tokens,
and which choices a model can make. Its weights and what they are computed in may differ."""


@dataclass(frozen=True)
class GivenRoutes:
    """The routes of another capture.

    Parameters
    ----------
    path, dataset
        Where it is; it travels to other machines, which must see it too.
    weights
        Whether the weights of its choices are given too.
    """

    path: str
    dataset: str
    weights: bool = False

    @property
    def identity(self) -> str:
        """The hash of the capture's identity."""
        return identity_hash(self._group.identity)

    def refuse_unfit(self, identity: Mapping[str, Any]) -> None:
        """Refuse a capture that is not whole, or is not of these tokens and this model, before any row is read.

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
                + "\ngive a capture of the same text by the same model, or leave --routes_from out"
            )
        if self.weights and not group.layout.weights:
            raise ValueError(f"{place} holds no weights: leave --routes_weights out")
        if not (state := coverage(self.path, self.dataset)).complete:
            raise ValueError(f"{place} is not complete: {state}. Finish that capture first")

    def of(self, shard: int, rows: Rows) -> Routes:
        """The choices of a shard's rows, and their weights where they are given.

        Raises
        ------
        RoutingError
            When the capture holds other tokens there, or a token without choices; the message names the first.
        """
        group, place = self._group, f"{self.path}/{self.dataset}"
        there = group.read_rows(shard)
        if there.token.shape != rows.token.shape:
            raise RoutingError(
                f"{place} has {len(there.token)} rows in shard {shard}, and {len(rows.token)} are wanted"
            )
        if (other := np.argwhere(there.token != rows.token)).size:
            row, position = other[0].tolist()
            found, wanted = there.token[row, position], rows.token[row, position]
            raise RoutingError(
                f"{place} has other tokens: in row {row} of shard {shard}, {found} at position {position}, and {wanted}"
                " is wanted"
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
