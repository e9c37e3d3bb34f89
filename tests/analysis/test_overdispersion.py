"""Drawn documents compared with a plain numpy form; all seeds are fixed."""

import numpy as np
import pytest

from analysis.statistics.overdispersion import drawn


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.3])
def test_drawn_sets_have_the_moments_of_a_plain_numpy_form(spread: float) -> None:
    tokens, choices, draws = np.array([20, 90, 400, 3_000, 50]), 2, 4_000
    share = choices * np.array([0.4, 0.3, 0.15, 0.1, 0.05, 0.0])
    found = drawn(tokens, share, spread, choices, draws, np.random.default_rng(0))
    wanted = plainly_drawn(tokens, share, spread, choices, draws, np.random.default_rng(1))
    for one, other in zip(found, wanted, strict=True):
        for power in (1, 2, 3):
            here, there = one**power, other**power
            error = np.sqrt((here.var(0) + there.var(0)) / draws)
            assert (abs(here.mean(0) - there.mean(0)) <= 4.5 * error).all()


def plainly_drawn(
    tokens: np.ndarray, share: np.ndarray, spread: float, choices: int, draws: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Shares and variances of drawn sets of documents, over (draw, expert)."""
    own = np.broadcast_to(share, (draws, len(tokens), len(share)))
    if spread:
        gamma = random.standard_gamma(share / choices * (1 - spread) / spread, own.shape)
        own = np.minimum(choices * gamma / gamma.sum(-1, keepdims=True), 1)
    count = random.binomial(tokens[:, None], own)
    total = tokens.sum()
    mean = count.sum(1) / total
    residual = count - mean[:, None] * tokens[:, None]
    return mean, (residual**2 / (1 - tokens[:, None] / total)).sum(1) / total**2


def test_counts_that_add_up_are_as_even_as_choices_of_different_experts_are() -> None:
    tokens, choices, experts, draws = np.array([40, 300, 2_000]), 2, 5, 4_000
    even = np.full(experts, choices / experts)
    shares, _ = drawn(tokens, even, 0.0, choices, draws, np.random.default_rng(0), whole=True)
    np.testing.assert_allclose(shares.sum(1), choices)
    pairs = [(one, other) for one in range(experts) for other in range(one)]
    of_pairs = np.random.default_rng(1).multinomial(tokens.sum(), np.full(len(pairs), 1 / len(pairs)), draws)
    chosen = np.zeros((draws, experts))
    for column, pair in enumerate(pairs):
        chosen[:, list(pair)] += of_pairs[:, column, None]
    for measure in (np.var, np.ptp):
        ours, truth = measure(shares, axis=1), measure(chosen / tokens.sum(), axis=1)
        assert abs(ours.mean() - truth.mean()) <= 4.5 * np.sqrt((ours.var() + truth.var()) / draws)
        middle = np.quantile(ours, [0.025, 0.975])
        assert 0.93 <= ((middle[0] <= truth) & (truth <= middle[1])).mean() <= 0.97
