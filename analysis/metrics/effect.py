"""What a change does to predictions: two captures of the same tokens that recorded the log-probability of each token.

The effect on a token is its log-probability in the second capture less that in the first, in nats: below 0 where the
second one predicts it worse. Documents are the unit of intervals and tests, as tokens of one resemble each other; each
is compared with itself.

Promises: tokens are compared, not believed; exact sums, the same in any order. Does not know what was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.agreement import counted_in_both, paired
from analysis.scanning import EVERYTHING, Array, Block, Reducer, Selection, State, labelled, scan
from analysis.statistics.differences import p_adjusted, studentized
from analysis.statistics.flips import REPLICATES, flipped, sum_of, why_untested
from analysis.statistics.jackknife import Jackknife, interval

UNIT = 2.0**-20  # nats; differences are rounded to it, so that sums are exact in any order
PLACES = 10  # of the largest losses that are listed (arbitrary)
DEFINITION = "mean over predicted tokens of log P(token | before it) in the second capture - the same in the first"


class Effects(Reducer):
    """Sums of differences, of all tokens or of each token id; of a dataset that `paired` made.

    Parameters
    ----------
    by_token
        Along `token_id`, the token that is predicted.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logprob", "other_logprob", "other_expert", "other_token"})
    stacks = True

    def __init__(self, *, by_token: bool = False) -> None:
        self.by_token = by_token

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `difference`, in `UNIT`, and `tokens`."""
        shape = dataset.sizes["token_id"] if self.by_token else 1
        return {"difference": np.zeros(shape, np.int64), "tokens": np.zeros(shape, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        difference, predicted = _differences(block)
        token = block["token"][:, 1:][predicted] if self.by_token else np.zeros(np.count_nonzero(predicted), int)
        np.add.at(state["difference"], token, difference[predicted])
        np.add.at(state["tokens"], token, 1)

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Means, and of how many tokens; NaN where there is none."""
        dim = "token_id" if self.by_token else "all"
        coords = {dim: np.arange(state["tokens"].shape[-1])}
        total, tokens = (labelled(state[name], dim, **coords) for name in ("difference", "tokens"))
        found = xr.Dataset({"effect": total * UNIT / tokens.where(tokens > 0), "tokens": tokens})
        found = found if self.by_token else found.isel(all=0, drop=True)
        return described(
            found,
            n=int(state["tokens"].reshape(-1, state["tokens"].shape[-1])[0].sum()),
            counted="predicted tokens",
            estimator="mean",
            null=0.0,
            definition=DEFINITION,
            source="-",
        )


class LargestLosses(Reducer):
    """The places whose token the second capture predicts worst beside the first; of a dataset that `paired` made.

    Parameters
    ----------
    top
        Places kept, one a row at most, so that one text does not fill the list.
    """

    needs = Effects.needs

    def __init__(self, top: int = PLACES) -> None:
        if top < 1:
            raise ValueError(f"top={top}: at least 1")
        self.top = top

    def init(self, dataset: xr.Dataset) -> State:
        """No places."""
        return {name: np.zeros(0, np.int64) for name in ("difference", "row", "position")}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        difference, predicted = _differences(block)
        if not difference.size:
            return
        difference = np.where(predicted, difference, 0)
        position, row = difference.argmin(1), np.arange(len(difference))
        found = {"difference": difference[row, position], "row": block["row"], "position": position + 1}
        lost = found["difference"] < 0
        state |= self.merge(state, {name: values[lost] for name, values in found.items()})

    def merge(self, state: State, other: State) -> State:
        """The larger losses of both; ties go to the earlier row."""
        both = {name: np.concatenate([state[name], other[name]]) for name in state}
        order = np.lexsort((both["row"], both["difference"]))[: self.top]
        return {name: values[order] for name, values in both.items()}

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """The places, the largest loss first."""
        found = {"effect": state["difference"] * UNIT, "row": state["row"], "position": state["position"]}
        return described(
            xr.Dataset(
                {name: ("place", values) for name, values in found.items()},
                {"place": np.arange(1, len(state["row"]) + 1)},
            ),
            n=len(state["row"]),
            counted="places",
            estimator="exact",
            null="none: places, not a statistic",
            definition="the tokens whose log-probability falls most, at most one in a row; ties go to the earlier row,"
            " then to the earlier position",
            source="-",
        )


