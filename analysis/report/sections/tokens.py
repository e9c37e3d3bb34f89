"""The tokens of each expert, a layer at a time."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from analysis.charts.tokens import token_chart
from analysis.metrics.tokens import TokenCounts, expert_tokens_of
from analysis.report.figures import Figure, Option, about, figure
from analysis.report.section import TOKEN_MIN_COUNT, Answers, Asked, Found, Section
from analysis.scanning import Reducer, sizes

TOKENS_LISTED = 8
TOKEN_ROWS = 4_096  # tokens listed for a data set: twice Mixtral's 32 layers of 8 experts (arbitrary)


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """How often each token went to each expert, at the layers that are listed."""
    return {"token_counts": TokenCounts(token_layers(asked.data))}


def answer(found: Found, asked: Asked) -> Found:
    """`tokens`: the first ones of each expert."""
    counts = found["token_counts"]
    return {"tokens": expert_tokens_of(counts, top=TOKENS_LISTED, by="lift", min_count=TOKEN_MIN_COUNT)}


def token_layers(data: xr.Dataset) -> list[int]:
    """The layers whose tokens are listed: all, or as many, evenly spread, as keep the page small."""
    layers, _, experts = sizes(data)
    room = max(1, TOKEN_ROWS // (experts * TOKENS_LISTED))
    at = np.unique(np.linspace(0, layers - 1, min(room, layers)).round().astype(int))
    return [int(number) for number in data["layer"].values[at]]


def reading(answers: Sequence[Answers]) -> str:
    """Says so where not all layers are listed."""
    listed = {int(number) for each in answers for number in each["tokens"]["layer"].values}
    many = len({int(number) for each in answers for number in each["load"]["layer"].values})
    some = f" (at {len(listed)} of {many} layers: all would make the page too large)" if len(listed) < many else ""
    return f"The tokens that an expert gets most out of proportion{some}. ▁ is a space, <0x0A> a line feed."


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """A chart for each data set."""
    return map(_listed, answers)


def _listed(each: Answers) -> Figure:
    """The tokens of each expert, a layer at a time."""
    layers = [int(layer) for layer in each["tokens"]["layer"].values]
    return figure(
        "tokens",
        f"tokens-{each.label}",
        each.label,
        token_chart(each["tokens"]),
        about(each["tokens"], "none: a lift is listed where its token occurs 20 times or more"),
        by="layer",
        options=[Option(value=layer, name=f"layer-{layer}", row={"layer": layer}) for layer in layers],
    )


SECTION = Section(id="tokens", title="Tokens of each expert", reading=reading, ask=ask, answer=answer, draw=draw)
