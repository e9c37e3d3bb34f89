"""Turn sequences into the blocks of rows that `store.write_capture` takes: windows of P positions, padded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.imports.sequence import Routed, phases, unknown_phases, whole

BLOCK_POSITIONS = 32_768  # in a block of at least one row; kept in memory in addition to the shard (arbitrary)
SEQUENCE_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
LOOKED_AT = 1000  # sequences; captures look at the same number of documents

Tokenize = Callable[[str], NDArray[np.integer]]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What the rows have in common."""

    positions: int
    layers: tuple[int, ...]
    """The model's own numbers of the layers that are kept."""
    missing_expert: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the sequences say about the grid."""

    positions: int
    layers: int
    choices: int
    weights: bool
    phases: bool


def shape_of(sequences: Iterable[Routed], tokenize: Tokenize | None) -> Shape:
    """Look at the first sequences. P is the smallest power of two from 16 to 2,048 that holds the longest of them.

    Raises
    ------
    ValueError
        When there are no sequences.
    """
    first, longest = None, 0
    for routed in islice(sequences, LOOKED_AT):
        own = tokenized(routed, tokenize)
        first = first or own
        longest = max(longest, 0 if own.token is None else len(own.token))
        if longest > SEQUENCE_LENGTHS[-2]:  # further sequences make no difference
            break
    if first is None:
        raise ValueError("the files hold no sequences: there is nothing to import")
    return Shape(
        positions=min((length for length in SEQUENCE_LENGTHS if length >= longest), default=SEQUENCE_LENGTHS[-1]),
        layers=first.expert.shape[1],
        choices=first.expert.shape[2],
        weights=first.weight is not None,
        phases=phases(first) is not None,
    )


def tokenized(routed: Routed, tokenize: Tokenize | None) -> Routed:
    """A checked sequence with its token ids. A sequence with a text is tokenized.

    Raises
    ------
    ValueError
        When it has a text and there is no tokenizer, or its parts do not fit.
    """
    if routed.token is None:
        if tokenize is None or routed.text is None:
            raise ValueError(f"sequence {routed.name} has a text instead of token ids: give --tokenizer")
        routed = replace(routed, token=tokenize(routed.text))
    return whole(routed)


def blocks(sequences: Iterable[Routed], shape: Shape, grid: Grid) -> Iterator[dict[str, NDArray[Any]]]:
    """Blocks for `store.write_capture`; sequences without a token are left out.

    Parameters
    ----------
    sequences
        Sequences with token ids.
    shape
        The shape of the first sequences: either all must have weights, or none.
    grid
        P and the layers to keep.

    Raises
    ------
    ValueError
        When a sequence differs from the first ones in layers, k or weights, or knows only some of a token's experts.
    """
    slots = slots_of(shape.layers, grid.layers)
    rows_at_once, waiting = max(1, BLOCK_POSITIONS // grid.positions), list[tuple[int, Routed, int]]()
    for document, routed in enumerate(each for each in sequences if each.token is not None and len(each.token)):
        _refuse_other(routed, shape)
        assert routed.token is not None
        for start in range(0, len(routed.token), grid.positions):
            waiting.append((document, routed, start))
            if len(waiting) == rows_at_once:
                yield _block(waiting, shape, grid, slots)
                waiting = []
    if waiting:
        yield _block(waiting, shape, grid, slots)


def ahead(blocks: Iterator[dict[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[Any]]]:
    """The same blocks; the next one is read while one is written."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield block


def slots_of(found: int, layers: Sequence[int]) -> NDArray[np.integer]:
    """Indices of the kept layers among those of a file, which has all of the model's layers or only those with experts.

    Raises
    ------
    ValueError
        When the file's layers can be neither.
    """
    if found == len(layers):
        return np.arange(found)
    if found > max(layers):
        return np.asarray(layers)
    raise ValueError(
        f"routes have {found} layers, but the model has experts at {len(layers)}, numbered {min(layers)} to"
        f" {max(layers)}: give --layers as they are numbered in the files"
    )


