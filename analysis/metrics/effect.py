"""The effect of a change on predictions, from two captures of the same tokens that recorded the log-probability of each
token.

The effect on a token is its log-probability in the second capture minus that in the first, in nats: negative if the
second one predicts it worse. Documents are the units of intervals and tests, because tokens of one document resemble
each other; each document is compared with itself. The sign-flip test assumes that the documents' effects are symmetric
if there is no effect; docs/design/0016-interventions.md describes what happens if they are not.

Promises: tokens are compared, not assumed to be equal; exact sums, the same in any order. Does not know what was
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.agreement import counted_in_both, paired
from analysis.scanning import EVERYTHING, Array, Block, Reducer, Selection, State, labelled, scan
from analysis.statistics.flips import REPLICATES, p_together, why_untested
from analysis.statistics.jackknife import Jackknife, interval
from analysis.statistics.resampled import totals_of
from analysis.token_classes import CLASSES, groups_of, members_by_class

UNIT = 2.0**-20  # nats; differences are rounded to multiples of it, so that sums are exact in any order
PLACES = 10  # number of largest losses listed (arbitrary)
DEFINITION = (
    "mean over predicted tokens of log P(token | previous tokens) in the second capture - the same in the first"
)


class Effects(Reducer):
    """Sums of differences, for all tokens and for token classes, or for each token id; for a dataset from `paired`.

    Parameters
    ----------
    members : mapping of str to bool array, shape (token_id), optional
        The members of each token class, by name.
    by_token
        Count along `token_id` instead. Both refer to the predicted token.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logprob", "other_logprob", "other_expert", "other_token"})
    stacks = True

    def __init__(self, members: Mapping[str, Array] | None = None, *, by_token: bool = False) -> None:
        self.groups, self.by_token = groups_of(members) if members else None, by_token

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: `difference`, in units of `UNIT`, and `tokens`; by token or by group of tokens."""
        shape = dataset.sizes["token_id"] if self.by_token else len(self.groups.belongs) if self.groups else 1
        return {"difference": np.zeros(shape, np.int64), "tokens": np.zeros(shape, np.int64)}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        difference, predicted = _differences(block)
        place = block["token"][:, 1:][predicted]
        if not self.by_token:
            place = self.groups.of_token[place] if self.groups else np.zeros_like(place)
        np.add.at(state["difference"], place, difference[predicted])
        np.add.at(state["tokens"], place, 1)

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Means, and the number of tokens; NaN if there is none."""
        total, tokens = state["difference"], state["tokens"]
        if self.by_token:
            found = _means("effect", "tokens", total, tokens, token_id=np.arange(tokens.shape[-1]))
        else:
            found = _means("effect", "tokens", total.sum(-1), tokens.sum(-1))
            if self.groups:
                classes = {"token_class": np.array(self.groups.names, object)}
                sums = (self.groups.of_classes(each) for each in (total, tokens))
                found = found.merge(_means("of_class", "class_tokens", *sums, **classes))
        return described(
            found,
            n=int(tokens.reshape(-1, tokens.shape[-1])[0].sum()),
            counted="predicted tokens",
            estimator="mean",
            null=0.0,
            definition=DEFINITION,
            source="-",
        )


def _means(name: str, amount: str, total: Array, tokens: Array, **coords: Array) -> xr.Dataset:
    """Means of differences, in nats, and the number of tokens."""
    sums, counts = (labelled(values, *coords, **coords) for values in (total, tokens))
    means = (sums * UNIT / counts.where(counts > 0)).assign_attrs(amount=amount, units="nats")
    return xr.Dataset({name: means, amount: counts})


class LargestLosses(Reducer):
    """The places whose token the second capture predicts worst relative to the first; for a dataset from `paired`.

    Parameters
    ----------
    top
        Number of places kept, at most one per row, so that one text does not fill the list.
    """

    needs = Effects.needs

    def __init__(self, top: int = PLACES) -> None:
        if top < 1:
            raise ValueError(f"top={top}: must be at least 1")
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
            definition="the tokens whose log-probability falls most, at most one per row; ties go to the earlier row,"
            " then to the earlier position",
            source="-",
        )


def _differences(block: Block) -> tuple[Array, Array]:
    """How much better the second capture predicts a token than the first, in units of `UNIT`, int64, and where that is
    known, bool; both (doc, position) from position 1 on."""
    difference = (block["other_logprob"].astype(float) - block["logprob"])[:, :-1]
    known = counted_in_both(block)[:, 1:] & np.isfinite(difference)
    return np.rint(np.where(known, difference, 0.0) / UNIT).astype(np.int64), known


