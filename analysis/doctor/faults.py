"""What can be wrong with routes, a function each: from what was counted to findings with evidence.

Limits are set so that true routes of trained routers show none of them, and each fault shows itself alone: see
`tests/analysis/test_doctor.py`, and `tests/benchmarks/doctor.py` for a thousand draws. Where one fault makes another
one's signs too, the one that explains the other is named: `HIDES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.doctor.looked import STRETCH, WEIGHT_ROUNDING, Looked
from analysis.doctor.published import Published, published
from analysis.scanning import Array

NEARLY_ALL = 0.99  # of tokens: a fault of a whole layer (arbitrary)
FEW_TOKENS = 64  # below which a layer is not judged (arbitrary)
EXPECTED = 50  # choices that an even load gives each expert, from which on loads are judged (arbitrary)
TOO_EVEN = 4.0  # standard deviations above what ids at random give: no trained router's load is within (arbitrary)
TOO_FEW_EXPERTS = 1.35  # experts in effective use, over k
DOCUMENTS = 5  # whose last tokens are judged, at least (arbitrary)
MOST = 0.9  # of documents or tokens (arbitrary)
RUN = 4  # times the same id at the end of a row that look like padding (arbitrary)
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "[PAD]", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    fault: str
    """One of the names of `FAULTS`."""
    layers: Sequence[int] = ()
    """The model's own numbers; empty where it is not about layers."""
    rows: Sequence[int] = ()
    """The first rows of the capture where it shows."""
    evidence: str
    """What was counted, in words."""


def zero_layers(looked: Looked) -> Iterator[Finding]:
    """Layers of zeros: not recorded, as kernels that choose by themselves leave them (vllm-project/vllm#54730)."""
    zero = _zero(looked)
    if zero.any() and not _leading(zero):
        yield Finding(
            fault="zero layers",
            layers=_numbers(looked, zero),
            rows=looked.first_rows["zero"],
            evidence=f"{_share(looked, looked.zero[zero])} of {looked.tokens:,} tokens have expert 0 alone there: these"
            f" layers were not recorded, as in kernels that choose by themselves{_all(zero)}",
        )


def dense_layers(looked: Looked) -> Iterator[Finding]:
    """The first layers are zeros: they have no experts, and were counted (verl-project/verl#5037)."""
    zero = _zero(looked)
    if _leading(zero):
        yield Finding(
            fault="dense layers counted",
            layers=_numbers(looked, zero),
            evidence=f"the first {zero.sum()} layers have expert 0 alone in {_share(looked, looked.zero[zero])} of"
            f" {looked.tokens:,} tokens: layers without experts come first in many models; import with --layers"
            f" {int(zero.sum())}-..., and see that the others are numbered as the model does",
        )


def constant_layers(looked: Looked) -> Iterator[Finding]:
    """Layers at which all tokens have the same experts."""
    constant = (looked.changes.sum(1) <= (1 - NEARLY_ALL) * looked.pairs) & ~_zero(looked)
    if looked.pairs >= FEW_TOKENS and constant.any():
        yield Finding(
            fault="constant layers",
            layers=_numbers(looked, constant),
            evidence=f"at most {looked.changes[constant].max():,} of {looked.pairs:,} neighbours have other choices",
        )


def illegal_experts(looked: Looked) -> Iterator[Finding]:
    """Ids that no expert has."""
    if looked.illegal.any():
        yield Finding(
            fault="experts out of range",
            layers=_numbers(looked, looked.illegal > 0),
            rows=looked.first_rows["illegal"],
            evidence=f"{int(looked.illegal.sum()):,} choices of {looked.tokens:,} tokens name experts from"
            f" {looked.experts} on; the model has 0 to {looked.experts - 1}",
        )


def twice_in_a_token(looked: Looked) -> Iterator[Finding]:
    """An expert is chosen twice by one token."""
    if looked.twice.any():
        yield Finding(
            fault="expert twice in a token",
            layers=_numbers(looked, looked.twice > 0),
            rows=looked.first_rows["twice"],
            evidence=f"{int(looked.twice.max()):,} of {looked.tokens:,} tokens at a layer name an expert twice",
        )


