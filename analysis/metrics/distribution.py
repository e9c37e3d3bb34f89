"""The routers' distribution over all experts, chosen or not: how spread out it is, the part that the chosen experts
have, and how close the first expert came that was not chosen.

Promises: sums of integers, so the result does not depend on order; if only the largest logits were recorded, unknown
values are reported as two bounds (`analysis.metrics.scores`). Does not know how logits become scores.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import xarray as xr

from analysis.attributes import described
from analysis.metrics.scores import NO_IDS, Scores, bits_of, log_score, scores_of
from analysis.scanning import Array, Block, Reducer, State, kernel, labelled, scan
from analysis.statistics.jackknife import Jackknife, with_intervals

UNIT = 2.0**-20  # values are rounded to multiples of it, so that sums are exact
UNITS = {"entropy": "bits", "effective_experts": "experts", "mass": "1"}
AMOUNTS = ("tokens", "margin_tokens")


class RouterDistribution(Reducer):
    """Sums over tokens, by layer, of the quantities whose means `router_distribution` returns.

    Parameters
    ----------
    scores : Scores
        How the capture's logits become scores, from `analysis.scores_of`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logit", "logit_expert?"})
    stacks = True

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def init(self, dataset: xr.Dataset) -> State:
        """Zeros: sums in units of 2**-20, int64 (end, layer), ends being bounds; `margin` and its tokens (layer)."""
        layers = dataset.sizes["layer"]
        sums = {name: np.zeros((2, layers), np.int64) for name in UNITS}
        return sums | {name: np.zeros(layers, np.int64) for name in ("margin", "margin_tokens", "tokens")}

    def update(self, state: State, block: Block) -> None:
        """Add one shard."""
        arrays = block["logit"], block.get("logit_expert", NO_IDS), block["expert"], block["counted"]
        if not _add(*arrays, self.scores.experts, self.scores.sigmoid, *state.values()):
            raise ValueError("a logit is not a finite number: the shard is damaged")

    def finish(self, state: State, dataset: xr.Dataset) -> xr.Dataset:
        """Means, NaN if nothing was counted; two bounds if only the largest logits are known."""
        experts, tokens, known = self.scores.experts, *(labelled(state[name], "layer") for name in AMOUNTS)
        even = {"entropy": float(np.log2(experts)), "effective_experts": experts, "mass": dataset.sizes["k"] / experts}
        found: dict[str, Any] = {}
        for name, null in even.items():
            for end, at in ({"_at_least": 0, "_at_most": 1} if self.scores.truncated else {"": 0}).items():
                mean = labelled(state[name][..., at, :] * UNIT, "layer") / tokens.where(tokens > 0)
                found[f"mean_{name}{end}"] = mean.assign_attrs(units=UNITS[name], null=null, amount="tokens")
        margin = labelled(state["margin"] * UNIT, "layer") / known.where(known > 0)
        found["mean_margin"] = margin.assign_attrs(units="1", null=0.0, amount="margin_tokens")
        return described(
            xr.Dataset({**found, "tokens": tokens, "margin_tokens": known}, {"layer": dataset["layer"].values}),
            n=int(state["tokens"].reshape(-1, state["tokens"].shape[-1])[:1, :1].sum()),
            estimator="mean over tokens",
            null="by variable: the value for a router that gives all experts the same probability",
            definition=f"p = scores over their sum, scores being the {self.scores.how}s of the logits;"
            " entropy = -sum of p log2 p; effective_experts = 2^entropy; mass = sum of p of the chosen"
            f" experts; margin = smallest logit of a chosen expert - largest of the others{self._recorded()}",
            source="Hill 1973 (effective numbers)",
        )

    def _recorded(self) -> str:
        """Which values are known for which tokens, if only the largest logits were recorded."""
        said = (
            f"; of {self.scores.experts} logits, the largest {self.scores.recorded} are known: at_least and at_most"
            " are the bounds that this leaves, and the margin covers tokens whose chosen experts and first other"
            " expert are among them"
        )
        return said if self.scores.truncated else ""