def effect(
    one: xr.Dataset,
    other: xr.Dataset,
    *,
    classes: Sequence[str] = tuple(CLASSES),
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
    classes : sequence of str
        Classes of predicted tokens: names of `analysis.CLASSES`, or regular expressions between slashes.
    level : float
                Level of the intervals.
    replicates : int
                Number of sign flips.
    places : int
        Number of largest losses to list.
    only, threads, progress
        See `analysis.scan`.

    Returns
    -------
    xr.Dataset
        The result of `effect_of`, and over token_id, by predicted token: `of_token` float64, NaN if there is none, and
        `tokens` int64. Over place, the largest loss first, at most one per row, and at most as many places as rows with
        a loss: `of_place` float64, and `row` and `position` int64 of the predicted token.

    Raises
    ------
    ValueError
        When the captures cannot be compared, hold different tokens, or one did not record log-probabilities; or there
        is no such class.
    """
    asked = effect_asked(one["piece"].values.tolist(), classes, places)
    counted = scan(paired(one, other), asked, only=only, threads=threads, progress=progress)
    return effect_from(counted, level=level, replicates=replicates)


def effect_asked(pieces: Sequence[str], classes: Sequence[str] = tuple(CLASSES), places: int = PLACES) -> list[Reducer]:
    """The reducers that `effect` needs, for a vocabulary with these pieces."""
    members = members_by_class(classes, pieces)
    return [Jackknife(Effects(members)), Effects(by_token=True), LargestLosses(places)]


def effect_from(counted: Sequence[xr.Dataset], *, level: float = 0.95, replicates: int = REPLICATES) -> xr.Dataset:
    """`effect`, from the counts of the reducers of `effect_asked`."""
    found, of_token, losses = counted
    return effect_of(found, level=level, replicates=replicates).assign(
        of_token=of_token["effect"].drop_attrs(),
        tokens=of_token["tokens"],
        of_place=losses["effect"],
        row=losses["row"],
        position=losses["position"],
    )


def effect_of(counts: xr.Dataset, *, level: float = 0.95, replicates: int = REPLICATES) -> xr.Dataset:
    """The effect with its interval and p-value, from the counts of `Jackknife(Effects())`.

    Parameters
    ----------
    counts : xr.Dataset
        From `Effects` inside `Jackknife`.
    level : float
        Level of the intervals.
    replicates : int
        Number of sign flips.

    Returns
    -------
    xr.Dataset
        float64: `effect`, in nats per predicted token, negative if the second capture predicts worse; its interval
        `low` to `high`, by a jackknife over documents; `p`, two-sided, by flipping the signs of whole documents.
        Interval and p are NaN if there are fewer than six units of documents, or four effective ones: attribute
        `untested` gives the reason. The same over token_class, by the class of the predicted token, if classes were
        counted: `of_class`, `class_low`, `class_high`, for each class separately, and `class_p`, adjusted for all
        tested classes (minP); `class_tokens` int64. Also NaN for a class whose tokens come from too few documents.
    """
    reason, ends = why_untested(_tokens(counts, "tokens")), interval(counts["effect"], level)
    known = not reason
    values = {
        "effect": ends["estimate"].drop_attrs(),
        **{name: ends[name].where(known) for name in ("low", "high")},
        "p": ((), float(_p(counts, "effect", replicates)[0]) if known else np.nan),
    }
    if "of_class" in counts:
        tokens = _tokens(counts, "class_tokens")
        tested = np.array([not why_untested(own[:, own[0] > 0]) for own in np.moveaxis(tokens, 2, 0)], bool)
        of_class = interval(counts["of_class"], level, amount=counts["class_tokens"])
        p = np.full(len(tested), np.nan)
        if tested.any():
            p[tested] = _p(counts.isel(token_class=tested), "of_class", replicates)
        sure = xr.DataArray(tested, dims="token_class")
        values |= {
            "of_class": of_class["estimate"].drop_attrs(),
            **{f"class_{name}": of_class[name].where(sure) for name in ("low", "high")},
            "class_p": ("token_class", p),
            "class_tokens": counts["class_tokens"].isel(replicate=0, drop=True),
        }
    return described(
        xr.Dataset(values).drop_vars(["replicate", "left_out", "unit"], errors="ignore"),
        n=counts.attrs["n"],
        counted="predicted tokens",
        documents=counts.attrs["documents"],
        untested=reason,
        level=level,
        replicates=replicates,
        estimator="mean; jackknife over documents; studentized sign-flip test over whole documents",
        null=0.0,
        definition=DEFINITION,
        source="Fisher 1935 (sign-flip test); Westfall & Young 1993 (minP)",
    )


def losing_tokens(found: xr.Dataset, top: int) -> Array:
    """The ids of at most `top` tokens with the largest losses over all their occurrences, from `effect`."""
    total = (found["of_token"].fillna(0) * found["tokens"]).values
    worst: Array = total.argsort(kind="stable")[:top]
    return worst[total[worst] < 0]


def _tokens(counts: xr.Dataset, name: str) -> Array:
    """Tokens of each unit in both captures, as expected by `why_untested`: (2, unit, ...)."""
    values = counts[name].transpose("replicate", ...).values.astype(float)
    return np.stack([values[0] - values[1:]] * 2)


def _p(counts: xr.Dataset, name: str, replicates: int) -> Array:
    """The p-values of the means of a variable, each adjusted for all of them."""
    totals = totals_of(counts, name)
    amount = totals.amount.sum(0)
    return p_together(totals.total / amount, totals.amount / amount, replicates)
