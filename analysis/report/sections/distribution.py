"""The routers' distributions over all experts, if they were recorded."""

from collections.abc import Iterator, Mapping, Sequence

import xarray as xr

from analysis.metrics.distribution import RouterDistribution
from analysis.report.figures import Figure, band, line_figure, spread
from analysis.report.section import Answers, Asked, Finding, Section
from analysis.report.sections.contrast import means_between, the_others
from analysis.scanning import Reducer
from analysis.statistics.jackknife import Jackknife, amount_of

TITLES = {
    "mean_effective_experts": ("Mean effective experts of the routers (2 to the entropy)", "experts"),
    "mean_mass": ("Mean mass of the chosen experts in the router's distribution", "probability"),
    "mean_margin": ("Mean margin of the last chosen expert over the next", "logits"),
}
BOUNDS = {"": "", "_at_least": ": at least", "_at_most": ": at most"}


def ask(asked: Asked) -> Mapping[str, Reducer]:
    """The routers' distributions by units of documents; nothing if no logits were recorded."""
    if asked.scores is None:
        return {}
    return {"distribution": Jackknife(RouterDistribution(asked.scores), block_tokens=asked.block_tokens)}


def findings(answers: Sequence[Answers]) -> Iterator[Finding]:
    """Where the data sets differ in entropy beyond chance."""
    yield from filter(None, [less_sure(answers)])


def less_sure(answers: Sequence[Answers]) -> Finding | None:
    """The data set on which routers are less certain than on the others; None if that may be chance."""
    known = [each for each in recorded(answers) if "mean_entropy" in each["distribution"]]
    apart = means_between(known, "distribution", "mean_entropy")
    if apart is None or not bool((apart["difference_low"] > 0).any()):
        return None
    layers = (apart["difference_low"] > 0).sum("layer")
    own = apart.sel(data_set=apart["data_set"][int(layers.argmax("data_set"))])
    cell = own.isel(layer=int(own["difference_low"].fillna(-1).argmax("layer")))
    by, low, high = (float(cell[f"difference{end}"]) for end in ("", "_low", "_high"))
    others = the_others(apart, own["data_set"].item())
    said = (
        f"Routers are less certain on {own['data_set'].item()} than on {others} at {int(layers.max())} of"
        f" {apart.sizes['layer']} layers, most clearly at layer {int(cell['layer'])}: by {by:.2f} bits of entropy"
        f" ({low:.2f} to {high:.2f}, simultaneous 95% interval over documents for all layers and data sets)."
    )
    of = next(each for each in answers if each.label == own["data_set"].item())
    return Finding(said=said, of=of, layer=int(cell["layer"]))


def recorded(answers: Sequence[Answers]) -> list[Answers]:
    """The data sets with logits."""
    return [each for each in answers if each.get("distribution") is not None]


def draw(answers: Sequence[Answers], apart: xr.Dataset | None) -> Iterator[Figure]:
    """Effective experts, mass of the chosen ones and margin by layer, or bounds on them, if there are logits."""
    for variable, (title, unit) in TITLES.items():
        for end, bound in BOUNDS.items():
            having = [each for each in recorded(answers) if variable + end in each["distribution"]]
            if not having:
                continue
            means = {each.label: each["distribution"] for each in having}
            yield line_figure(
                f"router-{variable.removeprefix('mean_')}{end}".replace("_", "-"),
                {label: found[variable + end].isel(replicate=0) for label, found in means.items()},
                title + bound,
                unit,
                list(means.values()),
                "tokens",
                spread(having[0]["distribution"]),
                nulls=[found[variable + end].attrs["null"] for found in means.values()],
                interval={
                    label: band(found[variable + end], amount=amount_of(found, variable + end))
                    for label, found in means.items()
                },
            )


SECTION = Section(
    id="distribution",
    title="Routers over all experts",
    reading="The full distribution of each router, including the experts that were not chosen. The dashed line is a"
    " router that gives all experts the same probability. A small margin means that another expert was almost chosen.",
    findings=findings,
    ask=ask,
    draw=draw,
)
