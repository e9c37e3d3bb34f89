"""The loops that simulate caches of experts: LRU and Belady caches of all sizes in one pass over a row, other caches
one by one.

The convention is that of `analysis.metrics.caching`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from analysis.scanning import Array, kernel

LRU, LFU, BELADY, SEGMENT = range(
    4
)  # rules, numbered as in the kernel; the first three as in `analysis.metrics.caching.POLICIES`
FEW = 8  # experts whose order fits in 64 bits
ONES = np.array([number.bit_count() for number in range(256)])


@kernel
def add_hits(
    expert: Array,
    counted: Array,
    rules: Array,
    capacities: Array,
    experts: Array,
    hits: Array,
    others: Array,
    scored: Array,
) -> None:
    rows, positions, layers, choices = expert.shape
    chosen, where, follows = (
        np.empty((positions, choices), np.int64),
        np.empty(positions, np.int64),
        np.empty(positions, np.bool_),
    )
    for row in range(rows):
        tokens = 0
        for position in range(positions):
            if counted[row, position]:
                where[tokens], follows[tokens] = position, tokens > 0 and where[tokens - 1] == position - 1
                scored[tokens] += follows[tokens]
                tokens += 1
        for layer in range(layers):
            for token in range(tokens):
                for k in range(choices):
                    chosen[token, k] = expert[row, where[token], layer, k]
            for rule in range(len(rules)):
                found, other = hits[rule, :, layer], others[rule, :, layer]
                if rules[rule, 0] == LRU and experts[0] <= FEW:
                    _least_recent_of_few(chosen[:tokens], follows, capacities, experts[0], found, other)
                elif rules[rule, 0] == LRU:
                    _least_recent(chosen[:tokens], follows, capacities, experts[0], found, other)
                elif rules[rule, 0] == BELADY:
                    near = experts[0] <= FEW
                    near = near and _farthest_near(chosen[:tokens], follows, capacities, experts[0], found, other)
                    if not near:
                        _farthest(chosen[:tokens], follows, capacities, experts[0], found, other)
                else:
                    for size in range(len(capacities)):
                        both = _simulate(chosen[:tokens], follows, rules[rule], capacities[size], experts[0])
                        found[size] += both[0]
                        other[size] += both[1]


@kernel
def _least_recent(
    chosen: Array, follows: Array, capacities: Array, num_experts: int, hits: Array, others: Array
) -> None:
    """LRU caches of all sizes over one row: each holds the most recently used experts (Mattson et al. 1970)."""
    tokens, choices = chosen.shape
    last_use, since = np.full(num_experts, -1, np.int32), np.empty(choices, np.int64)
    found, free, seen = np.zeros((2, num_experts), np.int64), np.zeros(num_experts, np.int64), 0
    for token in range(tokens):
        after = 1 if follows[token] else 0
        for k in range(choices):
            since[k] = _later(last_use, last_use[chosen[token, k]])
        for k in range(choices):
            if last_use[chosen[token, k]] < 0:
                free[seen] += 1
                seen += 1
            else:
                found[after, since[k]] += 1
            last_use[chosen[token, k]] = token * choices + k
    for size in range(len(capacities)):
        hits[size] += found[1, : capacities[size]].sum()
        others[size] += found[0, : capacities[size]].sum() + free[: capacities[size]].sum()


@kernel
def _least_recent_of_few(
    chosen: Array, follows: Array, capacities: Array, num_experts: int, hits: Array, others: Array
) -> None:
    """`_least_recent` in 64 bits: byte e holds the experts that were used before e (Smith 1982, section 2.2.3)."""
    tokens, choices = chosen.shape
    found, free = np.zeros((2, num_experts), np.int64), np.zeros(num_experts, np.int64)
    seen: Any = 0
    earlier, used, every = np.uint64(0), np.uint64(0), np.uint64((1 << num_experts) - 1)
    for token in range(tokens):
        after, before = 1 if follows[token] else 0, earlier
        for k in range(choices):
            expert = np.uint64(chosen[token, k])
            byte = np.uint64(8) * expert
            known = np.int64((used >> expert) & np.uint64(1))
            found[after, num_experts - 1 - ONES[(before >> byte) & np.uint64(255)]] += known
            free[min(seen, num_experts - 1)] += 1 - known
            seen += 1 - known
            used |= np.uint64(1) << expert
            earlier = (earlier | (every << byte)) & ~(np.uint64(0x0101010101010101) << expert)
    for size in range(len(capacities)):
        hits[size] += found[1, : capacities[size]].sum()
        others[size] += found[0, : capacities[size]].sum() + free[: capacities[size]].sum()


@kernel
def _later(last_use: Array, than: int) -> Any:
    """How many experts were used later than `than`."""
    number = np.int32(0)
    for expert in range(last_use.size):
        number = np.int32(number + np.int32(last_use[expert] > than))
    return number


@kernel
def _farthest(chosen: Array, follows: Array, capacities: Array, num_experts: int, hits: Array, others: Array) -> None:
    """Belady caches of all sizes over one row, without looking ahead.

    An expert is kept from one use to the next if there is a free place at all tokens in between. Intervals that end
    first are served first; evicting the farthest next use keeps the same experts. A place that is taken is not
    released, so only the last token with no free place matters (Jain & Lin 2016, OPTgen, extended to several experts
    per token).
    """
    tokens, choices = chosen.shape
    kept, last_full = np.zeros((len(capacities), tokens), np.uint16), np.full(len(capacities), -1, np.int64)
    last_use, seen = np.full(num_experts, -1, np.int64), 0
    found, free = np.zeros((2, len(capacities)), np.int64), np.zeros(num_experts, np.int64)
    for token in range(tokens):
        after = 1 if follows[token] else 0
        for k in range(choices):
            before = last_use[chosen[token, k]]
            last_use[chosen[token, k]] = token
            if before < 0:
                free[seen] += 1
                seen += 1
                continue
            for size in range(len(capacities)):
                room = capacities[size] - choices
                fits = before >= (last_full[size] if room else token - 1)
                found[after, size] += fits
                if room == 0 or capacities[size] == num_experts or not fits:
                    continue  # there is never room in between, or always
                for between in range(before + 1, token):
                    kept[size, between] += np.uint16(1)
                    if kept[size, between] == room:
                        last_full[size] = between
    for size in range(len(capacities)):
        hits[size] += found[1, size]
        others[size] += found[0, size] + free[: capacities[size]].sum()


@kernel
def _farthest_near(
    chosen: Array, follows: Array, capacities: Array, num_experts: int, hits: Array, others: Array
) -> bool:
    """`_farthest` if the last 64 tokens are sufficient; otherwise returns False and adds nothing.

    One 64-bit number for each count of taken places says which of these tokens have that many, which avoids branches
    that the processor would have to predict.
    """
    tokens, choices = chosen.shape
    taken = np.zeros((len(capacities), num_experts + 1), np.uint64)
    last_use, seen = np.full(num_experts, -1, np.int64), 0
    found, free = np.zeros((2, len(capacities)), np.int64), np.zeros(num_experts, np.int64)
    for token in range(tokens):
        after = 1 if follows[token] else 0
        for size in range(len(capacities)):
            for place in range(1, capacities[size] - choices + 1):
                taken[size, place] <<= np.uint64(1)
        for k in range(choices):
            before = last_use[chosen[token, k]]
            last_use[chosen[token, k]] = token
            if before < 0:
                free[seen] += 1
                seen += 1
                continue
            far = token - before > 64
            between = ~np.uint64(0) if far else (np.uint64(1) << np.uint64(token - before - 1)) - np.uint64(1)
            for size in range(len(capacities)):
                room = capacities[size] - choices
                if room == 0 or capacities[size] == num_experts:
                    found[after, size] += room > 0 or between == 0
                    continue
                fits = (taken[size, room] & between) == 0
                if far and fits:
                    return False
                found[after, size] += fits
                kept = between if fits else np.uint64(0)
                for place in range(room, 1, -1):
                    taken[size, place] |= taken[size, place - 1] & kept
                taken[size, 1] |= kept
    for size in range(len(capacities)):
        hits[size] += found[1, size]
        others[size] += found[0, size] + free[: capacities[size]].sum()
    return True


@kernel
def _simulate(chosen: Array, follows: Array, rule: Array, capacity: int, num_experts: int) -> tuple[int, int]:
    """One cache over one row: hits of tokens that follow a neighbour, and other hits plus the loads into free
    places."""
    tokens, choices = chosen.shape
    held, value = np.zeros(num_experts, np.bool_), np.zeros(num_experts, np.int64)  # the lowest value is evicted
    places, last_use = np.empty(capacity, np.int64), np.full(num_experts, -1, np.int64)
    full, hits, others, known = 0, 0, 0, 0
    for token in range(tokens):
        while rule[0] == SEGMENT and known < min(token + rule[1], tokens):
            for k in range(choices):
                value[chosen[known, k]] += 1
            known += 1
        for k in range(choices):
            needed = chosen[token, k]
            if held[needed] and follows[token]:
                hits += 1
            elif held[needed]:
                others += 1
            last_use[needed] = token * choices + k
            value[needed] += 1 if rule[0] == LFU else -1
        for k in range(choices):
            needed = chosen[token, k]
            if held[needed]:
                continue
            held[needed] = True
            if full < capacity:
                places[full] = needed
                full += 1
                others += 1
                continue
            evicted = -1
            for place in range(capacity):
                other = places[place]
                if last_use[other] >= token * choices:
                    continue  # needed by this token
                worth = value[other] - value[places[evicted]] if evicted >= 0 else -1
                if worth < 0 or (worth == 0 and last_use[other] < last_use[places[evicted]]):
                    evicted = place
            held[places[evicted]] = False
            places[evicted] = needed
    return hits, others