def equal_layers(looked: Looked) -> Iterator[Finding]:
    """A layer has another one's choices."""
    if looked.sampled < FEW_TOKENS:
        return
    share = looked.same / looked.sampled
    for layer, other in np.argwhere(np.triu(share >= NEARLY_ALL, 1)):
        if _moving(looked, layer) and _moving(looked, other):
            yield Finding(
                fault="equal layers",
                layers=_places(looked, other, layer),
                evidence=f"layer {looked.layers[other]} has the choices of layer {looked.layers[layer]} in"
                f" {share[layer, other]:.1%} of {looked.sampled:,} tokens",
            )


def shifted_layers(looked: Looked) -> Iterator[Finding]:
    """A layer has the choices that another one had a token before."""
    if looked.sampled_pairs < FEW_TOKENS:
        return
    share = looked.shifted / looked.sampled_pairs
    for layer, other in np.argwhere(share >= NEARLY_ALL):
        if layer != other and _moving(looked, layer) and _moving(looked, other):
            yield Finding(
                fault="layer shifted by a token",
                layers=_places(looked, layer, other),
                evidence=f"layer {looked.layers[layer]} has the choices that layer {looked.layers[other]} had a token"
                f" before, in {share[layer, other]:.1%} of {looked.sampled_pairs:,} neighbours",
            )


def repeated_rows(looked: Looked) -> Iterator[Finding]:
    """Stretches with the routes of an earlier stretch whose tokens are others (vllm-project/vllm#39568)."""
    stretches = np.concatenate(looked.stretches) if looked.stretches else np.zeros((0, 5), np.uint64)
    order = np.lexsort((stretches[:, 3], stretches[:, 0]))
    own, before = stretches[order][1:], stretches[order][:-1]
    others = (own[:, 1] != before[:, 1]) & (own[:, 2] != before[:, 2])  # one other token may not change its experts
    repeats = (own[:, 0] == before[:, 0]) & others
    if not repeats.any():
        return
    rows = np.unique(own[repeats, 3].astype(np.int64))
    first = own[repeats][0].astype(np.int64), before[repeats][0].astype(np.int64)
    yield Finding(
        fault="rows repeat an earlier batch",
        rows=rows[:5].tolist(),
        evidence=f"{int(repeats.sum()):,} of {len(stretches):,} stretches of {STRETCH} tokens have the routes of"
        f" another one at all layers, though their tokens differ: row {first[0][3]} from position {first[0][4]} on has"
        f" those of row {first[1][3]} from {first[1][4]} on; in {len(rows):,} rows",
    )


def padding_counted(looked: Looked) -> Iterator[Finding]:
    """Rows begin or end with the same id again and again."""
    ends = np.concatenate(looked.ends) if looked.ends else np.zeros((0, 4), np.int64)
    for at, where in ((0, "begin"), (2, "end")):
        long = ends[ends[:, at + 1] >= RUN]
        if len(ends) < DOCUMENTS or not len(long):
            continue
        ids, number = np.unique(long[:, at], return_counts=True)
        if number.max() < max(DOCUMENTS, 0.2 * len(ends)):
            continue
        own = long[long[:, at] == ids[number.argmax()], at + 1]
        yield Finding(
            fault="padding counted",
            rows=np.flatnonzero((ends[:, at] == ids[number.argmax()]) & (ends[:, at + 1] >= RUN))[:5].tolist(),
            evidence=f"{number.max():,} of {len(ends):,} rows {where} with token {ids[number.argmax()]} {RUN} to"
            f" {own.max()} times, {own.sum():,} tokens in all: padding that is counted as text",
        )


def special_tokens_counted(looked: Looked, pieces: Sequence[str], special: Sequence[int]) -> Iterator[Finding]:
    """Tokens that stand for no text are not marked as such."""
    counted = {number: pieces[number] for number in np.flatnonzero(looked.token_count) if pieces[number] in SPECIAL}
    left = {number: piece for number, piece in counted.items() if number not in special}
    if left:
        number = sum(int(looked.token_count[each]) for each in left)
        yield Finding(
            fault="special tokens counted",
            evidence=f"{', '.join(left.values())} occur {number:,} times among {looked.tokens:,} tokens, and are not"
            " marked as special: they are counted as text",
        )


