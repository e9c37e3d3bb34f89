"""What a report asks of each data set, in one scan, and what it asks of several together.

Promises: constant memory, also for large vocabularies and many experts; what is slow to count is counted over a part of
the documents, and says of how many tokens. Does not know what is said or drawn of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import xarray as xr

from analysis.caching import Caches
from analysis.choices import Choices
from analysis.contrast import ExpertCounts, contrast_counts, contrast_of, count_documents
from analysis.load import Load
from analysis.paths import MAX_WINDOWS, WindowCounts, Windows
from analysis.position import PositionLoad
from analysis.repetition import Repetition
from analysis.scan import Reducer, scan, sizes
from analysis.token_paths import TokenPaths, frequent_ids, telling
from analysis.tokens import TokenCounts, TopTokens
from analysis.uncertainty import Resampled, Thinned
from analysis.vocabulary import SampledRoutes, vocabulary_of
from analysis.weights import MeanWeights
from store import Coverage

WINDOW_LAYERS = 3
WINDOWS_LISTED = 10
TOKENS_LISTED = 8
TOKEN_ROWS = 4_096  # tokens listed for a data set: twice Mixtral's 32 layers of 8 experts (arbitrary)
TOKEN_MIN_COUNT = 20  # a lift of a rarer token is mostly luck (arbitrary)
REPLICATES, REPLICATED = 999, 2**24  # of a contrast's bootstrap and shuffles; and numbers held for them (128 MiB)
BAND_REPLICATES = 199  # behind other bands: ends that hold 95 % within 1.1 points (arbitrary)
LAGS = tuple(2**power for power in range(8))  # distances at which tokens are compared, as far as rows are so long
PATHS_CANDIDATES, PATHS_LISTED = 128, 16  # frequent tokens whose paths are counted, and that are shown (arbitrary)
PATHS_HELD = 2**24  # numbers held for candidates: 64 MiB a thread, and fewer candidates where there are many experts
CACHED_TOKENS = 2**20  # about; simulating caches takes as long as all other counting (arbitrary)
ROUTES_SAMPLED, NULL_DRAWS = 16_384, 50  # behind the null of specialization in words (arbitrary)

Ask = Callable[[Sequence[Reducer]], list[xr.Dataset]]


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The first answers about one data set."""

    label: str
    state: Coverage
    attrs: Mapping[str, Any]
    load: xr.Dataset
    resampled: xr.Dataset
    """Choices by layer and expert, over resampled documents (`replicate`)."""
    choices: xr.Dataset
    paths: xr.Dataset
    """The first choices and transitions of some tokens by themselves."""
    windows: xr.Dataset | None
    """None where the model has too few layers with experts."""
    surprising: xr.Dataset | None
    """The windows that their transitions predict worst."""
    tokens: xr.Dataset
    words: xr.Dataset
    """Vocabulary specialization."""
    repetition: xr.Dataset
    """At several lags, over resampled documents."""
    weights: xr.Dataset
    """Mean weights and margins, over resampled documents."""
    position: xr.Dataset
    caches: xr.Dataset
    counts: xr.Dataset | None
    """For the contrast with the other data sets of this model; None where there is none."""
    documents: int
    """That have a row."""


def answer(
    data: xr.Dataset, state: Coverage, label: str, ask: Ask | None = None, documents: Mapping[str, int] | None = None
) -> Answers:
    """Scan one capture once, as much of it as is there, or `ask` who knows the answers already.

    `documents` of each data set that this one, by its label, is contrasted with, itself included.
    """
    reducers = questions(data, state, label, documents)
    found = dict(zip(reducers, (ask or partial(scan, data))(list(reducers.values())), strict=True))
    table = found["token_counts"].assign_attrs(n=found["load"].attrs["n"])
    replicates = (found["counts"].sizes["replicate"] - 1) // (1 + len(documents or ()))
    return Answers(
        label=label,
        state=state,
        attrs=data.attrs,
        load=found["load"],
        resampled=found["counts"].isel(replicate=slice(0, replicates + 1)),
        choices=found["choices"],
        paths=telling(found["paths"], found["load"], PATHS_LISTED, min_count=TOKEN_MIN_COUNT),
        windows=_top_windows(found.get("windows"), data, "count"),
        surprising=_top_windows(found.get("windows"), data, "surprise"),
        tokens=_top_tokens(table, data),
        words=vocabulary_of(
            table, found["routes"].sel(layer=table["layer"]), min_count=TOKEN_MIN_COUNT, draws=NULL_DRAWS
        ),
        **{name: found[name] for name in ("repetition", "weights", "position", "caches")},
        counts=found["counts"] if documents else None,
        documents=count_documents(data),
    )


