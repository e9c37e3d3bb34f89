"""What can be wrong with routes, one function per fault: from counts to findings with evidence.

Limits are set so that correct routes of trained routers have no finding, and each fault is reported alone: see
`tests/analysis/test_doctor.py`, and `tests/benchmarks/doctor.py` for a thousand draws. If one fault also causes the
signs of another, only the cause is reported: see `HIDES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.doctor.looked import STRETCH, WEIGHT_ROUNDING, Looked
from analysis.doctor.published import Published, published
from analysis.scanning import Array

NEARLY_ALL = 0.99  # of tokens: a fault of a whole layer (arbitrary)
FEW_TOKENS = 64  # with fewer, a layer is not judged (arbitrary)
EXPECTED = 50  # choices per expert under an even load; with fewer, loads are not judged (arbitrary)
TOO_EVEN = 4.0  # standard deviations above random ids; trained routers lie beyond (arbitrary)
TOO_FEW_EXPERTS = 1.35  # effective number of experts, over k
DOCUMENTS = 5  # the least number of documents for judging last tokens (arbitrary)
MOST = 0.9  # of documents or tokens (arbitrary)
RUN = 4  # repetitions of an id at the end of a row that look like padding (arbitrary)
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "[PAD]", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong."""

    fault: str
    """One of the names of `FAULTS`."""
    layers: Sequence[int] = ()
    """Layers, by the model's own numbers; empty if it is not about layers."""
    rows: Sequence[int] = ()
    """The first rows of the capture where it occurs."""
    evidence: str
    """What was counted, in words."""


def zero_layers(looked: Looked) -> Iterator[Finding]:
    """Layers of zeros: not recorded, as happens with kernels that choose experts internally
    (vllm-project/vllm#54730)."""
    zero = _zero(looked)
    if zero.any() and not _leading(zero):
        yield Finding(
            fault="zero layers",
            layers=_numbers(looked, zero),
            rows=looked.first_rows["zero"],
            evidence=f"{_share(looked, looked.zero[zero])} of {looked.tokens:,} tokens have only expert 0 there: these"
            f" layers were not recorded, as happens with kernels that choose experts internally{_all(zero)}",
        )


def dense_layers(looked: Looked) -> Iterator[Finding]:
    """The first layers are zeros: they have no experts but were counted (verl-project/verl#5037)."""
    zero = _zero(looked)
    if _leading(zero):
        yield Finding(
            fault="dense layers counted",
            layers=_numbers(looked, zero),
            evidence=f"the first {zero.sum()} layers have only expert 0 in {_share(looked, looked.zero[zero])} of"
            f" {looked.tokens:,} tokens: layers without experts come first in many models; import with --layers"
            f" {int(zero.sum())}-..., and check that the other layers have the model's own numbers",
        )


def constant_layers(looked: Looked) -> Iterator[Finding]:
    """Layers at which all tokens have the same experts."""
    constant = (looked.changes.sum(1) <= (1 - NEARLY_ALL) * looked.pairs) & ~_zero(looked)
    if looked.pairs >= FEW_TOKENS and constant.any():
        yield Finding(
            fault="constant layers",
            layers=_numbers(looked, constant),
            evidence=f"at most {looked.changes[constant].max():,} of {looked.pairs:,} pairs of neighbouring tokens"
            " have different choices",
        )


def illegal_experts(looked: Looked) -> Iterator[Finding]:
    """Ids outside the range of experts."""
    if looked.illegal.any():
        yield Finding(
            fault="experts out of range",
            layers=_numbers(looked, looked.illegal > 0),
            rows=looked.first_rows["illegal"],
            evidence=f"{int(looked.illegal.sum()):,} choices of {looked.tokens:,} tokens have an expert id of"
            f" {looked.experts} or more; the model has experts 0 to {looked.experts - 1}",
        )


def twice_in_a_token(looked: Looked) -> Iterator[Finding]:
    """An expert is chosen twice by one token."""
    if looked.twice.any():
        yield Finding(
            fault="expert twice in a token",
            layers=_numbers(looked, looked.twice > 0),
            rows=looked.first_rows["twice"],
            evidence=f"{int(looked.twice.max()):,} of {looked.tokens:,} tokens choose the same expert twice at a layer",
        )


def equal_layers(looked: Looked) -> Iterator[Finding]:
    """A layer has the choices of another layer."""
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
    """A layer has the choices of another layer at the previous token."""
    if looked.sampled_pairs < FEW_TOKENS:
        return
    share = looked.shifted / looked.sampled_pairs
    for layer, other in np.argwhere(share >= NEARLY_ALL):
        if layer != other and _moving(looked, layer) and _moving(looked, other):
            yield Finding(
                fault="layer shifted by a token",
                layers=_places(looked, layer, other),
                evidence=f"layer {looked.layers[layer]} has the choices of layer {looked.layers[other]} at the"
                f" previous token in {share[layer, other]:.1%} of {looked.sampled_pairs:,} pairs of neighbouring"
                " tokens",
            )


