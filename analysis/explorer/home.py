"""The first page: findings in a few computed sentences, and the data sets with their specialists.

Promises: an expert is a specialist only if its interval, simultaneous over all experts, layers and data sets, lies
above those of the other data sets, or above an even share if there is no other; statements about tokens and documents
are counts. Does not know HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.explorer.expert import Profiles
from analysis.explorer.live import Explorer, Shown
from analysis.explorer.view import View

SPECIALISTS = 3  # shown for each data set (arbitrary)
FREQUENT = 0.002  # of the tokens: the least for a token to be named (arbitrary)
TINY = 1e-300  # instead of a share of 0, in a logarithm
ONE_WAY = 0.9  # of a token's occurrences go to one expert: the least for it to be named (arbitrary)


class Home:
    """What the first page shows; recomputed when anything has changed.

    Parameters
    ----------
    explorer : Explorer
        The data sets.
    """

    def __init__(self, explorer: Explorer) -> None:
        self.explorer, self._kept = explorer, ("", dict[str, Any]())

    def page(self) -> dict[str, Any]:
        """`findings` and `cards`."""
        shown = [*self.explorer.shown.values()]
        digests = " ".join(each.digest for each in shown)
        if self._kept[0] != digests:
            known = [each for each in shown if each.view.now.tokens]
            others = {each.view.dataset: self._others(each) for each in known}
            found = {each.view.dataset: specialists(each.profiles, others[each.view.dataset]) for each in known}
            busy = {each.view.dataset: busiest(each.profiles, others[each.view.dataset]) for each in known}
            findings = [*_strongest(found), *_one_way(known), *_unusual(known)]
            self._kept = digests, {"findings": findings, "specialists": found, "busiest": busy}
        cards = [self.explorer.state(each.view.dataset) for each in shown]
        return {"cards": cards, **self._kept[1]}

    def _others(self, own: Shown) -> list[Profiles]:
        """The data sets that can be compared with one."""
        return [each.profiles for each in self.explorer.alike(own) if not each.differs]


def specialists(own: Profiles, others: Sequence[Profiles], most: int = SPECIALISTS) -> list[dict[str, Any]]:
    """The experts that a data set uses more than all others do, the most informative first."""
    view, sets = own.view, 1 + len(others)
    share, low, _ = own.bounds(sets)
    rest, high = np.full_like(share, 1 / view.experts), np.full_like(share, 1 / view.experts)
    if others:
        rest, _, high = np.max([each.bounds(sets) for each in others], axis=0)  # NaN if one is not known
    told = share * np.log2(np.maximum(share, TINY) / np.maximum(rest, TINY))
    told = np.where(low > high, told, 0)
    first = np.argsort(-told, axis=None, kind="stable")[:most]
    at = [divmod(int(cell), view.experts) for cell in first if told.flat[cell] > 0]
    return [
        _said(own, others, *cell) | {"rest": float(rest[cell]), "told": float(told[cell]), "compared": bool(others)}
        for cell in at
    ]


def busiest(own: Profiles, others: Sequence[Profiles], most: int = SPECIALISTS) -> list[dict[str, Any]]:
    """The experts with the largest shares of the choices of their layer."""
    first = np.argsort(-own.load["estimate"].values, axis=None, kind="stable")[:most]
    return [_said(own, others, *divmod(int(cell), own.view.experts)) for cell in first]


def _said(own: Profiles, others: Sequence[Profiles], at: int, expert: int) -> dict[str, Any]:
    """What a card says about an expert."""
    layer = own.view.layers[at]
    return {
        "dataset": own.view.dataset,
        "layer": layer,
        "expert": expert,
        "share": float(own.load["estimate"].values[at, expert]),
        "line": own.summary(layer, expert, others)["line"],
    }


def _strongest(specialists: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The specialist that is most informative about its data set."""
    first = [each[0] for each in specialists.values() if each]
    return [{"kind": "specialist", **max(first, key=lambda each: float(each["told"]))}] if first else []


def _one_way(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """The frequent token that goes most consistently to one expert of a late layer, over all data sets."""
    found = [each for one in shown for each in _surest(one.view)]
    return [max(found, key=lambda each: float(each["share"]))] if found else []


def _surest(view: View) -> list[dict[str, Any]]:
    """The same for one data set, if its tables are kept."""
    frequent = np.flatnonzero(view.token_counts >= max(FREQUENT * view.token_counts.sum(), 1))
    if len(view.tables) < len(view.layers) or not len(frequent):
        return []
    late = len(view.layers) // 2  # the first layers know little more than the token
    share = np.array([view.tables[at][frequent] for at in range(late, len(view.layers))])
    share = share / view.token_counts[frequent, None]
    layer, token, expert = (int(at) for at in np.unravel_index(share.argmax(), share.shape))
    if share[layer, token, expert] < max(ONE_WAY, 2 * view.choices / view.experts):
        return []
    number = int(frequent[token])
    return [
        {
            "kind": "token",
            "dataset": view.dataset,
            "layer": view.layers[late + layer],
            "expert": expert,
            "token": number,
            "text": view.texts[number],
            "count": int(view.token_counts[number]),
            "share": float(share[layer, token, expert]),
            "chance": view.choices / view.experts,
        }
    ]


def _unusual(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """The document that differs most from the others of its data set."""
    found = [one for one in shown if not np.isnan(one.unusual.bits).all()]
    if not found:
        return []
    own = max(found, key=lambda one: float(np.nanmax(one.unusual.bits)))
    view, at = own.view, int(np.nanargmax(own.unusual.bits))
    return [
        {
            "kind": "document",
            "dataset": view.dataset,
            "document": at,
            "name": view.names[at],
            "layer": view.layers[own.unusual.layer[at]],
            "expert": int(own.unusual.expert[at]),
            "share": float(own.unusual.share[at]),
            "rest": float(own.unusual.others[at]),
        }
    ]
