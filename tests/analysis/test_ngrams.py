"""The n-gram models for comparison with the tiny Mixtral, compared with a plain one."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from ngrams import NGrams

VOCABULARY = 5_000
FREQUENT = 1 / np.arange(3, VOCABULARY + 3) / (1 / np.arange(3, VOCABULARY + 3)).sum()  # as words are: some, rarely


def text(seed: int, rows: int) -> np.ndarray:
    """Rows of different lengths; half of the tokens are determined by the two before them."""
    random = np.random.default_rng(seed)
    found = np.full((rows, 40), -1, np.int32)
    for row in found:
        length = random.integers(3, 41)
        row[:length] = random.choice(VOCABULARY, length, p=FREQUENT)
        for at in range(2, length):
            if random.random() < 0.5:
                row[at] = (7 * row[at - 2] + 11 * row[at - 1]) % VOCABULARY
    return found


class Plain:
    """Chen & Goodman's formulas with dictionaries: counts of continuations below the highest order."""

    def __init__(self, rows: np.ndarray, order: int) -> None:
        lines = [row[row >= 0].tolist() for row in rows]
        grams = [
            [tuple(line[at : at + n]) for line in lines for at in range(len(line) - n + 1)] for n in range(1, order + 1)
        ]
        self.counts = [Counter(gram[1:] for gram in {*longer}) for longer in grams[1:]] + [Counter(grams[-1])]
        self.discounts = []
        for counts in self.counts:
            n = [sum(count == number for count in counts.values()) for number in range(5)]
            scale = n[1] / (n[1] + 2 * n[2])
            self.discounts.append([0, *(k - (k + 1) * scale * n[k + 1] / n[k] for k in (1, 2, 3))])
        self.following: list[dict[tuple[int, ...], list[float]]] = []
        for counts, discount in zip(self.counts, self.discounts, strict=True):
            sums = defaultdict(lambda: [0.0, 0.0])
            for gram, count in counts.items():
                sums[gram[:-1]][0] += count
                sums[gram[:-1]][1] += discount[min(count, 3)]
            self.following.append(sums)

    def probability(self, context: tuple[int, ...], token: int) -> float:
        n = len(context)
        below = 1 / VOCABULARY if n == 0 else self.probability(context[1:], token)
        if context not in self.following[n]:
            return below
        total, freed = self.following[n][context]
        own = self.counts[n].get((*context, token), 0)
        return (own - self.discounts[n][min(own, 3)] + freed * below) / total


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_are_those_of_dictionaries_and_add_up_to_one(order: int) -> None:
    rows = text(0, 600)
    model, plain = NGrams(rows, order, VOCABULARY), Plain(rows, order)
    contexts = [row[at - order + 1 : at] for row in text(1, 20) for at in range(order - 1, (row >= 0).sum())]
    for context in contexts[:12]:
        repeated = np.repeat(context[None], VOCABULARY, axis=0)
        found = model.probability(repeated, np.arange(VOCABULARY, dtype=np.int32))
        wanted = [plain.probability(tuple(context.tolist()), token) for token in range(VOCABULARY)]
        np.testing.assert_allclose(found, wanted, rtol=1e-9)
        assert found.sum() == pytest.approx(1)


def test_the_loss_is_the_mean_over_tokens_with_the_context_that_a_row_has() -> None:
    model, rows = NGrams(text(0, 2000), 4, VOCABULARY), text(2, 10)
    said = []
    for row in rows:
        for at in range(1, (row >= 0).sum()):
            context = np.concatenate([np.full(3, -1, np.int32), row[:at]])[-3:]
            said.append(-np.log(model.probability(context[None], row[at : at + 1])[0]))
    assert model.loss(rows) == pytest.approx(np.mean(said))
    losses = [NGrams(text(0, 2000), order, VOCABULARY).loss(rows) for order in (1, 2, 3)]
    assert losses[2] < min(losses[:2]) - 0.05  # the text is of the second order