def repeated_rows(looked: Looked) -> Iterator[Finding]:
    """Stretches with the routes of an earlier stretch that has different tokens (vllm-project/vllm#39568)."""
    stretches = np.concatenate(looked.stretches) if looked.stretches else np.zeros((0, 5), np.uint64)
    order = np.lexsort((stretches[:, 3], stretches[:, 0]))
    own, before = stretches[order][1:], stretches[order][:-1]
    others = (own[:, 1] != before[:, 1]) & (own[:, 2] != before[:, 2])  # one different token may have the same experts
    repeats = (own[:, 0] == before[:, 0]) & others
    if not repeats.any():
        return
    rows = np.unique(own[repeats, 3].astype(np.int64))
    first = own[repeats][0].astype(np.int64), before[repeats][0].astype(np.int64)
    yield Finding(
        fault="rows repeat an earlier batch",
        rows=rows[:5].tolist(),
        evidence=f"{int(repeats.sum()):,} of {len(stretches):,} stretches of {STRETCH} tokens have the routes of"
        f" another stretch at all layers although their tokens differ: row {first[0][3]} from position {first[0][4]}"
        f" has those of row {first[1][3]} from position {first[1][4]}; {len(rows):,} rows are affected",
    )


def padding_counted(looked: Looked) -> Iterator[Finding]:
    """Rows begin or end with many repetitions of the same id."""
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
            f" {own.max()} times, {own.sum():,} tokens in total: padding that is counted as text",
        )


def special_tokens_counted(looked: Looked, pieces: Sequence[str], special: Sequence[int]) -> Iterator[Finding]:
    """Tokens that do not stand for text are not marked as special."""
    counted = {number: pieces[number] for number in np.flatnonzero(looked.token_count) if pieces[number] in SPECIAL}
    left = {number: piece for number, piece in counted.items() if number not in special}
    if left:
        number = sum(int(looked.token_count[each]) for each in left)
        yield Finding(
            fault="special tokens counted",
            evidence=f"{', '.join(left.values())} occur {number:,} times among {looked.tokens:,} tokens but are not"
            " marked as special, so they are counted as text",
        )


def dummy_last_tokens(looked: Looked) -> Iterator[Finding]:
    """The last token's routes are dummies: zeros, those of the previous token, or the same in all documents."""
    last = np.concatenate(looked.last) if looked.last else np.zeros((0, 5), np.uint64)
    if len(last) < DOCUMENTS or _zero(looked).any():
        return
    values, number = np.unique(last[:, 2], return_counts=True)
    same = last[:, 2] == values[number.argmax()]
    other_ids = len(np.unique(last[same, 1])) >= 3
    found = {
        "zeros": last[:, 3] > 0,
        "those of the previous token, which has a different id": last[:, 4] > 0,
        "the same in all of them, although the tokens differ": same & other_ids,
    }
    for what, where in found.items():
        if where.sum() >= MOST * len(last):
            yield Finding(
                fault="dummy last tokens",
                rows=last[where, 0][:5].astype(int).tolist(),
                evidence=f"the last token's routes are {what}, in {int(where.sum()):,} of {len(last):,} documents:"
                " leave out the last token, or mark its routes as unknown",
            )
            return


def other_top_k(looked: Looked) -> Iterator[Finding]:
    """The capture holds more choices than the model makes, or numbers that do not match the model's name."""
    still = np.asarray((looked.changes <= (1 - NEARLY_ALL) * looked.pairs).all(axis=0))
    if looked.choices > 1 and looked.pairs >= FEW_TOKENS and still[-1] and not still[0]:
        real = int(np.flatnonzero(~still)[-1]) + 1
        yield Finding(
            fault="another top-k",
            evidence=f"choices {real + 1} to {looked.choices} of a token hardly ever change at any layer: top-k is"
            f" {real}, but {looked.choices} choices were stored",
        )
        return
    known = published(looked.model)
    for what, here, there in (
        ("experts per token", looked.choices, known and known.experts_per_token),
        ("experts per layer", looked.experts, known and known.num_experts),
    ):
        if known and there not in (None, here):
            yield Finding(
                fault="another top-k",
                evidence=f"the capture has {here} {what}, but {known.name} has {there}",
            )


