"""The picture of paths: all tokens of each data set, and a choice of single tokens."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import xarray as xr

from analysis.charts.paths import Way, path_chart
from analysis.charts.theme import visible
from analysis.metrics.choices import Choices, transitions_of
from analysis.metrics.paths import MAX_WINDOWS, WindowCounts, frequent_windows_of
from analysis.metrics.sample import SampledRoutes
from analysis.metrics.token_paths import TokenPaths, frequent_ids, telling
from analysis.report.figures import Figure, Option, about, figure
from analysis.report.passages import SAMPLED
from analysis.report.section import TOKEN_MIN_COUNT, Answers, Asked, Found, Section
from analysis.report.sections import load
from analysis.scanning import Reducer, sizes

WINDOW_LAYERS, WINDOWS_LISTED = 3, 10
PATHS_CANDIDATES, PATHS_LISTED = 128, 16  # frequent tokens whose paths are counted, and those shown (arbitrary)
PATHS_HELD = 2**24  # numbers held for candidates: 64 MiB per thread; fewer candidates if there are many experts


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Choices at neighbouring layers, for all tokens and for some; windows of layers, and a sample for examples."""
    layers, _, experts = sizes(asked.data)
    candidates = min(PATHS_CANDIDATES, PATHS_HELD // (layers * experts**2))
    size = window_layers(asked.data)
    return {
        **load.ask(asked),
        "choices": Choices(),
        "paths": TokenPaths(frequent_ids(asked.data, candidates)),
        "sample": SampledRoutes(SAMPLED),
        **({"windows": WindowCounts(size)} if size else {}),
    }


def answer(found: Found, asked: Asked) -> Found:
    """`choices`; `sample`; `paths` of the tokens that differ most from all tokens; and, if there are enough layers,
    `windows`, the most frequent ones, and `surprising`, those that their transitions predict worst."""
    listed = {name: found[name] for name in ("choices", "sample")}
    listed["paths"] = telling(found["paths"], found["load"], PATHS_LISTED, min_count=TOKEN_MIN_COUNT)
    if "windows" in found:
        listed["windows"] = frequent_windows_of(found["windows"], top=WINDOWS_LISTED)
        listed["surprising"] = frequent_windows_of(found["windows"], top=WINDOWS_LISTED, by="surprise")
    return listed


def window_layers(data: xr.Dataset) -> int:
    """Layers of a window: three, or as many as can be counted exactly; 0 if fewer than two layers have experts."""
    layers, _, experts = sizes(data)
    fitting = (n for n in range(min(WINDOW_LAYERS, layers), 1, -1) if (layers - n + 1) * experts**n <= MAX_WINDOWS)
    return next(fitting, 0)


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """One picture for each model, that is, for data sets with the same layers and experts."""
    models: dict[tuple[int, ...], list[Answers]] = {}
    for each in answers:
        models.setdefault((each["load"].sizes["expert"], *each["load"]["layer"].values.tolist()), []).append(each)
    for alike in models.values():
        ways = [way for each in alike for way in _ways(each)]
        drawn, subtitles = path_chart([way for way, _ in ways])
        options = [
            Option(value=value, subtitle=subtitles[value], for_papers=way.whole, **words)
            for value, (way, words) in enumerate(ways)
        ]
        name = "paths" if len(models) == 1 else f"paths-{alike[0].label}"
        result = transitions_of(alike[0]["choices"])
        spread = "none; a link is drawn if chance would reach that far above with a probability of at most 2**-10"
        yield figure("paths", name, options[0].caption, drawn, about(result, spread), by="way", options=options)


def _ways(each: Answers) -> Iterator[tuple[Way, dict[str, Any]]]:
    """All tokens of a data set, then single tokens, each with its names."""
    label, every = visible(each.label), "all tokens"
    first, followed = each["load"]["counts"].isel(k=0, drop=True), each["choices"]["followed_first"]
    way = Way(counted="tokens", n=each["load"].attrs["n"], first=first, followed=followed)
    named = {"group": label, "label": every, "caption": f"{label}: {every}", "name": each.label}
    yield way, {**named, "row": {"data_set": label, "token": every}}
    for index in range(each["paths"].sizes["token_id"]):
        own = each["paths"].isel(token_id=index)
        piece, n = visible(str(own["piece"].item())), int(own["tokens"])
        layer, expert = int(own["telling_layer"]), int(own["telling_expert"])
        share = int(own["first"].sel(layer=layer, expert=expert)) / n
        quoted = f"“{piece}”"
        way = Way(counted=quoted, n=n, first=own["first"], followed=own["followed"], whole=False)
        named = {
            "label": f"{piece}  {n:,}×, {share:.0%} to {layer}:{expert}",
            "caption": f"{label}: {quoted}, {share:.0%} to expert {expert} at layer {layer}",
        }
        named |= {"group": label, "name": f"{each.label}-{piece}"}
        yield way, {**named, "row": {"data_set": label, "token": piece}}


SECTION = Section(
    id="paths",
    title="Paths",
    reading="Links lead from each expert to the experts that the same tokens choose first at the next layer. Only"
    " links clearly above chance are drawn: darker the further above, and wider the more tokens take them. The size of"
    " a circle is the expert's share of the first choices. Hover over an expert to see only its links. Choose a data"
    " set and one of its tokens to see the token's path. Half of the listed tokens are the most frequent, the others"
    " differ most from the path of all tokens (“87% to 5:3” means that 87% go to expert 3 at layer 5).",
    ask=ask,
    answer=answer,
    draw=draw,
)
