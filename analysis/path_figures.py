"""The picture of paths: all tokens of each data set, and some of its tokens by themselves, to choose from."""

from collections.abc import Iterator, Sequence
from typing import Any

from analysis.answers import Answers
from analysis.charts import visible
from analysis.choices import transitions_of
from analysis.figures import Choice, Figure, about, figure
from analysis.path_charts import Way, path_chart


def paths(answers: Sequence[Answers]) -> Iterator[Figure]:
    """A picture for each model: what has the same layers and experts."""
    models: dict[tuple[int, ...], list[Answers]] = {}
    for each in answers:
        models.setdefault((each.load.sizes["expert"], *each.load["layer"].values.tolist()), []).append(each)
    for alike in models.values():
        ways = [way for each in alike for way in _ways(each)]
        drawn, told = path_chart([way for way, _ in ways])
        choices = [
            Choice(value=value, subtitle=told[value], for_papers=way.whole, **words)
            for value, (way, words) in enumerate(ways)
        ]
        name = "paths" if len(models) == 1 else f"paths-{alike[0].label}"
        result = transitions_of(alike[0].choices)
        spread = "none; a link is drawn where chance alone would be as far above with probability 2**-10 at most"
        yield figure("paths", name, choices[0].caption, drawn, about(result, spread), by="way", choices=choices)


def _ways(each: Answers) -> Iterator[tuple[Way, dict[str, Any]]]:
    """All tokens of a data set, then some by themselves, each with what names it."""
    label, every = visible(each.label), "all tokens"
    first, followed = each.load["count"].isel(k=0, drop=True), each.choices["followed_first"]
    way = Way(counted="tokens", n=each.load.attrs["n"], first=first, followed=followed)
    named = {"group": label, "label": every, "caption": f"{label}: {every}", "name": each.label}
    yield way, {**named, "row": {"data_set": label, "token": every}}
    for index in range(each.paths.sizes["token_id"]):
        own = each.paths.isel(token_id=index)
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
