"""One offline page about one or more stores: what was captured, and what the experts did.

Promises: every number comes from one scan of each data set, as much of it as is committed, and the page says how much
that is; all text from data sets and tokenizers is escaped, in HTML and in the charts' data; the page asks no host for
anything. The charts' own numbers are the tables', made from the same data in the page.

Does not know how results are computed or drawn: `analysis.scan` and its reducers, `analysis.charts`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import numpy as np
import vl_convert
import xarray as xr
from markupsafe import Markup

from analysis import charts
from analysis.caching import Caches
from analysis.choices import Choices, transitions_of
from analysis.confidence import Confidence
from analysis.contrast import contrast_counts, contrast_of, count_documents
from analysis.files import whole_file
from analysis.load import Load, balance_of
from analysis.paths import MAX_WINDOWS, Windows
from analysis.position import PositionLoad
from analysis.repetition import Repetition
from analysis.results import Runner, measure
from analysis.scan import Reducer, accumulate, scan, sizes
from analysis.tokens import TokenCounts, TopTokens
from analysis.uncertainty import Thinned, false_discovery
from analysis.vocabulary import SampledRoutes, vocabulary_of
from store import Coverage, coverage, dataset_names
from store.reader import open_covered

WINDOW_LAYERS = 3
WINDOWS_LISTED = 10
TOKENS_LISTED = 8
TOKEN_ROWS = 4_096  # tokens listed for a data set: twice Mixtral's 32 layers of 8 experts (arbitrary)
TOKEN_MIN_COUNT = 20  # a lift of a rarer token is mostly luck (arbitrary)
FIGURE_WIDTH = 420  # pixels of a chart outside the page (arbitrary)
FORMS: Mapping[str, Callable[..., str | bytes]] = {
    "svg": vl_convert.vegalite_to_svg,
    "pdf": vl_convert.vegalite_to_pdf,
    "png": partial(vl_convert.vegalite_to_png, scale=3),
}
REPLICATES, REPLICATED = 999, 2**24  # of a contrast's bootstrap and shuffles; and numbers held for them (128 MiB)
CACHED_TOKENS = 2**20  # about; simulating caches takes as long as all other counting (arbitrary)
ROUTES_SAMPLED, NULL_DRAWS = 16_384, 50  # behind the null of specialization in words (arbitrary)
SURE = 0.05  # largest share of false finds among what is told (Benjamini–Hochberg)
TOKEN_SCORE = 6.0  # standard errors: of millions of independent tokens none would be told by chance (arbitrary)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The first answers about one data set."""

    label: str
    state: Coverage
    attrs: Mapping[str, Any]
    load: xr.Dataset
    moves: xr.Dataset
    windows: xr.Dataset | None
    """None where the model has too few layers with experts."""
    surprising: xr.Dataset | None
    """The windows that their transitions predict worst."""
    tokens: xr.Dataset
    words: xr.Dataset
    """Vocabulary specialization."""
    repetition: xr.Dataset
    confidence: xr.Dataset
    position: xr.Dataset
    caches: xr.Dataset
    counts: xr.Dataset | None
    """For the contrast with the other data sets of this model; None where there is none."""
    documents: int
    """That have a row."""


Ask = Callable[[Sequence[Reducer]], list[xr.Dataset]]


def answer(
    data: xr.Dataset, state: Coverage, label: str, ask: Ask | None = None, documents: Mapping[str, int] | None = None
) -> Answers:
    """Scan one capture once, as much of it as is there, or `ask` who knows the answers already.

    `documents` of each data set that this one, by its label, is contrasted with, itself included.
    """
    reducers: dict[str, Reducer] = {
        "load": Load(),
        "choices": Choices(),
        "token_counts": TokenCounts(token_layers(data)),
        "routes": SampledRoutes(ROUTES_SAMPLED),
        "repetition": Repetition(),
        "confidence": Confidence(),
        "position": PositionLoad(),
        "caches": Thinned(Caches(policies=("lru", "belady")), min(1.0, CACHED_TOKENS / max(1, state.tokens_done))),
    }
    if size := window_layers(data):
        reducers["windows"] = Windows(size, WINDOWS_LISTED)
        reducers["surprising"] = Windows(size, WINDOWS_LISTED, by="surprise")
    if documents:
        layers, _, experts = sizes(data)
        fitting = REPLICATED // (layers * experts * (1 + len(documents)))
        reducers["counts"] = contrast_counts(documents, label, min(REPLICATES, max(99, fitting)))
    found = dict(zip(reducers, (ask or partial(scan, data))(list(reducers.values())), strict=True))
    table = found["token_counts"].assign_attrs(n=found["load"].attrs["n"])
    routes = found["routes"].sel(layer=table["layer"])
    return Answers(
        label=label,
        state=state,
        attrs=data.attrs,
        load=found["load"],
        moves=transitions_of(found["choices"]),
        windows=found.get("windows"),
        surprising=found.get("surprising"),
        tokens=_top_tokens(table, data),
        words=vocabulary_of(table, routes, min_count=TOKEN_MIN_COUNT, draws=NULL_DRAWS),
        **{name: found[name] for name in ("repetition", "confidence", "position", "caches")},
        counts=found.get("counts"),
        documents=count_documents(data),
    )


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


