"""A page of text with its routes, and what the routers computed for one of its tokens.

Promises: read from the store alone, independent of the index; a page costs one chunk of each array. What is not
captured is distinguished from what cannot be read. Does not know HTML.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.explorer.view import View
from analysis.metrics.scores import entropies, probabilities
from analysis.scanning import Array
from store.layout import CHUNK_POSITIONS, LABELS


def document_page(view: View, document: int, page: int = 1) -> dict[str, Any]:
    """One page of a document, counted from 1: its tokens, and what they chose.

    Returns
    -------
    dict
        Besides its names: `texts` and `ids` of its tokens; and base64 of little-endian arrays (token, layer, k):
        `expert`, in the capture's type, whose largest value means "not captured", and `weight`, uint16, in units of
        `scale`. Where they were recorded, base64 of float32: `surprise` (token) of the next token, in nats, and
        `entropy` (token, layer) of the routers, in bits; NaN where not known.

    Raises
    ------
    ValueError
        When there is no such document or page, or its shard cannot be decoded.
    """
    pages = view.pages_of(document)
    if not 1 <= page <= max(1, len(pages)):
        raise ValueError(f"page {page} of document {document}: the document has pages 1 to {max(1, len(pages))}")
    about = {
        "dataset": view.dataset,
        "document": document,
        "name": view.names[document],
        "tokens": int(view.document_tokens[0, document]),
        "page": page,
        "pages": len(pages),
    }
    if not pages:
        return about | _coded(view, *_arrays(view, 0, 0, 0)) | {"row": 0, "start": 0, "offset": 0}
    row, at = pages[page - 1]
    length = view.rows["length"]
    stop = min(int(length[row]), at + CHUNK_POSITIONS)
    before = sum(int(length[other]) for other in {other for other, _ in pages[: page - 1]} - {row})
    return about | _coded(view, *_arrays(view, row, at, stop)) | {"row": row, "start": at, "offset": before + at}


def whole(view: View, document: int) -> dict[str, Any]:
    """A document as one page, of any length.

    Raises
    ------
    ValueError
        As `document_page`.
    """
    pages = [_arrays(view, row, 0, int(view.rows["length"][row])) for row in dict(view.pages_of(document))]
    about = {"dataset": view.dataset, "document": document, "name": view.names[document], "offset": 0}
    if not pages:
        return about | _coded(view, *_arrays(view, 0, 0, 0))
    return about | _coded(view, *(np.concatenate(parts) for parts in zip(*pages, strict=True)))


def distribution(view: View, row: int, position: int) -> dict[str, Any]:
    """What the routers computed for one token.

    Returns
    -------
    dict
        Lists by layer: `experts`, ids; their `probability`; and `chosen`, the ids that the router chose. `of`: the
        experts of a layer, more than are listed if only the largest logits were recorded.

    Raises
    ------
    ValueError
        When there is no such place, it is not captured, or no logits were recorded.
    """
    view.page_at(row, position)
    if view.scores is None:
        raise ValueError(f"{view.dataset} has no distributions: its routers' logits were not recorded")
    logit, expert = (view.read(name, row, position, position + 1)[0] for name in ("logit", "expert"))
    if not view.rows["captured"][row] or np.isnan(logit).any():
        raise ValueError(f"row {row} of {view.dataset} is not captured yet")
    ids = np.tile(np.arange(view.experts), (len(logit), 1))
    if view.scores.truncated:
        ids = view.read("logit_expert", row, position, position + 1)[0]
    return {
        "experts": ids.tolist(),
        "probability": np.round(probabilities(logit, view.scores), 6).tolist(),
        "chosen": expert.tolist(),
        "of": view.experts,
    }


def _measured(view: View, row: int, start: int, stop: int) -> tuple[Array, Array]:
    """Surprise (position) and entropy (position, layer), float32; empty if they were not recorded."""
    surprise, entropy = np.empty(0, np.float32), np.empty((0, len(view.layers)), np.float32)
    if "logprob" in view.capture:
        surprise = -view.read("logprob", row, start, stop)
    if view.scores is not None:
        logit = view.read("logit", row, start, stop)
        entropy = entropies(logit, view.scores.experts, view.scores.sigmoid).astype(np.float32)
    if not view.rows["captured"][row : row + 1].all():
        return np.full_like(surprise, np.nan), np.full_like(entropy, np.nan)
    return surprise, entropy


def _arrays(view: View, row: int, start: int, stop: int) -> tuple[Array, ...]:
    """Tokens, experts, weights, surprise, entropy, speakers and phases for some positions of a row; fill values where
    not captured."""
    token, expert = (view.read(name, row, start, stop) for name in ("token", "expert"))
    weight = view.read("weight", row, start, stop) if "weight" in view.capture else np.ones(expert.shape)
    labels = [view.read(name, row, start, stop) if name in view.capture else np.empty(0, np.uint8) for name in LABELS]
    missing = np.iinfo(expert.dtype).max
    if not view.rows["captured"][row : row + 1].all():  # what a killed worker left is not shown
        expert, weight = np.full_like(expert, missing), np.zeros_like(weight)
    elif (expert == missing).any() and not view.given:
        raise view.unreadable(row, "experts are missing")
    elif len(weight) and not weight.any() and not view.given:
        raise view.unreadable(row, "weights are missing")
    if (token < 0).any() or (token >= len(view.texts)).any():
        raise view.unreadable(row, "tokens are missing")
    return token, expert, weight, *_measured(view, row, start, stop), *labels


def _coded(
    view: View, token: Array, expert: Array, weight: Array, surprise: Array, entropy: Array, *labels: Array
) -> dict[str, Any]:
    scale = float(weight.max(initial=0)) or 1.0
    coded = np.rint(weight.astype(np.float64) * (65_535 / scale)).astype("<u2")
    return {
        "ids": token.tolist(),
        "texts": [view.texts[number] for number in token.tolist()],
        "expert": base64.b64encode(expert.astype(expert.dtype.newbyteorder("<")).tobytes()).decode(),
        "weight": base64.b64encode(coded.tobytes()).decode(),
        "scale": scale / 65_535,
        "bytes": expert.dtype.itemsize,
        "weighed": "weight" in view.capture,
        "roles": _labelled(view, labels),
        "surprise": in_float32(surprise) if "logprob" in view.capture else None,
        "entropy": in_float32(entropy) if view.scores is not None else None,
    }


def _labelled(view: View, labels: Sequence[Array]) -> list[str] | None:
    """Each token's speaker in a conversation, and whether it belongs to the prompt or was generated."""
    named = []
    for name, numbers in zip(LABELS, labels, strict=True):
        if name in view.capture:
            names = view.capture[name].attrs["flag_meanings"].split()
            named.append([names[number] if number < len(names) else "" for number in numbers.tolist()])
    return [", ".join(filter(None, each)) for each in zip(*named, strict=True)] if named else None


def in_float32(values: Array) -> str:
    """Numbers as a page's script reads them: base64 of little-endian float32."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()
