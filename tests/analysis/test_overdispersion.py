"""Drawn documents beside scipy's distributions and a plain numpy form; all seeds are fixed."""

import numpy as np
import pytest
from scipy import stats

from analysis.statistics.overdispersion import MOST_COUNT, MOST_MEAN, NORMAL_FROM, STEP, drawn
from analysis.statistics.overdispersion import _draw_gammas as draw_gammas
from analysis.statistics.overdispersion import _draw_numbers as draw_numbers

NUMBERS = 40_000
LUCK = 0.001  # of one test of a distribution


@pytest.mark.parametrize("shape", [0.02, 0.3, 0.99, 1.0, 2.5, 40.0])
def test_gamma_numbers_have_their_distribution(shape: float) -> None:
    shapes = np.full(NUMBERS, shape)
    centre = np.where(shapes < 1, shapes + 1, shapes) - 1 / 3
    normal, uniform, found = np.empty((3, NUMBERS))
    draw_gammas(np.random.default_rng(0), shapes, centre, 1 / np.sqrt(9 * centre), normal, uniform, found)
    assert stats.kstest(found, stats.gamma(shape).cdf).pvalue > LUCK


@pytest.mark.parametrize("tokens", [1, 5, 60, 100, 2_000, 3_000_000])
@pytest.mark.parametrize("mean", [0.1, 0.5, 0.74, 3.3, 12.0, 24.9])
@pytest.mark.parametrize("rare", [True, False])
def test_numbers_are_binomial_up_to_where_they_are_drawn_as_normal(tokens: int, mean: float, rare: bool) -> None:
    share = min(mean / tokens, 0.5) if rare else 1 - min(mean / tokens, 0.5)
    assert tokens * share * (1 - share) <= NORMAL_FROM
    found, table = np.empty(NUMBERS), np.zeros((int(MOST_MEAN / STEP) + 1, MOST_COUNT))
    draw_numbers(np.random.default_rng(0), float(tokens), np.full(NUMBERS, share), table, found)
    fewer = (found if rare else tokens - found).astype(int)
    expected = stats.binom(tokens, min(share, 1 - share)).pmf(np.arange(MOST_COUNT)) * NUMBERS
    often = expected > 5
    seen = np.bincount(fewer, minlength=MOST_COUNT)[often]
    rest = NUMBERS - seen.sum(), NUMBERS - expected[often].sum()
    assert stats.chi2.sf(((seen - expected[often]) ** 2 / expected[often]).sum(), often.sum() - 1) > LUCK
    assert abs(rest[0] - rest[1]) < 5 + 5 * np.sqrt(abs(rest[1]))


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
        own = np.minimum(choices * gamma / gamma.sum(-1, keepdims=True), 1.0)
    count = random.binomial(tokens[:, None], own)
    part = tokens / tokens.sum()
    shares = count.sum(1) / tokens.sum()
    residual = count - tokens[:, None] * shares[:, None]
    return shares, (residual**2 / (1 - part)[:, None]).sum(1) / tokens.sum() ** 2


def test_the_same_seed_gives_the_same_documents() -> None:
    arguments = np.array([30, 40, 50]), np.array([1.2, 0.5, 0.3]), 0.1, 2, 5
    one, other = (drawn(*arguments, np.random.default_rng(7))[0] for _ in range(2))
    np.testing.assert_array_equal(one, other)
