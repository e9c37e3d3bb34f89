"""One pass over routes, a shard at a time: the counts and samples that `analysis.doctor.faults` needs.

Promises: nothing is left out, neither special tokens nor ids out of range; memory does not grow with the routes, except
for 40 bytes per stretch of 16 tokens and a few numbers per document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from analysis.scanning import Array, kernel, shards_to_read

STRETCH = 16  # tokens whose routes are compared with earlier ones: a block of a server's cache
SHORTEST = 6  # the least number of tokens in a last stretch that is compared (arbitrary)
SAMPLED = 16_384  # tokens used to compare layers with each other
WEIGHT_ROUNDING = 2e-3  # relative error of a sum of 16-bit weights


@dataclass(kw_only=True)
class Looked:
    """The counts; `layers` are the model's own numbers, and arrays follow their order."""

    layers: list[int]
    experts: int
    choices: int
    model: str
    ordered: bool
    """Whether a token's first choice has its largest weight."""
    weighed: bool
    rows: int = 0
    tokens: int = 0
    """Tokens with routes."""
    pairs: int = 0
    """Pairs of neighbouring tokens with routes."""
    illegal: Array = field(default_factory=lambda: np.zeros(0))
    """Tokens with an expert id out of range (layer)."""
    twice: Array = field(default_factory=lambda: np.zeros(0))
    """Tokens with an expert twice, without those of only zeros (layer)."""
    zero: Array = field(default_factory=lambda: np.zeros(0))
    """Tokens of only zeros (layer)."""
    changes: Array = field(default_factory=lambda: np.zeros(0))
    """Pairs of neighbouring tokens with different choices (layer, k)."""
    count: Array = field(default_factory=lambda: np.zeros(0))
    """Choices (layer, expert)."""
    same: Array = field(default_factory=lambda: np.zeros(0))
    """Sampled tokens with equal choices at two layers (layer, layer)."""
    shifted: Array = field(default_factory=lambda: np.zeros(0))
    """Sampled pairs of neighbouring tokens where the second one's choices at a layer are the first one's at another
    layer."""
    sampled: int = 0
    sampled_pairs: int = 0
    totals: Array = field(default_factory=lambda: np.zeros(0))
    """Smallest and largest sum of a token's weights (layer, 2)."""
    negative: Array = field(default_factory=lambda: np.zeros(0))
    """Tokens with a negative weight, or weights not in descending order (layer)."""
    first_rows: dict[str, list[int]] = field(default_factory=dict)
    """The first rows with illegal ids, experts twice and zeros."""
    stretches: list[Array] = field(default_factory=list)
    """For stretches whose routes change within them: the hash of the routes, the hashes of the two halves of the
    tokens, row and position."""
    last: list[Array] = field(default_factory=list)
    """For each document's last token that has routes: row, id, hash of its routes, whether they are zeros, and whether
    they are those of the previous token, which has a different id."""
    ends: list[Array] = field(default_factory=list)
    """For each row: the id at its start and how often it is repeated there, and the same at its end."""
    token_count: Array = field(default_factory=lambda: np.zeros(0))
    """Occurrences (token_id)."""
    restarts: Array = field(default_factory=lambda: np.zeros(2, np.int64))
    """Generated tokens with the routes of the prompt token at the same place, which has a different id; and the number
    of all such places."""
    restarted: list[int] = field(default_factory=list)
    """Rows where this holds for all of them."""

    def share(self, counted: Array) -> Array:
        """Counts as a share of the tokens with routes."""
        return np.asarray(counted / max(1, self.tokens))


def look(capture: xr.Dataset, progress: Callable[[int, int], None] = lambda done, total: None) -> Looked:
    """Read routes once.

    Parameters
    ----------
    capture : xr.Dataset
        From `store.open_capture`, or in memory; `weight` and `phase` are read if present.
    progress
        Called with (shards done, shards in all).

    Returns
    -------
    Looked
        The counts.

    Raises
    ------
    ValueError
        When a shard cannot be decoded.
    """
    layers, choices = capture["layer"].values.tolist(), capture.sizes["k"]
    experts, number = int(capture.attrs["num_experts"]), len(layers)
    looked = Looked(
        layers=layers,
        experts=experts,
        choices=choices,
        model=str(capture.attrs.get("model", "")),
        ordered=capture.attrs.get("order_of_choices") != "as given",
        weighed="weight" in capture,
        illegal=np.zeros(number, np.int64),
        twice=np.zeros(number, np.int64),
        zero=np.zeros(number, np.int64),
        changes=np.zeros((number, choices), np.int64),
        count=np.zeros((number, experts), np.int64),
        same=np.zeros((number, number), np.int64),
        shifted=np.zeros((number, number), np.int64),
        totals=np.stack([np.full(number, np.inf), np.full(number, -np.inf)], axis=1),
        negative=np.zeros(number, np.int64),
        token_count=np.zeros(capture.sizes["token_id"], np.int64),
    )
    names = [name for name in ("expert", "token", "weight", "phase") if name in capture]
    variables = xr.Dataset({name: capture[name].variable for name in names})
    length, document = capture["length"].values, capture["document_id"].values
    shards = shards_to_read(capture)
    for done, rows in enumerate(shards, 1):
        block = variables.isel(doc=rows).load(scheduler="synchronous")
        own = {name: np.ascontiguousarray(block[name].values) for name in names}
        ends = np.append(document[rows][1:], document[rows.stop] if rows.stop < len(document) else -1)
        _add(looked, own, length[rows], document[rows] != ends, rows.start)
        progress(done, len(shards))
    return looked