def _refuse_other(routed: Routed, shape: Shape) -> None:
    here = (routed.expert.shape[1], routed.expert.shape[2], routed.weight is not None)
    first = (shape.layers, shape.choices, shape.weights)
    if here != first:
        raise ValueError(
            f"sequence {routed.name} has {here[0]} layers, {here[1]} experts per token and"
            f" {'weights' if here[2] else 'no weights'}; the sequences before it have {first[0]}, {first[1]} and"
            f" {'weights' if first[2] else 'none'}"
        )


def _block(
    waiting: Sequence[tuple[int, Routed, int]], shape: Shape, grid: Grid, slots: NDArray[np.integer]
) -> dict[str, NDArray[Any]]:
    rows = len(waiting), grid.positions
    choices = (*rows, len(grid.layers), shape.choices)
    expert = np.full(choices, grid.missing_expert, np.min_scalar_type(grid.missing_expert))
    token, length = np.full(rows, -1, np.int32), np.zeros(rows[0], np.int32)
    weight = np.zeros(choices, np.float32) if shape.weights else None
    phase = np.full(rows, unknown_phases(1)[0], np.uint8)
    for row, (_, routed, start) in enumerate(waiting):
        assert routed.token is not None
        ids = routed.token[start : start + grid.positions]
        token[row, : len(ids)], length[row] = ids, len(ids)
        if (known := phases(routed)) is not None:
            phase[row, : len(ids)] = known[start : start + len(ids)]
        low = max(start, routed.start)  # of the tokens with routes
        some = slice(low - routed.start, max(low, start + len(ids)) - routed.start)
        own = routed.expert[some]
        place = slice(low - start, low - start + len(own))
        expert[row, place] = _legal(routed, own if len(slots) == own.shape[1] else own[:, slots], grid.missing_expert)
        if weight is not None and routed.weight is not None:
            weight[row, place] = routed.weight[some][:, slots]
    if weight is not None:
        _sort(expert, weight)
    named = np.array([routed.name for _, routed, _ in waiting], dtype=object)
    documents = np.array([document for document, _, _ in waiting], dtype=np.int64)
    block: dict[str, NDArray[Any]] = {"token": token, "expert": expert, "length": length}
    block |= {"document_id": documents, "name": named}
    block |= {"phase": phase} if shape.phases else {}
    return block if weight is None else {**block, "weight": weight}


def _legal(routed: Routed, expert: NDArray[np.integer], missing: int) -> NDArray[np.integer]:
    """Ids in which the store's value stands for unknown ones."""
    if (largest := int(expert.max(initial=0))) > missing:
        raise ValueError(f"sequence {routed.name} names expert {largest}, which is above the largest supported number")
    if expert.dtype.kind == "u":
        return expert
    negative = np.asarray(expert < 0)
    if not negative.any():
        return expert
    unknown = negative.all(axis=(1, 2))
    if len(torn := np.flatnonzero(negative.any(axis=(1, 2)) & ~unknown)):
        at = int(torn[0])
        raise ValueError(
            f"sequence {routed.name} knows only some of a token's experts: {expert[at].tolist()!r:.80}; -1 must stand"
            " for all experts of a token if they are not known"
        )
    found: NDArray[np.integer] = np.where(np.expand_dims(unknown, (1, 2)), missing, expert)
    return found


def _sort(expert: NDArray[np.integer], weight: NDArray[np.floating]) -> None:
    """Sort each token's choices by descending weight, ties by the lower id, in place."""
    less = np.diff(weight, axis=-1)
    if ((less < 0) | ((less == 0) & (np.diff(expert, axis=-1) >= 0))).all():
        return
    by_id = np.argsort(expert, axis=-1, kind="stable")
    ordered = np.take_along_axis(weight, by_id, -1)
    order = np.take_along_axis(by_id, np.argsort(-ordered, axis=-1, kind="stable"), -1)
    expert[...], weight[...] = np.take_along_axis(expert, order, -1), np.take_along_axis(weight, order, -1)
