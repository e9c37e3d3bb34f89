"""The effect of changed choices on predictions, if there is a capture of the same text without the change."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
import xarray as xr

from analysis.charts.effects import Read, class_rows, effect_chart, losing_chart, passage_chart
from analysis.charts.theme import rounded, visible
from analysis.metrics.effect import effect
from analysis.metrics.predictions import SampledPredictions, common_rows
from analysis.report.figures import ALL, Figure, about, figure
from analysis.report.section import Answers, Asked, Finding, Found, Section
from analysis.scanning import Reducer
from analysis.statistics.jackknife import BLOCKS
from analysis.token_classes import text_of
from store import model_differences
from store.identity import changes_in_words

CHANGES = {"mask", "force", "top_k", "routes_from", "routes_weights", "experts_per_token"}
"""Fields in which a capture with changed choices may differ from the one without."""
SURE = 0.05
TOKENS_LISTED = 12
PASSAGES = 2  # of the largest losses, each from a different row (arbitrary)
BEFORE, AFTER = 60, 60  # tokens of a passage around the largest loss (arbitrary)
FULL_NATS = 0.5  # the least value of full colour (arbitrary)
INTERVAL = "95%, jackknife over documents, for each class separately"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A capture with changed choices, and one without, of the same text by the same model."""

    one: Answers
    other: Answers
    changed: str
    """What was changed, in words."""
    rows: tuple[xr.Dataset, xr.Dataset]
    """Samples of both at the same places."""

    @property
    def name(self) -> str:
        """The data sets, the changed one first."""
        return f"{self.other.label} beside {self.one.label}"

    @property
    def page(self) -> str:
        """The explorer's comparison of the changed data set with the other one, if one explorer has both."""
        same = self.one.store == self.other.store
        return f"compare/{quote(self.one.state.dataset)}" if same else ""

    @property
    def counted(self) -> str:
        """How many tokens are compared, and the total if that is a sample, in words."""
        n, of = (self.rows[0]["expert"] == 0).sum().item(), self.other["predictions"].attrs["of"]
        return f"{n:,} tokens" if n == of else f"{n:,} of {of:,} tokens, in a sample of whole documents"


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """A sample of documents with their log-probabilities, if they were recorded."""
    return {"predictions": SampledPredictions()} if "logprob" in asked.data else {}


def answer(found: Found, asked: Asked) -> Found:
    """The same, with blocks of tokens instead of documents if requested."""
    if asked.block_tokens is None or "predictions" not in found:
        return found
    rows = found["predictions"]
    blocks = rows["document_id"] * BLOCKS + rows["offset"] // asked.block_tokens
    return {"predictions": rows.assign(document_id=blocks)}


def pairs_in(answers: Sequence[Answers]) -> Iterator[Pair]:
    """Each data set whose choices were changed, with the first one of the same text and model whose were not."""
    having = [each for each in answers if each.get("predictions") is not None]
    plain = [each for each in having if not changes_in_words(each.attrs)]
    for other in having:
        changed = changes_in_words(other.attrs)
        beside = [one for one in plain if model_differences(one.attrs, other.attrs).keys() <= CHANGES]
        for one in beside if changed else ():
            if rows := common_rows(one["predictions"], other["predictions"]):
                yield Pair(one=one, other=other, changed=changed, rows=rows)
                break


