"""Routes compared with a capture of the same tokens: the best shift, the agreement there, and what near-ties explain.

The first rows of documents are compared, up to the shorter one: there, a token has the same preceding text in both,
however rows are split. Choices are compared as sets, because engines do not guarantee an order. Does not know which of
the two is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from analysis.scanning import Array

POSITIONS, LAYERS = range(-4, 5), range(-3, 4)  # shifts that are tried
SAMPLED = 16_384  # approximate number of tokens compared: whole documents, in order
AGREES = 0.995  # of all choices
ROUNDED = 0.8  # of all choices, and of the differing tokens that near-ties explain (arbitrary)
CLEARLY = 0.2  # how much better a shift must fit than no shift (arbitrary)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """First rows of documents."""

    layers: Sequence[int]
    """Layers, by the model's own numbers."""
    document: Array
    """Ids (rows), ascending."""
    token: Array
    """(rows, P); -1 after the last one."""
    expert: Array
    """(rows, P, layers, k); -1 if not known."""
    weight: Array | None
    """Like `expert`."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How two sets of routes agree."""

    verdict: str
    position: int
    """The best shift: a token's routes are those of the reference's token so many places after it."""
    layer: int
    """Layer l has the choices of the reference's layer l + `layer`."""
    agreement: float
    """Share of choices at that shift whose k experts are the same, over all tokens and layers."""
    unshifted: float
    """The same without a shift."""
    chance: float
    """The value expected for two unrelated sets of experts with the same loads."""
    tokens: int
    """Tokens compared at the best shift."""
    documents: int
    differing: int
    """Tokens that differ at some layer."""
    explained: float | None
    """The share of these that a near-tie explains: at the first layer that differs, only the reference's choice with
    the smallest weight is different. None if no token differs, or the reference has no weights."""


def first_rows(capture: xr.Dataset, most_documents: int | None = None) -> Texts:
    """The first row of each document, up to about `SAMPLED` tokens, read from a capture.

    Parameters
    ----------
    capture : xr.Dataset
        From `store.open_capture`; rows that are not captured are left out.
    most_documents
        The most documents to read.

    Returns
    -------
    Texts
        In the order of documents.

    Raises
    ------
    ValueError
        When there is no such row.
    """
    captured = capture["captured"].values if "captured" in capture else True
    rows = np.flatnonzero((capture["offset"].values == 0) & captured)[:most_documents]
    lengths = capture["length"].values[rows]
    enough = int(np.searchsorted(lengths.cumsum(), SAMPLED)) + 1
    own = capture.isel(doc=rows[:enough], position=slice(int(lengths[:enough].max(initial=0))))
    if not own.sizes["doc"]:
        raise ValueError(f"{capture.attrs.get('dataset', 'the capture')} has no captured first row of a document")
    expert = own["expert"].values
    known = (expert != np.iinfo(expert.dtype).max).all((2, 3)) & (
        np.arange(expert.shape[1]) < own["length"].values[:, None]
    )
    return Texts(
        layers=own["layer"].values.tolist(),
        document=own["document_id"].values,
        token=own["token"].values,
        expert=np.where(known[..., None, None], expert.astype(np.int32), -1),
        weight=own["weight"].values.astype(np.float32) if "weight" in own else None,
    )


def align(own: Texts, reference: Texts, experts: int) -> Alignment:
    """Compare routes with a reference's, at all shifts.

    Parameters
    ----------
    own, reference
        Routes of the same texts.
    experts
        The number of experts of a layer, E.

    Returns
    -------
    Alignment
        The best shift, and a verdict: "agrees"; "agrees but for rounding"; "shifted by ..."; "not the same model".

    Raises
    ------
    ValueError
        When they have no document in common, different tokens, or a different k.
    """
    if own.expert.shape[3] != reference.expert.shape[3]:
        raise ValueError(
            f"{own.expert.shape[3]} experts per token cannot be compared with {reference.expert.shape[3]}: import the"
            " choices of the model"
        )
    own, reference = _in_common(own, reference)
    ours, theirs = np.sort(own.expert, axis=-1), np.sort(reference.expert, axis=-1)
    found = {
        (position, layer): _agreement(ours, theirs, own.layers, reference.layers, position, layer)
        for position in POSITIONS
        for layer in LAYERS
    }
    position, layer = max(found, key=lambda shift: (found[shift], -abs(shift[0]) - abs(shift[1])))
    best, unshifted = found[position, layer], found[0, 0]
    differing, explained, tokens = _explained(own, reference, position, layer)
    return Alignment(
        verdict=_verdict(position, layer, best, unshifted, explained),
        position=position,
        layer=layer,
        agreement=best,
        unshifted=unshifted,
        chance=_chance(ours, theirs, experts),
        tokens=tokens,
        documents=len(own.document),
        differing=differing,
        explained=explained,
    )