def _differences(block: Block) -> tuple[Array, Array]:
    """By how much the second capture predicts a token better than the first, in `UNIT`, int64, and where that is known,
    bool; both (doc, position) from position 1 on."""
    difference = (block["other_logprob"].astype(float) - block["logprob"])[:, :-1]
    known = counted_in_both(block)[:, 1:] & np.isfinite(difference)
    return np.rint(np.where(known, difference, 0.0) / UNIT).astype(np.int64), known


def effect(
    one: xr.Dataset,
    other: xr.Dataset,
    *,
    level: float = 0.95,
    replicates: int = REPLICATES,
    places: int = PLACES,
    only: Selection = EVERYTHING,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """How much better or worse a second capture predicts the same tokens.

    Parameters
    ----------
    one, other : xr.Dataset
        Captures of the same rows, layers, k and E that recorded `logprob`.
    level : float
        Of the interval.
    replicates : int
        Flips of signs.
    places : int
        Places listed of the largest losses.
    only, threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        float64: `effect`, in nats a predicted token, below 0 where `other` predicts worse; its interval `low` to
        `high`, by a jackknife over documents; `p`, two-sided, of flipped signs of whole documents. They are NaN where
        there are fewer than six units of documents, or four effective ones: attribute `untested` gives the reason.
        Over token_id, by the token that is predicted: `of_token` float64, NaN where there is none, and `tokens` int64.
        Over place, the largest loss first, one a row at most, and no more places than rows with a loss: `of_place`
        float64, and `row` and `position` int64 of the token that is predicted.

    Raises
    ------
    ValueError
        When the captures cannot be compared, hold other tokens, or one did not record log-probabilities.
    """
    counted = scan(paired(one, other), effect_asked(places), only=only, threads=threads, progress=progress)
    return effect_of(counted, level=level, replicates=replicates)


def effect_asked(places: int = PLACES) -> list[Reducer]:
    """What `effect_of` takes the answers of."""
    return [Jackknife(Effects()), Effects(by_token=True), LargestLosses(places)]


def effect_of(counted: Sequence[xr.Dataset], *, level: float = 0.95, replicates: int = REPLICATES) -> xr.Dataset:
    """`effect`, from what the reducers of `effect_asked` counted."""
    found, of_token, losses = counted
    tokens = found["tokens"].values[0] - found["tokens"].values[1:].astype(float)
    means, counts = found["effect"].fillna(0).values, found["tokens"].values
    sums = means[0] * counts[0] - means[1:] * counts[1:]
    between = interval(found["effect"], level)
    reason = why_untested(np.stack([tokens, tokens]))
    return described(
        xr.Dataset(
            {
                "effect": between["estimate"],
                "low": between["low"].where(not reason),
                "high": between["high"].where(not reason),
                "p": ((), np.nan if reason else _p(sums / counts[0], tokens / counts[0], replicates)),
                "of_token": of_token["effect"],
                "tokens": of_token["tokens"],
                "of_place": losses["effect"],
                "row": losses["row"],
                "position": losses["position"],
            }
        ),
        n=int(counts[0]),
        counted="predicted tokens",
        documents=found.attrs["documents"],
        untested=reason,
        level=level,
        replicates=replicates,
        estimator="mean; jackknife over documents; flipped signs of whole documents, studentized",
        null=0.0,
        definition=DEFINITION,
        source="Fisher 1935 (sign-flip test)",
    )


def losing_tokens(found: xr.Dataset, top: int) -> Array:
    """The ids of the tokens that lose most over all their occurrences, at most so many, from `effect`."""
    total = (found["of_token"].fillna(0) * found["tokens"]).values
    worst: Array = total.argsort(kind="stable")[:top]
    return worst[total[worst] < 0]


def _p(residuals: Array, part: Array, replicates: int) -> float:
    """Two-sided p of a sum over units: what each adds to it, and its part of the tokens."""
    own = residuals[:, None, None]
    statistic = abs(studentized(*sum_of(own, part)))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (replicates, len(part)))
    return float(p_adjusted(statistic, flipped(own, part, signs))[0, 0])