def _add(looked: Looked, block: dict[str, Array], length: Array, ends: Array, first: int) -> None:
    """Add one shard; `ends` says which rows are the last of their documents."""
    expert, token = block["expert"], block["token"]
    known = expert[:, :, 0, 0] != np.iinfo(expert.dtype).max
    known &= np.arange(known.shape[1]) < length[:, None]
    found = np.zeros((3, len(expert)), np.int64)  # rows with illegal ids, experts twice, zeros
    sums = (looked.illegal, looked.twice, looked.zero, looked.changes, looked.count)
    looked.pairs += int(_count(expert, known, looked.experts, *sums, found))
    looked.tokens, looked.rows = looked.tokens + int(known.sum()), looked.rows + len(expert)
    for name, of_rows in zip(("illegal", "twice", "zero"), found, strict=True):
        rows = looked.first_rows.setdefault(name, [])
        rows += (first + np.flatnonzero(of_rows)[: max(0, 5 - len(rows))]).tolist()
    ids = token[known & (token >= 0) & (token < len(looked.token_count))]
    looked.token_count += np.bincount(ids, minlength=len(looked.token_count))
    if looked.sampled < SAMPLED:
        some = int(np.searchsorted(known.sum(1).cumsum(), SAMPLED - looked.sampled)) + 1
        pairs = _compare(expert[:some], known[:some], looked.same, looked.shifted)
        looked.sampled, looked.sampled_pairs = looked.sampled + int(known[:some].sum()), looked.sampled_pairs + pairs
    if "weight" in block:
        _weigh(block["weight"], known, looked)
    hashes, ids_hash = _hashes(expert), _mixed(token.astype(np.uint64))
    looked.stretches.append(_stretches(hashes, ids_hash, known, first))
    looked.last.append(_last(expert, token, hashes, known, ends, first))
    looked.ends.append(_ends(token, length))
    if "phase" in block:
        _restarts(looked, hashes, token, block["phase"], known, first)


