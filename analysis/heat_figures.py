"""The charts of a report that each data set has of its own: load, tokens, contrast, repetition by layer."""

from collections.abc import Iterator, Sequence

import xarray as xr

from analysis.answers import Answers
from analysis.figures import Choice, Figure, about, figure, resampled
from analysis.heat_charts import contrast_heatmap, load_heatmap, load_spread, repetition_heatmap
from analysis.line_figures import repeated
from analysis.load import share_of_experts
from analysis.token_charts import token_chart
from analysis.uncertainty import interval


def load(answers: Sequence[Answers]) -> Iterator[Figure]:
    """Load by layer and expert, on one colour scale."""
    spread = load_spread(*(each.load for each in answers))
    for each in answers:
        ends = interval(share_of_experts(each.resampled["count"]))
        drawn = load_heatmap(each.load, ends, spread=spread)
        yield figure("load", f"load-{each.label}", each.label, drawn, about(each.load, resampled(each.resampled)))


def tokens(each: Answers) -> Figure:
    """The tokens of each expert, a layer at a time."""
    layers = [int(layer) for layer in each.tokens["layer"].values]
    return figure(
        "tokens",
        f"tokens-{each.label}",
        each.label,
        token_chart(each.tokens),
        about(each.tokens, "none: a lift is listed where its token occurs 20 times or more"),
        by="layer",
        choices=[Choice(value=layer, name=f"layer-{layer}", row={"layer": layer}) for layer in layers],
    )


def domains(apart: xr.Dataset | None) -> Iterator[Figure]:
    """How the data sets differ; nothing where there is nothing to compare."""
    if apart is None:
        return
    spread = max(float(abs(apart["difference"]).max()), 0.05)
    told = about(apart, f"95 %, {apart.attrs['replicates']} resamples of whole documents, in the numbers of each cell")
    for label in apart["data_set"].values.tolist():
        drawn = contrast_heatmap(apart, label, spread=spread)
        yield figure("domains", f"domains-{label}", label, drawn, told)


def repetition_by_layer(answers: Sequence[Answers]) -> Iterator[Figure]:
    """Repetition at each layer and distance, a heat map for each data set."""
    found, spread = {}, 0.05
    for each in answers:
        null = each.repetition["any_shared"].attrs["null"]
        found[each.label] = interval(each.repetition["any_shared"]).assign_attrs(null=null)
        spread = max(spread, float(abs(found[each.label]["estimate"] - null).max()))
    for each in answers:
        drawn = repetition_heatmap(found[each.label], each.repetition.attrs["pairs_by_lag"], spread=spread)
        told = about(repeated(each, "any_shared"), resampled(each.repetition))
        yield figure("repetition", f"repetition-{each.label}", each.label, drawn, told)