def other_weights(looked: Looked) -> Iterator[Finding]:
    """Weights do not have the sum that is known for the model family."""
    if not looked.weighed or not looked.tokens:
        return
    known = published(looked.model) or Published(name="", num_experts=None, experts_per_token=None, total=None)
    low, high = looked.totals[:, 0], looked.totals[:, 1]
    steady = high - low <= 2 * WEIGHT_ROUNDING * np.maximum(np.abs(high), 1)
    if known.total is not None:
        off = np.maximum(np.abs(low - known.total), np.abs(high - known.total))
        wrong = off > 2 * WEIGHT_ROUNDING * known.total
        expected = f"those of {known.name} add up to {known.total:g}"
    else:  # the sum of softmax weights is at most 1, or the same for all tokens
        wrong = ~steady & ((high > known.largest * (1 + 2 * WEIGHT_ROUNDING)) | (low <= 0))
        expected = (
            f"{known.name or 'those of a softmax'} add up to at most {known.largest:g}, or always to the same value"
        )
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
            evidence=f"{int(looked.negative.max()):,} of {looked.tokens:,} tokens at a layer have a negative weight or"
            " weights that are not in descending order: these may be logits, or choices in a different order",
        )


def too_even(looked: Looked) -> Iterator[Finding]:
    """The load is as even as that of random ids, which never happens with a trained router."""
    count, expected = looked.count.astype(float), looked.tokens * looked.choices / looked.experts
    judged = ~_zero(looked)
    if expected < EXPECTED or looked.experts <= looked.choices or not judged.any():
        return
    own = count[judged] - count[judged].mean(1, keepdims=True)
    freedom = int(judged.sum()) * (looked.experts - 1)
    chi = float((own**2).sum() / expected / freedom)
    random = (looked.experts - looked.choices) / (looked.experts - 1)  # k of E drawn without replacement vary less
    if chi < random * (1 + TOO_EVEN * (2 / freedom) ** 0.5):
        yield Finding(
            fault="load too even",
            evidence=f"chi-squared of the experts' loads is {chi:.2f} per degree of freedom, and that of as many"
            f" random ids is {random:.2f} ({looked.tokens:,} tokens): an untrained router, or values that are not"
            " expert ids",
        )


def too_uneven(looked: Looked) -> Iterator[Finding]:
    """Nearly all tokens go to the same experts, or only some of the ids occur at all."""
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
            evidence=f"the effective number of experts at a layer is {effective[few].min():.2f}, and a token chooses"
            f" {looked.choices}: a collapsed router, or a layer that was not recorded",
        )
    unused = (looked.count == 0).all(0)
    used = looked.experts - int(unused.sum())
    if unused.any() and used <= looked.experts / 2 and not _zero(looked).all() and not few.any():
        yield Finding(
            fault="load too uneven",
            evidence=f"{used} of {looked.experts} experts occur at any layer, ids {np.flatnonzero(~unused)[0]} to"
            f" {np.flatnonzero(~unused)[-1]}: local ids of one rank, or ids of another model",
        )


def restarted(looked: Looked) -> Iterator[Finding]:
    """Generated tokens repeat the prompt's routes from its start."""
    equal, places = looked.restarts.tolist()
    moving = any(_moving(looked, layer) for layer in range(len(looked.layers)))
    if places >= FEW_TOKENS and equal >= MOST * places and moving:
        yield Finding(
            fault="generated tokens restart",
            rows=looked.restarted,
            evidence=f"{equal:,} of {places:,} generated tokens have the routes of the prompt token at the same place"
            " counted from the start, although the tokens differ: positions start again at 0 with generation",
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
"""Faults whose signs are also caused by another fault."""


def findings(looked: Looked, pieces: Sequence[str] = (), special: Sequence[int] = ()) -> list[Finding]:
    """All findings, without those that another finding explains.

    Parameters
    ----------
    looked
        The counts.
    pieces
        The tokenizer's pieces by id; empty if not known.
    special
        Ids that are marked as special.
    """
    found = [finding for fault in FAULTS for finding in fault(looked)]
    if len(pieces):
        found += special_tokens_counted(looked, pieces, special)
    hidden = set[str]().union(*(HIDES.get(finding.fault, set()) for finding in found))
    return [finding for finding in found if finding.fault not in hidden]


def _zero(looked: Looked) -> Array:
    """Layers of zeros; with one choice per token and few experts, a layer may prefer expert 0, but not this much."""
    return np.asarray((looked.zero >= NEARLY_ALL * looked.tokens) & (looked.tokens >= FEW_TOKENS))


def _leading(zero: Array) -> bool:
    """Whether the first layers are zeros, and no others."""
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
    return "; this holds for all layers" if chosen.all() else ""
