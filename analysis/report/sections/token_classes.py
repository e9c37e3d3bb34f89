"""The experts of token classes: digits, punctuation, words in capitals."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from analysis.charts.classes import class_heatmap
from analysis.metrics.class_experts import ClassCounts, class_excess_of, strongest_experts_of
from analysis.metrics.token_paths import frequent_ids
from analysis.report.figures import Figure, about, figure
from analysis.report.section import TOKEN_MIN_COUNT, Answers, Asked, Finding, Found, Section
from analysis.report.sections import tokens
from analysis.report.sections.contrast import of_expert
from analysis.scanning import Array, Reducer
from analysis.statistics.jackknife import Jackknife
from analysis.token_classes import CLASSES, SAID, members_by_class

LEFT_OUT = ("letters",)  # they make up most of a text
IDS_LOOKED_AT = 4_096  # the most frequent tokens, among which a class must have one (arbitrary)
TOLD = 4  # classes named in words for each data set (arbitrary)
SURE = 0.05  # probability that a class is named although documents explain all of them (Bonferroni)


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Counts of the classes that occur, by units of documents, and the tokens' section's sample of documents."""
    found: dict[str, Reducer] = {"routes": tokens.ask(asked)["routes"]}
    if members := members_in(asked.data):
        found["class_counts"] = Jackknife(ClassCounts(members), block_tokens=asked.block_tokens)
    return found


def members_in(data: xr.Dataset) -> dict[str, Array]:
    """The classes that have a frequent token, and the tokens in each."""
    pieces = data["piece"].values
    frequent = pieces[frequent_ids(data, IDS_LOOKED_AT)].tolist()
    occur = [name for name, own in members_by_class(CLASSES, frequent).items() if name not in LEFT_OUT and own.any()]
    return members_by_class(occur, pieces.tolist())


def answer(found: Found, asked: Asked) -> Found:
    """`classes`: the strongest expert of each; `class_excess`: the excess over what documents explain."""
    if "class_counts" not in found:
        return {}
    counts = found["class_counts"]
    often = counts["tokens"].isel(replicate=0).values >= TOKEN_MIN_COUNT
    if not often.any():
        return {}
    counts = counts.isel(token_class=np.flatnonzero(often))
    members = {name: own for name, own in members_in(asked.data).items() if name in counts["token_class"].values}
    return {
        "classes": strongest_experts_of(counts, min_count=TOKEN_MIN_COUNT),
        "class_excess": class_excess_of(found["routes"], members, min_count=TOKEN_MIN_COUNT),
    }


def findings(answers: Sequence[Answers]) -> Iterator[Finding]:
    """For each data set the classes that go to an expert more often than documents explain, if there are any."""
    yield from filter(None, (tell(each) for each in answers if each.get("class_excess") is not None))


def tell(each: Answers) -> Finding | None:
    """The classes that go to an expert by the most points more than documents explain, if most of their tokens do, one
    for each expert; None if there is none."""
    found = each["class_excess"]
    share = found["counts"] / found["tokens"]
    sure = (found["p"] * found["p"].size <= SURE) & (share > 1 / 2)  # Bonferroni
    more = (share - found["expected"] / found["tokens"]).where(sure).fillna(0.0)
    best = [own.isel(own.argmax(("layer", "expert"))) for own in more]
    told: dict[tuple[int, int], xr.Dataset] = {}
    for cell in sorted((cell for cell in best if float(cell) > 0), key=lambda cell: -float(cell)):
        place = {name: cell[name].item() for name in ("token_class", "layer", "expert")}
        told.setdefault((place["layer"], place["expert"]), found.sel(place))
    if not told:
        return None
    cells, n, of = list(told.values())[:TOLD], found.attrs["n"], found.attrs["of"]
    sampled = f" in {n:,} of its {of:,} tokens, a sample of whole documents," * (n < of)
    said = f"{each.label}:{sampled} {'; '.join(map(_told, cells))}."
    return of_expert(f"{said} In brackets: the share when tokens are shuffled within their documents.", each, cells[0])


def _told(cell: xr.Dataset) -> str:
    share, usual = (float(cell[name] / cell["tokens"]) for name in ("counts", "expected"))
    which, layer, expert = (cell[name].item() for name in ("token_class", "layer", "expert"))
    tokens = f"{int(cell['tokens']):,} {SAID.get(which, which)}"
    return f"{share:.0%} of {tokens} at layer {layer} go to expert {expert} ({usual:.0%})"


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """A chart for each data set in which a class occurs often enough."""
    interval = "95%, for each cell separately, listed with the numbers of each cell"
    for each in answers:
        if (found := each.get("classes")) is not None:
            yield figure("classes", f"classes-{each.label}", each.label, class_heatmap(found), about(found, interval))


SECTION = Section(
    id="classes",
    title="Experts of token classes",
    reading="For each layer and token class, the number of the expert with the highest lift for the class;"
    " the colour shows the lift, the share of the class relative to the share of all tokens. Pale cells may be chance."
    " A token can be in several classes: “the” is lowercase and word-initial, and “for” counts as a keyword in prose"
    " too. Intervals are for each cell separately.",
    ask=ask,
    answer=answer,
    draw=draw,
    findings=findings,
)