def dummy_last_tokens(looked: Looked) -> Iterator[Finding]:
    """The last token's routes are none: zeros, the token's before it, or the same in all documents."""
    last = np.concatenate(looked.last) if looked.last else np.zeros((0, 5), np.uint64)
    if len(last) < DOCUMENTS or _zero(looked).any():
        return
    values, number = np.unique(last[:, 2], return_counts=True)
    same = last[:, 2] == values[number.argmax()]
    other_ids = len(np.unique(last[same, 1])) >= 3
    found = {
        "zeros": last[:, 3] > 0,
        "those of the token before it, which is another one": last[:, 4] > 0,
        "the same in all of them, whatever the token": same & other_ids,
    }
    for what, where in found.items():
        if where.sum() >= MOST * len(last):
            yield Finding(
                fault="dummy last tokens",
                rows=last[where, 0][:5].astype(int).tolist(),
                evidence=f"the last token's routes are {what}, in {int(where.sum()):,} of {len(last):,} documents:"
                " leave the last token out, or give its routes as unknown",
            )
            return


def other_top_k(looked: Looked) -> Iterator[Finding]:
    """More choices are kept than the model makes, or fewer than its name says."""
    still = np.asarray((looked.changes <= (1 - NEARLY_ALL) * looked.pairs).all(axis=0))
    if looked.choices > 1 and looked.pairs >= FEW_TOKENS and still[-1] and not still[0]:
        real = int(np.flatnonzero(~still)[-1]) + 1
        yield Finding(
            fault="another top-k",
            evidence=f"choices {real + 1} to {looked.choices} of a token hardly ever change, at any layer: top-k is"
            f" {real}, and {looked.choices} are kept",
        )
        return
    known = published(looked.model)
    for what, here, there in (
        ("experts a token", looked.choices, known and known.experts_per_token),
        ("experts a layer", looked.experts, known and known.num_experts),
    ):
        if known and there not in (None, here):
            yield Finding(
                fault="another top-k",
                evidence=f"the capture has {here} {what}, and {known.name} has {there}",
            )


def other_weights(looked: Looked) -> Iterator[Finding]:
    """Weights do not add up to what the family's do."""
    if not looked.weighed or not looked.tokens:
        return
    known = published(looked.model) or Published(name="", num_experts=None, experts_per_token=None, total=None)
    low, high = looked.totals[:, 0], looked.totals[:, 1]
    steady = high - low <= 2 * WEIGHT_ROUNDING * np.maximum(np.abs(high), 1)
    if known.total is not None:
        off = np.maximum(np.abs(low - known.total), np.abs(high - known.total))
        wrong = off > 2 * WEIGHT_ROUNDING * known.total
        expected = f"{known.name}'s add up to {known.total:g}"
    else:  # of a softmax at most 1, or one number for all tokens
        wrong = ~steady & ((high > known.largest * (1 + 2 * WEIGHT_ROUNDING)) | (low <= 0))
        expected = f"{known.name or 'those of a softmax'} add up to {known.largest:g} at most, or always to the same"
    if wrong.any():
        yield Finding(
            fault="weights of another sum",
            layers=_numbers(looked, wrong),
            evidence=f"a token's weights add up to {low[wrong].min():.3g} to {high[wrong].max():.3g}; {expected}",
        )
    if looked.negative.any():
        yield Finding(
            fault="weights out of order",
            layers=_numbers(looked, looked.negative > 0),
            evidence=f"{int(looked.negative.max()):,} of {looked.tokens:,} tokens at a layer have a weight below 0, or"
            " weights that do not descend: logits, or another order of the choices",
        )


def too_even(looked: Looked) -> Iterator[Finding]:
    """The load is as even as ids at random, which that of a trained router never is."""
    count, expected = looked.count.astype(float), looked.tokens * looked.choices / looked.experts
    judged = ~_zero(looked)
    if expected < EXPECTED or looked.experts <= looked.choices or not judged.any():
        return
    own = count[judged] - count[judged].mean(1, keepdims=True)
    freedom = int(judged.sum()) * (looked.experts - 1)
    chi = float((own**2).sum() / expected / freedom)
    random = (looked.experts - looked.choices) / (looked.experts - 1)  # k of E without replacement vary less
    if chi < random * (1 + TOO_EVEN * (2 / freedom) ** 0.5):
        yield Finding(
            fault="load too even",
            evidence=f"chi-squared of the experts' loads is {chi:.2f} a degree of freedom, and of as many ids at random"
            f" {random:.2f} ({looked.tokens:,} tokens): an untrained router, or ids that are none",
        )


