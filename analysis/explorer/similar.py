"""Which experts of other layers are chosen by the same tokens: the correlation of two experts' choices over a sample of
tokens.

Promises: experts without a token in the sample are left out. Does not know which tokens they share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from analysis.scanning import Array


class Similar:
    """The experts of a sample's tokens.

    Parameters
    ----------
    routes : xr.Dataset
        From `analysis.SampledRoutes`.
    """

    def __init__(self, routes: xr.Dataset) -> None:
        self.experts, self.layers = int(routes.attrs["experts"]), routes["layer"].values.tolist()
        self.expert = routes["expert"].transpose("layer", "token", "k").values
        self.counts = self._counts(np.arange(self.expert.shape[1]))

    def of(self, at: int, expert: int, top: int = 8) -> list[dict[str, Any]]:
        """The experts of other layers whose choices correlate with those of an expert at a layer (by index), the most
        similar first.

        `correlation` is Pearson's, of "this token chose it" and "this token chose the other", 1 or 0 (phi; Yule 1912).
        """
        taken = np.flatnonzero((self.expert[at] == expert).any(axis=-1))
        n, own, both = self.expert.shape[1], len(taken), self._counts(taken)
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.sqrt(float(own) * (n - own)) * np.sqrt(self.counts * (n - self.counts))
            correlation = np.nan_to_num((n * both - own * self.counts) / spread)
        correlation[at] = 0
        order = np.argsort(-correlation, axis=None, kind="stable")[:top].tolist()
        cells = [divmod(cell, self.experts) for cell in order]
        return [
            {"layer": self.layers[layer], "expert": other, "correlation": float(correlation[layer, other])}
            for layer, other in cells
            if correlation[layer, other] > 0
        ]

    def _counts(self, tokens: Array) -> Array:
        """How many of some tokens chose each expert: float64 (layer, expert)."""
        flat = (
            self.expert[:, tokens].astype(np.int64) + np.arange(len(self.layers))[:, None, None] * self.experts
        ).ravel()
        counts: Array = np.bincount(flat, minlength=len(self.layers) * self.experts).astype(float)
        return counts.reshape(len(self.layers), self.experts)