def _verdict(position: int, layer: int, best: float, unshifted: float, explained: float | None) -> str:
    shifted = (position, layer) != (0, 0) and best - unshifted >= CLEARLY
    share = best if shifted else unshifted
    if share < ROUNDED or (share < AGREES and explained is not None and explained < ROUNDED):
        return "not the same model"
    if shifted:
        by = [f"{abs(number)} {what}{'s' * (abs(number) > 1)} {'later' if number < 0 else 'earlier'}"
              for number, what in ((position, "token"), (layer, "layer")) if number]  # fmt: skip
        return f"shifted by {' and '.join(by)}"
    return "agrees" if share >= AGREES else "agrees but for rounding"


def _in_common(own: Texts, reference: Texts) -> tuple[Texts, Texts]:
    """The documents that both have, up to the end of the shorter row."""
    document, here, there = np.intersect1d(own.document, reference.document, return_indices=True)
    if not len(document):
        raise ValueError("the two have no document in common")
    width = min(own.token.shape[1], reference.token.shape[1])
    both = [_cut(texts, rows, width) for texts, rows in ((own, here), (reference, there))]
    tokens, others = (texts.token for texts in both)
    differ = (tokens >= 0) & (others >= 0) & (tokens != others)
    if differ.any():
        row, at = np.argwhere(differ)[0]
        raise ValueError(
            f"the two hold different texts: at position {at} of document {document[row]}, the tokens are"
            f" {tokens[row, at]} and {others[row, at]}"
        )
    return both[0], both[1]


def _cut(texts: Texts, rows: Array, width: int) -> Texts:
    weight = None if texts.weight is None else texts.weight[rows, :width]
    return Texts(
        layers=texts.layers,
        document=texts.document[rows],
        token=texts.token[rows, :width],
        expert=texts.expert[rows, :width],
        weight=weight,
    )


def _paired(own: Sequence[int], reference: Sequence[int], layer: int) -> list[tuple[int, int]]:
    """Indices of matching layers if the reference's numbers are larger by `layer`."""
    place = {number: at for at, number in enumerate(reference)}
    return [(at, place[number + layer]) for at, number in enumerate(own) if number + layer in place]


def _windows(position: int, width: int) -> tuple[slice, slice]:
    """Matching positions of both."""
    here = slice(max(0, -position), width - max(0, position))
    return here, slice(here.start + position, here.stop + position)


def _agreement(
    ours: Array, theirs: Array, own: Sequence[int], reference: Sequence[int], position: int, layer: int
) -> float:
    """Share of equal sets of experts at a shift; 0 if less than half of the layers overlap."""
    pairs = _paired(own, reference, layer)
    here, there = _windows(position, ours.shape[1])
    if 2 * len(pairs) < min(len(own), len(reference)) or here.stop <= here.start:
        return 0.0
    one = ours[:, here][:, :, [at for at, _ in pairs]]
    other = theirs[:, there][:, :, [at for _, at in pairs]]
    known = (one[..., 0] >= 0) & (other[..., 0] >= 0)
    return float((one == other).all(-1)[known].mean()) if known.any() else 0.0


def _explained(own: Texts, reference: Texts, position: int, layer: int) -> tuple[int, float | None, int]:
    """Tokens that differ at any layer, the share of them that near-ties explain, and how many were compared."""
    pairs = _paired(own.layers, reference.layers, layer)
    here, there = _windows(position, own.token.shape[1])
    one = own.expert[:, here][:, :, [at for at, _ in pairs]]
    other = reference.expert[:, there][:, :, [at for _, at in pairs]]
    known = (one[:, :, 0, 0] >= 0) & (other[:, :, 0, 0] >= 0)
    one, other = one[known], other[known]  # (token, layer, k)
    differs = (np.sort(one, -1) != np.sort(other, -1)).any(-1)
    some = differs.any(1)
    if reference.weight is None or not some.any():
        return int(some.sum()), None, len(one)
    first = differs[some].argmax(1)
    rows = np.arange(len(first))
    mine, its = one[some][rows, first], other[some][rows, first]
    weight = reference.weight[:, there][:, :, [at for _, at in pairs]][known][some][rows, first]
    lost = ~(its[:, :, None] == mine[:, None, :]).any(-1)  # the reference's experts that were not chosen here
    smallest = np.arange(its.shape[1]) == weight.argmin(-1)[:, None]
    return int(some.sum()), float((lost == smallest).all(-1).mean()), len(one)


def _chance(ours: Array, theirs: Array, experts: int) -> float:
    """The agreement of two unrelated sets: choices at the same layers, of unrelated tokens."""
    layers = min(ours.shape[2], theirs.shape[2])
    known = (ours[..., 0, 0] >= 0) & (theirs[..., 0, 0] >= 0)
    one, other = ours[known][:, :layers], theirs[known][:, :layers]
    order = np.random.default_rng(experts).permutation(len(other))
    return float((one == other[order]).all(-1).mean())