def router_distribution(dataset: xr.Dataset, *, level: float = 0.95, threads: int | None = None) -> xr.Dataset:
    """How spread out each layer's router is over all experts, and how close the others came.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture with the router's logits.
    level : float
        Level of the intervals.
    threads : int, optional
        Shards decoded at the same time; default one a processor.

    Returns
    -------
    xr.Dataset
        float64 over (layer), NaN if nothing was counted: the means over tokens `mean_entropy`, in bits;
        `mean_effective_experts`, of 2 to the power of the entropy; `mean_mass`, of the part of the distribution that
        the chosen experts have; and `mean_margin`, of the smallest logit of a chosen expert minus the largest of the
        others, which is negative if a bias or groups changed the choice. Each with `_low` and `_high`, the ends of its
        interval over documents, and the attribute `null`, the value for a router that gives all experts the same
        probability. int64: `tokens`, and `margin_tokens`, those of the margin.

        If only the largest logits were recorded, entropy, effective experts and mass have bounds instead of means:
        `mean_entropy_at_least` and `mean_entropy_at_most`, and so on. The margin is exact, over the tokens whose chosen
        experts and first other expert are among the recorded ones.

    Raises
    ------
    ValueError
        When the capture has no logits, or it is not known how they become weights.
    """
    found = scan(dataset, [Jackknife(RouterDistribution(scores_of(dataset)))], threads=threads)[0]
    return with_intervals(found, level=level, share=("mean_mass",))


@kernel
def _add(
    logit: Array,
    ids: Array,
    expert: Array,
    counted: Array,
    experts: int,
    sigmoid: bool,
    entropy: Array,
    effective: Array,
    mass: Array,
    margin: Array,
    margin_tokens: Array,
    tokens: Array,
) -> bool:
    """Add tokens; False if a logit is not finite."""
    rows, positions, layers, choices = expert.shape
    recorded = logit.shape[-1]
    chosen = np.zeros(recorded, np.bool_)
    for row in range(rows):
        for position in range(positions):
            if not counted[row, position]:
                continue
            for layer in range(layers):
                own, at = logit[row, position, layer], expert[row, position, layer]
                chosen[:] = False
                if ids.size == 0:
                    for k in range(choices):
                        chosen[at[k]] = True
                else:
                    for index in range(recorded):
                        for k in range(choices):
                            chosen[index] |= ids[row, position, layer, index] == at[k]
                largest, smallest = log_score(own.max(), sigmoid), 0.0
                total, product, of_chosen, among, first, other = 0.0, 0.0, 0.0, 0, np.inf, -np.inf
                for index in range(recorded):
                    log = log_score(own[index], sigmoid) - largest
                    score = np.exp(log)
                    smallest = min(smallest, log)
                    total += score
                    product += score * log
                    if chosen[index]:
                        of_chosen += score
                        among += 1
                        first = min(first, own[index])
                    else:
                        other = max(other, own[index])
                if not np.isfinite(product + own.max()):
                    return False
                low, high = bits_of(total, product, smallest, experts - recorded)
                effective_low = 2.0**low
                _add_ends(entropy, layer, low, high)
                _add_ends(effective, layer, effective_low, effective_low if high == low else 2.0**high)
                # Scores that are not recorded, of chosen and other experts, lie between 0 and the smallest recorded
                # one.
                unknown, least = choices - among, np.exp(smallest)
                others = (experts - recorded - unknown) * least
                _add_ends(
                    mass,
                    layer,
                    of_chosen / (total + others),
                    (of_chosen + unknown * least) / (total + unknown * least),
                )
                tokens[layer] += 1
                if among == choices and other > -np.inf:
                    margin[layer] += _units(first - other)
                    margin_tokens[layer] += 1
    return True


@kernel
def _add_ends(sums: Array, layer: int, low: float, high: float) -> None:
    sums[0, layer] += _units(low)
    sums[1, layer] += _units(high)


@kernel
def _units(value: float) -> int:
    return int(np.rint(value / UNIT))
