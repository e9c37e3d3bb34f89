"""Which classes of tokens, and which tokens, reach an expert more often than their documents explain.

Promises: how sure is told of a sample of whole documents, how often of all that is indexed. Does not know words.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from analysis.explorer.pieces import inline
from analysis.explorer.summary import Kind, apart, kinds_of
from analysis.explorer.view import View
from analysis.metrics.excess import tail_of, token_excess_of
from analysis.scanning import Array

SAID = {
    "letters": "words",
    "lowercase": "lowercase words",
    "capitalized": "capitalized words",
    "uppercase": "words in capitals",
    "mixed-case": "words of mixed case",
    "word-initial": "beginnings of words",
    "continuation": "rests of words",
}
"""What a class is called in a sentence, where it is not its name."""


class Excess:
    """What is beyond chance in a data set; what all experts need is computed once.

    Parameters
    ----------
    view : View
        The data set.
    routes : xr.Dataset
        Its sample, from `analysis.SampledRoutes`.
    """

    def __init__(self, view: View, routes: xr.Dataset) -> None:
        self.view = view
        self.names, self.members = view.classes
        tokens = token_excess_of(routes)
        self.ids = tokens["token_id"].values
        of_classes, of_tokens = class_excess(routes, self.members), tokens["p"].transpose("token_id", "layer", "expert")
        self.of_classes, self.of_tokens = (p * p.size for p in (of_classes, of_tokens.values))  # Bonferroni

    def kinds(self, layer: int, expert: int) -> tuple[list[Kind], list[Kind]]:
        """The classes and the tokens that an expert gets beyond chance, the one that tells most of it first."""
        view, at = self.view, self.view.layers.index(layer)
        count, tokens = view.table(at)[:, expert], view.token_counts
        of = int(count.sum()), int(tokens.sum())
        of_classes = self.of_classes[:, at, expert], self.members @ count, self.members @ tokens
        of_tokens = self.of_tokens[:, at, expert], count[self.ids], tokens[self.ids]
        classes = kinds_of([SAID.get(name, name) for name in self.names], *of_classes, of)
        named = [inline(view.texts[number]) for number in self.ids.tolist()]
        return apart(classes, self.members, count), kinds_of(named, *of_tokens, of)


def class_excess(routes: xr.Dataset, members: Array) -> Array:
    """How probable it is that so many tokens of each class reach each expert, were they shuffled within documents.

    Parameters
    ----------
    routes : xr.Dataset
        From `analysis.SampledRoutes`.
    members : array, shape (class, token_id), bool
        Which tokens are in each class; they may be in several.

    Returns
    -------
    array, shape (class, layer, expert), float64
        Upper bounds, not adjusted: see `analysis.metrics.excess.token_excess_of`.
    """
    expert = routes["expert"].transpose("layer", "token", "k").values
    tokens, experts = expert.shape[1], int(routes.attrs["experts"])
    own = members[:, routes["token_id"].values].astype(np.float64)  # (class, token)
    document = np.unique(routes["document_id"].values, return_inverse=True)[1]
    there = np.zeros((document.max(initial=-1) + 1, tokens))
    there[document, np.arange(tokens)] = 1
    of_documents = (own @ there.T) / np.maximum(there.sum(1), 1)
    p = np.ones((len(members), len(expert), experts))
    for layer, chosen in enumerate(expert):
        taken = np.zeros((tokens, experts))
        taken[np.arange(tokens)[:, None], chosen] = 1
        p[:, layer] = tail_of(own @ taken, of_documents @ (there @ taken), own.sum(1)[:, None])
    return p
