"""How much each expert contributes, if the norms of outputs were recorded."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.charts.heatmaps import saliency_heatmap
from analysis.metrics.saliency import LargestSaliency, Saliency, saliency_of
from analysis.report.figures import Figure, about, figure
from analysis.report.section import Answers, Asked, Finding, Found, Section
from analysis.report.sections.contrast import means_between, of_expert, the_others
from analysis.scanning import Reducer
from analysis.statistics.jackknife import Jackknife, how

STANDS_OUT = (
    10.0  # times the median of a layer's largest norms (arbitrary; Super Experts are hundreds of times above it)
)


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """Saliency by units of documents, and the largest norms; nothing without norms or weights."""
    if "output_norm" not in asked.data or not asked.weighed:
        return {}
    return {
        "saliency_counts": Jackknife(Saliency(), block_tokens=asked.block_tokens),
        "saliency_largest": LargestSaliency(),
    }


def answer(found: Found, asked: Asked) -> Found:
    """`saliency` with intervals, and the means of the counts, for comparing data sets."""
    if not found:
        return {}
    counts = found["saliency_counts"]
    return {
        "saliency": saliency_of(counts, found["saliency_largest"]),
        "saliency_counts": counts[["mean_saliency", "tokens"]],
    }


def findings(answers: Sequence[Answers]) -> Iterator[Finding]:
    """The expert whose outputs stand out, and where the data sets differ beyond chance."""
    having = [each for each in answers if each.get("saliency") is not None]
    yield from filter(None, [stands_out(having), contributes_more(having)])


def stands_out(answers: Sequence[Answers]) -> Finding | None:
    """The expert whose largest output norm is far above those of its layer; None if there is none."""
    best, finding = STANDS_OUT, None
    for each in answers:
        largest = each["saliency"]["largest_norm"]
        median = largest.median("expert")
        times = (largest / median.where(median > 0)).fillna(0.0)
        if times.size and float(times.max()) > best:
            best, at = float(times.max()), times.argmax(("layer", "expert"))
            cell = largest.isel(at)
            said = (
                f"In {each.label}, the largest output of expert {int(cell['expert'])} at layer {int(cell['layer'])} has"
                f" a norm of {float(cell):.4g}, {best:.0f} times the median over the layer's experts."
            )
            finding = of_expert(said, each, cell)
    return finding


def contributes_more(answers: Sequence[Answers]) -> Finding | None:
    """The expert that contributes more on one data set than on the others; None if that may be chance."""
    apart = means_between(answers, "saliency_counts", "mean_saliency")
    if apart is None or not bool((apart["difference_low"] > 0).any()):
        return None
    cell = apart.isel(apart["difference_low"].fillna(0.0).argmax(("data_set", "layer", "expert")))
    others = the_others(apart, cell["data_set"].item())
    own, more, low, high = (float(cell[n]) for n in ("estimate", "difference", "difference_low", "difference_high"))
    said = (
        f"Expert {int(cell['expert'])} of layer {int(cell['layer'])} contributes more on {cell['data_set'].item()}"
        f" than on {others}: {own:.3g} compared with {own - more:.3g} ({low:.2g} to {high:.2g} more, simultaneous 95%"
        " interval over documents for all experts, layers and data sets)."
    )
    return of_expert(said, next(each for each in answers if each.label == cell["data_set"].item()), cell)


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """Saliency by layer and expert, a map for each data set that has norms."""
    for each in answers:
        found = each.get("saliency")
        if found is not None:
            interval = how(found.attrs["units"])
            yield figure(
                "saliency", f"saliency-{each.label}", each.label, saliency_heatmap(found), about(found, interval)
            )


SECTION = Section(
    id="saliency",
    title="Contribution of experts",
    reading="The mean contribution of an expert to the tokens that choose it: its weight times the L2 norm of its"
    " output. REAP prunes the experts with the smallest contribution. Orange experts contribute more than the mean of"
    " their layer, blue ones less.",
    findings=findings,
    ask=ask,
    answer=answer,
    draw=draw,
)
