"""The tokens of each expert, one layer at a time."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from analysis.charts.tokens import token_chart
from analysis.metrics.excess import token_excess_of
from analysis.metrics.sample import SampledRoutes
from analysis.metrics.tokens import TokenCounts, expert_tokens_of
from analysis.metrics.vocabulary import ShuffledTokenCounts
from analysis.report.figures import Figure, Option, about, figure
from analysis.report.section import TOKEN_MIN_COUNT, Answers, Asked, Found, Section
from analysis.scanning import Reducer, sizes

TOKENS_LISTED = 8
TOKEN_ROWS = 4_096  # tokens listed per data set: twice Mixtral's 32 layers of 8 experts (arbitrary)
ROUTES_SAMPLED = 65_536  # tokens of whole documents, in which tokens and experts are compared (arbitrary)


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """How often each token went to each expert, at the listed layers; the same shuffled, and a sample of documents."""
    layers = token_layers(asked.data)
    return {
        "token_counts": TokenCounts(layers),
        "shuffled_tokens": ShuffledTokenCounts(layers),
        "routes": SampledRoutes(ROUTES_SAMPLED, layers),
    }


def answer(found: Found, asked: Asked) -> Found:
    """`tokens`: the first ones of each expert; `token_excess`: the excess over what documents explain."""
    counts, shuffled = found["token_counts"], found["shuffled_tokens"]
    listed = expert_tokens_of(counts, top=TOKENS_LISTED, by="lift", min_count=TOKEN_MIN_COUNT, shuffled=shuffled)
    return {"tokens": listed, "token_excess": token_excess_of(found["routes"], min_count=TOKEN_MIN_COUNT)}


def token_layers(data: xr.Dataset) -> list[int]:
    """The layers whose tokens are listed: all or, to keep the page small, an evenly spaced selection."""
    layers, _, experts = sizes(data)
    room = max(1, TOKEN_ROWS // (experts * TOKENS_LISTED))
    at = np.unique(np.linspace(0, layers - 1, min(room, layers)).round().astype(int))
    return [int(number) for number in data["layer"].values[at]]


def reading(answers: Sequence[Answers]) -> str:
    """How to read the section; says so if not all layers are listed."""
    listed = {int(number) for each in answers for number in each["tokens"]["layer"].values}
    many = len({int(number) for each in answers for number in each["load"]["layer"].values})
    some = f" (at {len(listed)} of {many} layers: all would make the page too large)" if len(listed) < many else ""
    return (
        f"The tokens with the largest lift at each expert{some}. A token may be listed because of the"
        " documents it is in. Its colour is the lift within documents: its count relative to the count when tokens are"
        " shuffled within documents. Pale means that the documents explain it. ▁ is a space, <0x0A> a line feed."
    )


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """A chart for each data set."""
    return map(_listed, answers)


def _listed(each: Answers) -> Figure:
    """The tokens of each expert, one layer at a time."""
    layers = [int(layer) for layer in each["tokens"]["layer"].values]
    return figure(
        "tokens",
        f"tokens-{each.label}",
        each.label,
        token_chart(each["tokens"]),
        about(each["tokens"], f"none: a lift is listed if its token occurs at least {TOKEN_MIN_COUNT} times"),
        by="layer",
        options=[Option(value=layer, name=f"layer-{layer}", row={"layer": layer}) for layer in layers],
    )


SECTION = Section(id="tokens", title="Tokens of each expert", reading=reading, ask=ask, answer=answer, draw=draw)