def questions(data: xr.Dataset, state: Coverage, label: str, documents: Mapping[str, int] | None) -> dict[str, Reducer]:
    """What one scan counts; parameters as those of `answer`."""
    layers, _, experts = sizes(data)
    candidates = min(PATHS_CANDIDATES, PATHS_HELD // (layers * experts**2))
    replicates = REPLICATED // (layers * experts * (1 + len(documents or ())))
    replicates = min(REPLICATES, max(99, replicates))
    asked: dict[str, Reducer] = {
        "load": Load(),
        "choices": Choices(),
        "token_counts": TokenCounts(token_layers(data)),
        "paths": TokenPaths(frequent_ids(data, candidates)),
        "routes": SampledRoutes(ROUTES_SAMPLED),
        "repetition": Resampled(Repetition(lags(data), joint=False), BAND_REPLICATES),
        "weights": Resampled(MeanWeights(), BAND_REPLICATES),
        "position": PositionLoad("doubling"),
        "caches": Thinned(Caches(policies=("lru", "belady")), min(1.0, CACHED_TOKENS / max(1, state.tokens_done))),
        "counts": Resampled(ExpertCounts(), replicates),
    }
    if documents:
        asked["counts"] = contrast_counts(documents, label, replicates)
    if size := window_layers(data):
        asked["windows"] = WindowCounts(size)
    return asked


def _top_windows(counts: xr.Dataset | None, data: xr.Dataset, by: Literal["count", "surprise"]) -> xr.Dataset | None:
    """The first windows in that order; None where there are too few layers for any."""
    if counts is None:
        return None
    counted = {name: counts[name].values for name in ("count", "tokens")}
    return Windows(window_layers(data), WINDOWS_LISTED, by).finish(counted, data)


def _top_tokens(counts: xr.Dataset, data: xr.Dataset) -> xr.Dataset:
    """The tokens of each expert, from what was counted at some layers."""
    top = TopTokens(top=TOKENS_LISTED, by="lift", min_count=TOKEN_MIN_COUNT)
    index = np.flatnonzero(np.isin(data["layer"].values, counts["layer"].values))
    return top.finish({"count": counts["count"].values, "tokens": counts["tokens"].values, "index": index}, data)


def window_layers(data: xr.Dataset) -> int:
    """Layers of a window: three, or as many as can be counted exactly; 0 where no two layers have experts."""
    layers, _, experts = sizes(data)
    fitting = (n for n in range(min(WINDOW_LAYERS, layers), 1, -1) if (layers - n + 1) * experts**n <= MAX_WINDOWS)
    return next(fitting, 0)


def lags(data: xr.Dataset) -> tuple[int, ...]:
    """Distances at which tokens are compared: the next one, and further ones that a row is long enough for."""
    return tuple(lag for lag in LAGS if lag == 1 or lag < data.sizes["position"])


def token_layers(data: xr.Dataset) -> list[int]:
    """The layers whose tokens are listed: all, or as many, evenly spread, as keep the page small."""
    layers, _, experts = sizes(data)
    room = max(1, TOKEN_ROWS // (experts * TOKENS_LISTED))
    at = np.unique(np.linspace(0, layers - 1, min(room, layers)).round().astype(int))
    return [int(number) for number in data["layer"].values[at]]


def contrasted(captures: Mapping[str, xr.Dataset]) -> dict[str, int]:
    """The data sets that are of the first one's model, with their documents; none where that is alone."""
    first = next(iter(captures.values()))

    def model(data: xr.Dataset) -> tuple[object, ...]:
        return data.attrs.get("model"), *sizes(data), *data["layer"].values.tolist()

    alike = {label: count_documents(data) for label, data in captures.items() if model(data) == model(first)}
    return alike if len(alike) > 1 else {}


def contrast_between(answers: Sequence[Answers]) -> xr.Dataset | None:
    """How the data sets of one model differ, as far as they were counted for it; None where fewer than two were."""
    compared = {each.label: each for each in answers if each.counts is not None and each.load.attrs["n"]}
    if len(compared) < 2:
        return None
    counts = {label: each.counts for label, each in compared.items() if each.counts is not None}
    documents = {label: each.documents for label, each in compared.items()}
    return contrast_of(counts, documents, next(iter(compared.values())).load.sizes["k"])
