"""n-gram language models to measure a model against: interpolated modified Kneser–Ney (Chen & Goodman 1998, 1999).

Rows are token ids of shape (rows, positions), below 2**15, filled up with -1; no n-gram crosses the end of a row.
"""

import numpy as np
from numpy.typing import NDArray

BITS = 15  # of a token id in a packed n-gram

Rows = NDArray[np.int32]


class NGrams:
    """Counts of n-grams up to an order of four, and what they predict."""

    def __init__(self, rows: Rows, order: int, vocabulary: int) -> None:
        assert 1 <= order <= 4
        assert vocabulary <= 2**BITS
        self.vocabulary = vocabulary
        found = [self._packed(rows, n) for n in range(1, order + 1)]
        # Below the highest order, an n-gram counts once for each different token before it.
        followed = [np.unique(longer) & ((1 << BITS * n) - 1) for n, longer in enumerate(found[1:], 1)]
        self.levels = [_Level(grams) for grams in [*followed, found[-1]]]

    @staticmethod
    def _packed(rows: Rows, size: int) -> NDArray[np.int64]:
        """All n-grams of a size, as numbers."""
        windows = np.lib.stride_tricks.sliding_window_view(rows, size, axis=1).reshape(-1, size)
        return _pack(windows[(windows >= 0).all(1)])

    def probability(self, context: Rows, token: Rows) -> NDArray[np.float64]:
        """The probability of each token after its context (tokens, order - 1), in which -1 means no token."""
        value = np.full(len(token), 1 / self.vocabulary)
        for size, level in enumerate(self.levels, 1):
            own = context[:, context.shape[1] - (size - 1) :]
            known = (own >= 0).all(1)
            value[known] = level.mixed(_pack(np.column_stack([own[known], token[known]])), value[known])
        return value

    def loss(self, rows: Rows) -> float:
        """Mean over all tokens except each row's first, in nats per token."""
        order = len(self.levels)
        filled = np.concatenate([np.full((len(rows), order - 1), -1, rows.dtype), rows], axis=1)
        windows = np.lib.stride_tricks.sliding_window_view(filled, order, axis=1)[:, 1:].reshape(-1, order)
        windows = windows[windows[:, -1] >= 0]
        return float(-np.log(self.probability(windows[:, :-1], windows[:, -1])).mean())


class _Level:
    """One order: counts of its n-grams, and of each context's."""

    def __init__(self, grams: NDArray[np.int64]) -> None:
        self.gram, self.count = np.unique(grams, return_counts=True)
        of_count = [max(1, int((self.count == number).sum())) for number in range(1, 5)]
        scale = of_count[0] / (of_count[0] + 2 * of_count[1])
        steps = [n - (n + 1) * scale * of_count[n] / of_count[n - 1] for n in (1, 2, 3)]
        self.discount = np.array([0.0, *np.clip(steps, 0, [1, 2, 3])])
        self.context, first = np.unique(self.gram >> BITS, return_index=True)
        self.total = np.add.reduceat(self.count, first)
        self.freed = np.add.reduceat(self.discount[np.minimum(self.count, 3)], first)

    def mixed(self, gram: NDArray[np.int64], lower: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability at this order, from that at the order below, which is returned if the context was never seen."""
        count = _looked_up(self.gram, self.count, gram)
        total = _looked_up(self.context, self.total, gram >> BITS)
        freed = _looked_up(self.context, self.freed, gram >> BITS)
        kept = count - self.discount[np.minimum(count, 3)]
        return np.where(total > 0, (kept + freed * lower) / np.maximum(total, 1), lower)


def _pack(windows: Rows) -> NDArray[np.int64]:
    packed = np.zeros(len(windows), np.int64)
    for column in windows.T:
        packed = packed << BITS | column
    return packed


def _looked_up(keys: NDArray[np.int64], values: NDArray[np.generic], wanted: NDArray[np.int64]) -> NDArray[np.generic]:
    """The value of each key, 0 if it is missing."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