def _mixed(values: Array) -> Array:
    """Mix bits: the finalizer of splitmix64."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def _hashes(expert: Array) -> Array:
    """A hash of each token's routes, at all layers: uint64 (row, position)."""
    flat = expert.reshape(*expert.shape[:2], -1)
    factors = _mixed(np.arange(1, flat.shape[2] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    with np.errstate(over="ignore"):
        total = np.zeros(flat.shape[:2], np.uint64)
        for index, factor in enumerate(factors | np.uint64(1)):
            total += (flat[:, :, index].astype(np.uint64) + np.uint64(1)) * factor
        return _mixed(total)


def _stretches(routes: Array, ids: Array, known: Array, first: int) -> Array:
    """Hashes of each `STRETCH` of tokens from a row's start, and of a row's last tokens: (stretch, 5)."""
    found = []
    positions = routes.shape[1]
    for start in range(0, positions, STRETCH):
        some = slice(start, min(start + STRETCH, positions))
        valid = known[:, some]
        tokens = valid.sum(1)
        order = _mixed(np.arange(1, valid.shape[1] + 1, dtype=np.uint64))
        with np.errstate(over="ignore"):
            own = ((routes[:, some] * order) * valid).sum(1, dtype=np.uint64)
            text = (ids[:, some] * order) * valid
            half = STRETCH // 2
            halves = [part.sum(1, dtype=np.uint64) for part in (text[:, :half], text[:, half:])]
        moving = ((routes[:, some][:, 1:] != routes[:, some][:, :-1]) & valid[:, 1:]).sum(1) >= SHORTEST - 1
        rows = np.flatnonzero((tokens >= SHORTEST) & moving)
        place = np.stack([(first + rows).astype(np.uint64), np.full(len(rows), start, np.uint64)], axis=1)
        found.append(np.concatenate([np.stack([own, *halves], axis=1)[rows], place], axis=1))
    return np.concatenate(found)


def _last(expert: Array, token: Array, hashes: Array, known: Array, ends: Array, first: int) -> Array:
    rows = np.flatnonzero(ends & known.any(1))
    at = known.shape[1] - 1 - known[rows, ::-1].argmax(1)
    before = np.maximum(at - 1, 0)
    zeros = (expert[rows, at] == 0).all((1, 2))
    repeats = (at > 0) & (hashes[rows, at] == hashes[rows, before]) & (token[rows, at] != token[rows, before])
    columns = (first + rows, token[rows, at], hashes[rows, at], zeros, repeats)
    return np.stack([column.astype(np.uint64) for column in columns], axis=1)


def _ends(token: Array, length: Array) -> Array:
    """(row, 4): id and number of repetitions, at the start and at the end."""
    positions, rows = np.arange(token.shape[1]), np.arange(len(token))
    filled = positions < length[:, None]
    start, end = token[:, 0], token[rows, length - 1]
    other = ~((token == start[:, None]) & filled)
    leading = np.where(other.any(1), other.argmax(1), length)
    other = (token != end[:, None]) & filled
    trailing = np.where(other.any(1), length - 1 - (token.shape[1] - 1 - other[:, ::-1].argmax(1)), length)
    return np.stack([start, leading, end, trailing], axis=1).astype(np.int64)


def _restarts(looked: Looked, hashes: Array, token: Array, phase: Array, known: Array, first: int) -> None:
    generated = phase == 1
    for row in np.flatnonzero((phase[:, 0] == 0) & generated.any(1)):
        prompt = int(generated[row].argmax())
        size = min(prompt, int(known[row].sum()) - prompt)
        if size < 1:
            continue
        there = slice(prompt, prompt + size)
        both = known[row, there] & known[row, :size] & (token[row, there] != token[row, :size])
        equal = int((both & (hashes[row, there] == hashes[row, :size])).sum())
        looked.restarts += np.array([equal, int(both.sum())])
        if equal and equal == both.sum() and len(looked.restarted) < 5:
            looked.restarted.append(first + int(row))


def _weigh(weight: Array, known: Array, looked: Looked) -> None:
    own = weight[known].astype(np.float32)
    if not len(own):
        return
    total = own.sum(-1)
    looked.totals[:, 0] = np.minimum(looked.totals[:, 0], total.min(0))
    looked.totals[:, 1] = np.maximum(looked.totals[:, 1], total.max(0))
    wrong = (own < 0).any(-1) | ~np.isfinite(own).all(-1)
    if looked.ordered:
        wrong |= (np.diff(own, axis=-1) > 0).any(-1)
    looked.negative += wrong.sum(0)


@kernel
def _count(
    expert: Array,
    known: Array,
    experts: int,
    illegal: Array,
    twice: Array,
    zero: Array,
    changes: Array,
    count: Array,
    found: Array,
) -> int:
    """Add one shard's tokens; returns the number of known pairs of neighbouring tokens."""
    rows, positions, layers, choices = expert.shape
    pairs = 0
    for row in range(rows):
        for position in range(positions):
            if not known[row, position]:
                continue
            before = position > 0 and known[row, position - 1]
            pairs += before
            for layer in range(layers):
                wrong, again, zeros = False, False, True
                for k in range(choices):
                    own = expert[row, position, layer, k]
                    zeros = zeros and own == 0
                    if own >= experts:
                        wrong = True
                    else:
                        count[layer, own] += 1
                    for other in range(k):
                        again = again or expert[row, position, layer, other] == own
                    changes[layer, k] += before and expert[row, position - 1, layer, k] != own
                illegal[layer] += wrong
                zero[layer] += zeros
                twice[layer] += again and not zeros
                found[0, row] += wrong
                found[1, row] += again and not zeros
                found[2, row] += zeros
    return pairs


@kernel
def _compare(expert: Array, known: Array, same: Array, shifted: Array) -> int:
    """Add the tokens at which two layers have equal choices, and the same for neighbouring tokens; returns the number
    of pairs."""
    rows, positions, layers, choices = expert.shape
    pairs = 0
    for row in range(rows):
        for position in range(positions):
            if not known[row, position]:
                continue
            before = position > 0 and known[row, position - 1]
            pairs += before
            for layer in range(layers):
                for other in range(layers):
                    equal, moved = True, before
                    for k in range(choices):
                        own = expert[row, position, layer, k]
                        equal = equal and expert[row, position, other, k] == own
                        moved = moved and expert[row, position - 1, other, k] == own
                    same[layer, other] += equal
                    shifted[layer, other] += moved
    return pairs
