"""Which token classes, and which tokens, choose an expert more often than their documents explain.

Promises: probabilities come from a sample of whole documents, counts from all that is indexed. Does not know about
sentences.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.explorer.pieces import inline
from analysis.explorer.summary import Kind, apart, kinds_of
from analysis.explorer.view import View
from analysis.metrics.class_experts import class_excess_of
from analysis.metrics.excess import token_excess_of
from analysis.token_classes import SAID


class Excess:
    """What is beyond chance in a data set; what all experts share is computed once.

    Parameters
    ----------
    view : View
        The data set.
    routes : xr.Dataset
        Its sample, from `analysis.SampledRoutes`.
    """

    def __init__(self, view: View, routes: xr.Dataset) -> None:
        self.view = view
        classes, tokens = class_excess_of(routes, view.classes), token_excess_of(routes)
        self.names, self.ids = classes["token_class"].values.tolist(), tokens["token_id"].values
        self.members = np.array([view.classes[name] for name in self.names], bool).reshape(-1, len(view.texts))
        self.of_classes, self.of_tokens = (
            each["p"].values * each["p"].size for each in (classes, tokens)
        )  # Bonferroni

    def kinds(self, layer: int, expert: int) -> tuple[list[Kind], list[Kind]]:
        """The classes and the tokens that an expert gets beyond chance, the most informative first."""
        view, at = self.view, self.view.layers.index(layer)
        count, tokens = view.table(at)[:, expert], view.token_counts
        of = int(count.sum()), int(tokens.sum())
        of_classes = self.of_classes[:, at, expert], self.members @ count, self.members @ tokens
        of_tokens = self.of_tokens[:, at, expert], count[self.ids], tokens[self.ids]
        classes = kinds_of([SAID.get(name, name) for name in self.names], *of_classes, of)
        named = [inline(view.texts[number]) for number in self.ids.tolist()]
        return apart(classes, self.members, count), kinds_of(named, *of_tokens, of)