def token_layers(data: xr.Dataset) -> list[int]:
    """The layers whose tokens are listed: all, or as many, evenly spread, as keep the page small."""
    layers, _, experts = sizes(data)
    room = max(1, TOKEN_ROWS // (experts * TOKENS_LISTED))
    at = np.unique(np.linspace(0, layers - 1, min(room, layers)).round().astype(int))
    return [int(number) for number in data["layer"].values[at]]


def write_report(
    paths: Sequence[Path],
    output: Path,
    *,
    progress: Callable[[str, int, int], None] | None = None,
    runner_of: Callable[[Path, Coverage], Runner] = lambda path, state: accumulate,
) -> list[Answers]:
    """Draw every data set of some stores on one page.

    Parameters
    ----------
    paths
        Stores; they may be incomplete, which the page says.
    output
        The HTML file; it is replaced whole or not at all.
    progress
        Called with a data set's label, shards read and shards in all.
    runner_of
        Who reads the shards of a store, in so far as the answers are not kept already; default this process.

    Returns
    -------
    list of Answers
        What the page shows, in its order.

    Raises
    ------
    FileNotFoundError
        When a path is no store.
    ValueError
        When the stores hold no data set.
    """
    found = [(path, name) for path in paths for name in dataset_names(path)]
    if not found:
        raise ValueError(f"no data set in {', '.join(map(str, paths))}: nothing to report")
    opened = {}
    for path, name in found:
        state = coverage(path, name)
        opened[name if len(paths) == 1 else f"{path}/{name}"] = path, state, open_covered(path, state)
    documents = contrasted({label: data for label, (_, _, data) in opened.items()})
    answers = []
    for label, (path, state, data) in opened.items():
        told = None if progress is None else lambda done, total, label=label: progress(label, done, total)
        ask = partial(measure, path, state.dataset, state=state, progress=told, runner=runner_of(path, state))
        answers.append(answer(data, state, label, ask, documents if label in documents else None))
    page = render(answers)
    with whole_file(output) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return answers


def contrasted(captures: Mapping[str, xr.Dataset]) -> dict[str, int]:
    """The data sets that are of the first one's model, with their documents; none where that is alone."""
    first = next(iter(captures.values()))

    def model(data: xr.Dataset) -> tuple[object, ...]:
        return data.attrs.get("model"), *sizes(data), *data["layer"].values.tolist()

    alike = {label: count_documents(data) for label, data in captures.items() if model(data) == model(first)}
    return alike if len(alike) > 1 else {}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One chart of the page."""

    kind: str
    """What the page's script must know: "tokens" are of the layer that is chosen."""
    name: str
    """What files of it are called."""
    caption: str
    spec: dict[str, Any]
    about: str
    """Definition, estimator, null and source."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """Charts under one heading."""

    id: str
    title: str
    reading: str
    """How to read them."""
    figures: list[Figure]


def render(answers: Sequence[Answers]) -> str:
    """The page as one HTML text."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    apart = contrast_between(answers)
    drawn = sections(answers, apart)
    specs = [_packed(figure.spec) for section in drawn for figure in section.figures]
    data = {"specs": specs, "themes": {"light": charts.theme(), "dark": charts.theme(dark=True)}}
    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    scripts = [vega, (folder / "report.js").read_text(encoding="utf-8")]
    return environment.get_template("report.html.jinja").render(
        answers=answers,
        sections=drawn,
        layers=sorted({int(number) for each in answers for number in each.tokens["layer"].values}),
        sentences=sentences(answers, apart),
        windows=[_windows(each.windows) for each in answers],
        surprising=[_windows(each.surprising) for each in answers],
        provenance=[json.dumps(dict(each.attrs), indent=1, default=str) for each in answers],
        data=_inert_json(data),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        visible=charts.visible,
    )


def contrast_between(answers: Sequence[Answers]) -> xr.Dataset | None:
    """How the data sets of one model differ, as far as they were counted for it; None where fewer than two were."""
    compared = {each.label: each for each in answers if each.counts is not None and each.load.attrs["n"]}
    if len(compared) < 2:
        return None
    counts = {label: each.counts for label, each in compared.items() if each.counts is not None}
    documents = {label: each.documents for label, each in compared.items()}
    return contrast_of(counts, documents, next(iter(compared.values())).load.sizes["k"])


def sections(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[Section]:
    """All charts, in the page's order."""
    spread = charts.load_spread(*(each.load for each in answers))
    listed = {int(number) for each in answers for number in each.tokens["layer"].values}
    many = len({int(number) for each in answers for number in each.load["layer"].values})
    some = f" (at {len(listed)} of {many} layers: all would make the page too large)" if len(listed) < many else ""
    found = [
        Section(
            id="glance",
            title="At a glance",
            reading="One number a layer, a line for each data set; dashed is what chance gives.",
            figures=_glance(answers, apart),
        ),
        Section(
            id="load",
            title="Load",
            reading="How often each expert is one of a token's choices. Blue experts get less than an even share,"
            " orange ones more; the colour scale is the same for all data sets.",
            figures=[
                Figure(
                    kind="load",
                    name=f"load-{each.label}",
                    caption=each.label,
                    spec=_spec(charts.load_heatmap(each.load, spread=spread)),
                    about=_about(each.load),
                )
                for each in answers
            ],
        ),
        Section(
            id="tokens",
            title="Tokens of each expert",
            reading=f"The tokens that an expert gets most out of proportion{some}. ▁ is a space, <0x0A> a line feed.",
            figures=[
                Figure(
                    kind="tokens",
                    name=f"tokens-{each.label}",
                    caption=each.label,
                    spec=_spec(charts.token_chart(each.tokens)),
                    about=_about(each.tokens),
                )
                for each in answers
            ],
        ),
    ]
    if apart is not None:
        most = float(abs(apart["difference"]).max())
        found.append(
            Section(
                id="domains",
                title="Experts of each data set",
                reading="By how many points more of a data set's tokens reach an expert than of the others' on average."
                " Pale cells may be chance: documents were shuffled between the data sets.",
                figures=[
                    Figure(
                        kind="domains",
                        name=f"domains-{label}",
                        caption=label,
                        spec=_spec(charts.contrast_heatmap(apart, label, spread=max(most, 0.05))),
                        about=_about(apart),
                    )
                    for label in apart["data_set"].values.tolist()
                ],
            )
        )
    paths = [
        Figure(
            kind="paths",
            name=f"paths-{each.label}",
            caption=each.label,
            spec=_spec(charts.path_chart(each.moves, each.load)),
            about=_about(each.moves),
        )
        for each in answers
    ]
    return [
        *found,
        Section(
            id="paths",
            title="Paths",
            reading="From each expert to the experts that the same tokens choose first at the next layer. Only links"
            " above chance are drawn, the stronger the further above; a circle is as large as its share of the first"
            " choices. Hover over an expert to see its own links alone.",
            figures=paths,
        ),
        Section(
            id="confidence",
            title="Router confidence",
            reading="How sure the routers are: near 1 the first choice has all the weight, at 1/k all choices have the"
            " same; the margin is the first weight less the second, and small margins are what rounding turns around.",
            figures=[
                _lines(
                    "first-weight",
                    {each.label: each.confidence["mean_first"] for each in answers},
                    "Weight of the first choice, mean",
                    "weight",
                    [each.confidence for each in answers],
                    "tokens",
                ),
                _lines(
                    "margin",
                    {each.label: each.confidence["mean_margin"] for each in answers},
                    "Margin of the first choice over the second, mean",
                    "weight",
                    [each.confidence for each in answers],
                    "tokens",
                ),
            ],
        ),
        Section(
            id="position",
            title="Position",
            reading="What a token's place in its row tells of its experts: 0 where experts do not mind the place.",
            figures=[
                _lines(
                    "position",
                    {each.label: each.position["mutual_information"] for each in answers},
                    "Position and expert, mutual information in bits",
                    "bits",
                    [each.position for each in answers],
                    "tokens",
                    null=0.0,
                )
            ],
        ),
        Section(
            id="caching",
            title="Caching",
            reading="How often an expert that is needed is already in a cache, mean over layers: LRU evicts the least"
            " recently used one, and Belady, which knows the future, bounds what any policy can reach.",
            figures=[
                Figure(
                    kind="lines",
                    name="caching",
                    caption="all data sets",
                    spec=_spec(charts.cache_chart({each.label: each.caches for each in answers})),
                    about=_about(answers[0].caches),
                )
            ],
        ),
    ]


def _glance(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[Figure]:
    """The first screen: words, data sets, neighbours, load."""
    figures = [
        _lines(
            "words",
            {each.label: each.words["specialization"] for each in answers},
            "Words: share of a token that its main expert gets",
            "mean over tokens",
            [each.words for each in answers],
            "occurrences of tokens seen 20 times or more",
            by_chance={each.label: each.words["null"] for each in answers},
        )
    ]
    if apart is not None:
        both = "between data sets"
        figures.append(
            _lines(
                "data-sets",
                {both: apart["divergence_corrected"]},
                "Data sets: how far apart their loads are, in bits",
                "bits",
                [apart.assign_attrs(n=sum(apart.attrs["documents"].values()))],
                "documents; 95 % interval over documents",
                null=0.0,
                interval={both: (apart["divergence_low"], apart["divergence_high"])},
            )
        )
    repeated = answers[0].repetition["first_repeated"]
    balances = {each.label: balance_of(each.load) for each in answers}
    return [
        *figures,
        _lines(
            "neighbours",
            {each.label: each.repetition["first_repeated"].isel(lag=0) for each in answers},
            "Neighbours: share with the same first expert",
            "share of pairs",
            [each.repetition for each in answers],
            "pairs of neighbours",
            null=repeated.attrs["null"],
        ),
        _lines(
            "effective-experts",
            {label: balance["effective_experts"] for label, balance in balances.items()},
            "Load: experts in effective use, of each layer",
            "experts",
            list(balances.values()),
            "tokens",
            null=float(answers[0].load.sizes["expert"]),
        ),
    ]


def _lines(
    name: str,
    values: Mapping[str, xr.DataArray],
    title: str,
    unit: str,
    results: Sequence[xr.Dataset],
    counted: str,
    *,
    null: float | None = None,
    by_chance: Mapping[str, xr.DataArray] | None = None,
    interval: Mapping[str, tuple[xr.DataArray, xr.DataArray]] | None = None,
) -> Figure:
    """One number a layer for all data sets, what it comes from, and what was counted for it."""
    told = [f"n = {sum(result.attrs['n'] for result in results):,} {counted}"]
    if by_chance is not None:
        told.append("dashed: by chance")
    elif null is not None:
        told.append(f"dashed: {null:.3g}, by chance or even")
    drawn = charts.layer_lines(
        values,
        title=title,
        subtitle=told,
        unit=unit,
        null=null,
        by_chance=by_chance,
        interval=interval,
    )
    return Figure(kind="lines", name=name, caption="all data sets", spec=_spec(drawn), about=_about(results[0]))


def _about(result: xr.Dataset) -> str:
    """Definition, estimator, null and source, as a result carries them."""
    told = {name: result.attrs.get(name) for name in ("definition", "estimator", "null", "source")}
    return " ".join(f"{name.capitalize()}: {text}." for name, text in told.items() if text not in (None, "-"))


def sentences(answers: Sequence[Answers], apart: xr.Dataset | None) -> list[str]:
    """What was measured, in words computed from the data."""
    captured = [each for each in answers if each.load.attrs["n"]]
    compared = [] if apart is None else [each for each in captured if each.label in apart["data_set"].values]
    said = []
    for each in answers:
        if each not in captured:
            said.append(f"{each.label}: no token is captured yet.")
        elif apart is not None and each in compared:
            said.append(_specialist(each, apart))
        else:
            said.append(f"{each.label}: {each.load.attrs['n']:,} tokens. {_busiest([each])}")
    if apart is not None:
        said.append(_busiest(compared))
    return said + [sentence for sentence in [_token(captured)] if sentence]


def _specialist(each: Answers, apart: xr.Dataset) -> str:
    """The expert that a data set uses more than the others do, by the lower end of the interval."""
    head = f"{each.label}: {each.load.attrs['n']:,} tokens."
    q, own = false_discovery(apart["p"]), apart.sel(data_set=each.label)
    least = own["difference_low"].where(q <= SURE).fillna(0.0)
    if float(least.max()) <= 0:
        return (
            f"{head} No expert gets more of them than of the other data sets' tokens beyond chance (smallest q over the"
            f" layers {float(q.min()):.2f}, {apart.attrs['replicates']} shuffles of documents)."
        )
    cell = own.isel(least.argmax(("layer", "expert")))
    reach, difference = float(cell["share"]), float(cell["difference"])
    low, high = (100 * float(cell[f"difference_{end}"]) for end in ("low", "high"))
    even = each.load.attrs["null"] * each.load.sizes["k"]
    return (
        f"{head} Its specialist is expert {int(cell['expert'])} at layer {int(cell['layer'])}: {reach:.0%} of them"
        f" reach it, and {reach - difference:.0%} in the other data sets ({low:.0f} to {high:.0f} points apart, 95 %"
        f" interval over documents; {even:.0%} would be even)."
    )


def _busiest(answers: Sequence[Answers]) -> str:
    """The largest share of a layer's choices that one expert has."""
    found = max(answers, key=lambda each: float(each.load["share"].max()))
    share = found.load["share"].fillna(0)
    top = share.isel(share.argmax(("layer", "expert")))
    where = f" on {found.label}" if len(answers) > 1 else ""
    return (
        f"The busiest expert is {int(top['expert'])} at layer {int(top['layer'])}{where}, with {float(top):.1%} of that"
        f" layer's choices ({found.load.attrs['null']:.1%} would be even)."
    )


def _token(answers: Sequence[Answers]) -> str | None:
    """The token of which it is least likely that its expert got so much of it by chance."""
    best, said = TOKEN_SCORE, None
    for each in answers:
        listed = each.tokens
        usual = (listed["share"] / listed["lift"]).clip(0, 1)  # the expert's share of all tokens
        score = (listed["share"] - usual) / np.sqrt(usual * (1 - usual) / listed["tokens"])
        score = score.where((listed["token_id"] >= 0) & (usual < 1)).fillna(0.0)
        if score.size and float(score.max()) > best:
            best = float(score.max())
            cell, all_tokens = (data.isel(score.argmax(score.dims)) for data in (listed, usual))
            said = (
                f"Tokens have their experts: at layer {int(cell['layer'])}, {float(cell['share']):.0%} of the"
                f" {int(cell['tokens']):,} “{cell['piece'].item()}” in {each.label} go to expert"
                f" {int(cell['expert'])}, which gets {float(all_tokens):.0%} of all tokens."
            )
    return said


def write_figures(answers: Sequence[Answers], folder: Path) -> list[Path]:
    """Write every chart as SVG, PDF and PNG, for papers; tokens once for each layer. Files that are there are replaced.

    Returns
    -------
    list of Path
        The files, in the page's order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = [figure for section in sections(answers, contrast_between(answers)) for figure in section.figures]
    written = []
    for number, figure in enumerate(figures):
        spec = {**figure.spec, "width": FIGURE_WIDTH}
        versions = {"": spec}
        if figure.kind == "tokens":
            layers = sorted({row["layer"] for rows in spec["datasets"].values() for row in rows})
            versions = {f"-layer-{layer}": {**spec, "params": _chosen(spec["params"], layer)} for layer in layers}
        for suffix, version in versions.items():
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{number:02d}-{figure.name}{suffix}")
            for form, convert in FORMS.items():
                drawn = convert(version, config=charts.theme(), allowed_base_urls=[])
                with whole_file(folder / f"{name}.{form}") as unfinished:
                    unfinished.write_bytes(drawn.encode() if isinstance(drawn, str) else drawn)
                written.append(folder / f"{name}.{form}")
    return written


def _chosen(params: Sequence[Mapping[str, Any]], layer: int) -> list[dict[str, Any]]:
    """A chart's parameters with another layer."""
    return [{**param, "value": layer} if param["name"] == "layer" else dict(param) for param in params]


def _windows(windows: xr.Dataset | None) -> list[dict[str, Any]]:
    """Rows of the table of frequent windows; none where there are too few layers."""
    if windows is None:
        return []
    return [
        {
            "layers": f"{int(each['layer'][0])}–{int(each['layer'][-1])}",
            "experts": " → ".join(str(int(expert)) for expert in each["expert"].values),
            "tokens": int(each["count"]),
            "share": float(each["share"]),
            "times": float(each["share"]) / windows.attrs["null"],
            "predicted": float(each["count"]) / float(each["expected"]),
        }
        for each in (windows.isel(window=index) for index in range(windows.sizes["window"]))
    ]


def _spec(chart: alt.Chart | alt.LayerChart) -> dict[str, Any]:
    spec: dict[str, Any] = chart.to_dict()
    spec.pop("config", None)  # the page puts in the theme for light or dark
    return spec


def _packed(spec: dict[str, Any]) -> dict[str, Any]:
    """A chart whose rows do not repeat their names: half of the page's size; its script unpacks them."""
    datasets = {}
    for name, rows in spec["datasets"].items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        datasets[name] = {"columns": columns, "rows": [[row.get(key) for key in columns] for row in rows]}
    return {**spec, "datasets": datasets}


def _inert_json(data: object) -> Markup:
    """JSON that is inert inside a script element, whatever the text in it: no `<`, `>`, `&`, no U+2028."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only: U+2028 and bidi marks are escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