def findings(answers: Sequence[Answers]) -> Iterator[Finding]:
    """The effect of a change beyond chance, for each pair where it is known."""
    for pair in pairs_in(answers):
        found = effect(*pair.rows, classes=(), places=1)
        low, high = float(found["low"]), float(found["high"])
        if float(found["p"]) <= SURE and low * high > 0:
            worse, (near, far) = "worse" if high < 0 else "better", sorted(map(abs, (low, high)))
            yield Finding(
                said=f"{pair.other.label} ({pair.changed}) predicts {worse} than {pair.one.label}, by"
                f" {abs(float(found['effect'])):.4f} nats per token ({near:.4f} to {far:.4f}, 95% interval over"
                f" documents; p = {float(found['p']):.4f}; {pair.counted}).",
                of=pair.other,
                page=pair.page,
            )


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """For each pair the effect by class, the tokens with the largest losses, and passages; and all pairs side by
    side."""
    pairs = list(pairs_in(answers))
    effects = [effect(*pair.rows, places=PASSAGES) for pair in pairs]
    if len(pairs) > 1:
        yield _beside(pairs, effects)
    for pair, found in zip(pairs, effects, strict=True):
        by_class = effect_chart(
            class_rows(found),
            over="class",
            title="Effect on predictions by token class",
            subtitle=[pair.changed, f"n = {pair.counted}; pale if p > 0.05"],
            description="The effect on predictions by class of the predicted token, with intervals.",
        )
        untested = f"none: {found.attrs['untested']}" if found.attrs["untested"] else INTERVAL
        definition = about(found, f"{untested}; p-values of classes are corrected for all classes")
        yield figure("effect", f"effect-{pair.other.label}", pair.name, by_class, definition)
        pieces = [str(piece) for piece in pair.rows[0]["piece"].values]
        drawn = losing_chart(found, pieces, top=TOKENS_LISTED)
        if drawn.rows["points"]:
            yield figure("effect", f"losing-{pair.other.label}", pair.name, drawn, about(found, "none: a list"))
        yield from _passages(pair, found, pieces)


def _beside(pairs: Sequence[Pair], effects: Sequence[xr.Dataset]) -> Figure:
    """The effect of each pair."""
    rows: list[dict[str, Any]] = [
        {
            "data_set": visible(f"{pair.other.label}: {pair.changed}"),
            **{name: rounded(found[name]) for name in ("effect", "low", "high", "p")},
            "tokens": int(found.attrs["n"]),
        }
        for pair, found in zip(pairs, effects, strict=True)
    ]
    drawn = effect_chart(
        rows,
        over="data_set",
        title="Effect on predictions by data set",
        subtitle=[f"n = {sum(row['tokens'] for row in rows):,} predicted tokens; pale if p > 0.05"],
        description="The effect on predictions of each capture with changed choices, with intervals.",
    )
    return figure("effect", "effects", ALL, drawn, about(effects[0], f"{INTERVAL.partition(', of')[0]}, of each"))


def _passages(pair: Pair, found: xr.Dataset, pieces: Sequence[str]) -> Iterator[Figure]:
    """Text around the largest losses."""
    one, other = pair.rows
    difference = (other["logprob"] - one["logprob"]).astype(float).values
    spread = max(FULL_NATS, float(np.nanquantile(abs(difference), 0.98)))
    for row, at in zip(found["row"].values.tolist(), found["position"].values.tolist(), strict=True):
        start, stop = max(0, at - BEFORE), min(int(one["length"][row]), at + AFTER)
        effects = [np.nan, *difference[row, :-1].tolist()]
        tokens = one["token"].values[row]
        passage = [Read(text=_readable(pieces[tokens[p]]), effect=effects[p]) for p in range(start, stop)]
        drawn = passage_chart(passage, spread=spread, title="Text around the largest losses")
        definition = about(found, "none: a passage around one of the largest losses")
        yield figure("effect", f"passage-{pair.other.label}-{row}", pair.name, drawn, definition)


def _readable(piece: str) -> str:
    """A piece as readable text; a byte of a longer character is �."""
    return text_of(piece).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


SECTION = Section(
    id="effect",
    title="Effect of changed choices on predictions",
    reading="A capture with masked, forced or given experts, compared with one of the same text without them: the"
    " log-probability of each token with the change minus that without, in nats. Below 0, the change makes predictions"
    " worse. Documents are the units of intervals and p-values; the classes are those of the predicted token.",
    ask=ask,
    draw=draw,
    answer=answer,
    findings=findings,
)