def too_uneven(looked: Looked) -> Iterator[Finding]:
    """Nearly all tokens go to the same experts, or only some of the ids occur anywhere."""
    expected = looked.tokens * looked.choices / looked.experts
    if expected < EXPECTED or looked.experts <= looked.choices:
        return
    share = looked.count / np.maximum(looked.count.sum(1, keepdims=True), 1)
    effective = 2.0 ** -(share * np.log2(np.where(share > 0, share, 1))).sum(1)
    few = (effective < TOO_FEW_EXPERTS * looked.choices) & (looked.changes.sum(1) > (1 - NEARLY_ALL) * looked.pairs)
    if few.any() and looked.experts > 2 * looked.choices:
        yield Finding(
            fault="load too uneven",
            layers=_numbers(looked, few),
            evidence=f"{effective[few].min():.2f} experts are in effective use at a layer, and a token has"
            f" {looked.choices}: a collapsed router, or one that was not recorded",
        )
    unused = (looked.count == 0).all(0)
    used = looked.experts - int(unused.sum())
    if unused.any() and used <= looked.experts / 2 and not _zero(looked).all() and not few.any():
        yield Finding(
            fault="load too uneven",
            evidence=f"{used} of {looked.experts} experts occur at any layer, {np.flatnonzero(~unused)[0]} to"
            f" {np.flatnonzero(~unused)[-1]}: ids of one rank's own experts, or of another model",
        )


def restarted(looked: Looked) -> Iterator[Finding]:
    """Generated tokens have the prompt's routes again, from its start on."""
    equal, places = looked.restarts.tolist()
    moving = any(_moving(looked, layer) for layer in range(len(looked.layers)))
    if places >= FEW_TOKENS and equal >= MOST * places and moving:
        yield Finding(
            fault="generated tokens restart",
            rows=looked.restarted,
            evidence=f"{equal:,} of {places:,} generated tokens have the routes of the prompt's token at the same place"
            " counted from its start, which is another token: positions begin anew with generation",
        )


Fault = Callable[[Looked], Iterator[Finding]]

FAULTS: tuple[Fault, ...] = (
    *(zero_layers, dense_layers, constant_layers, illegal_experts, twice_in_a_token, equal_layers, shifted_layers),
    *(repeated_rows, padding_counted, dummy_last_tokens, other_top_k, other_weights, too_even, too_uneven, restarted),
)

HIDES = {
    "zero layers": {"rows repeat an earlier batch", "load too uneven", "weights of another sum"},
    "another top-k": {"expert twice in a token", "load too uneven", "load too even", "dummy last tokens"},
    "generated tokens restart": {"rows repeat an earlier batch"},
    "padding counted": {"dummy last tokens", "special tokens counted"},
    "rows repeat an earlier batch": {"dummy last tokens"},
}
"""The faults whose signs another one makes too."""


def findings(looked: Looked, pieces: Sequence[str] = (), special: Sequence[int] = ()) -> list[Finding]:
    """All that is wrong, without what another finding explains.

    Parameters
    ----------
    looked
        What was counted.
    pieces
        The tokenizer's pieces by id; empty where they are not known.
    special
        Ids that are marked as special.
    """
    found = [finding for fault in FAULTS for finding in fault(looked)]
    if len(pieces):
        found += special_tokens_counted(looked, pieces, special)
    hidden = set[str]().union(*(HIDES.get(finding.fault, set()) for finding in found))
    return [finding for finding in found if finding.fault not in hidden]


def _zero(looked: Looked) -> Array:
    """Layers of zeros; with one choice a token and few experts a layer may prefer expert 0, but not this much."""
    return np.asarray((looked.zero >= NEARLY_ALL * looked.tokens) & (looked.tokens >= FEW_TOKENS))


def _leading(zero: Array) -> bool:
    """Whether the first layers are zeros, and only these."""
    return bool(zero[0] and not zero.all() and not np.diff(zero.astype(int)).clip(0).any())


def _moving(looked: Looked, layer: int) -> bool:
    return bool(looked.changes[layer].sum() > (1 - NEARLY_ALL) * looked.pairs)


def _numbers(looked: Looked, chosen: Array) -> list[int]:
    return [looked.layers[at] for at in np.flatnonzero(chosen)]


def _places(looked: Looked, *at: int) -> list[int]:
    return [looked.layers[int(each)] for each in at]


def _share(looked: Looked, counted: Array) -> str:
    return f"{counted.min() / max(1, looked.tokens):.1%}"


def _all(chosen: Array) -> str:
    return "; all layers are so" if chosen.all() else ""
