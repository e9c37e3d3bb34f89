"""One offline page about one or more stores: what was captured, and what the experts did.

Promises: every number comes from one scan of each data set, as much of it as is committed, and the page says how much
that is; all text from data sets and tokenizers is escaped, in HTML and in the charts' data; the page asks no host for
anything. The charts' own numbers are the tables', made from the same data in the page.

Does not know how results are computed or drawn: `analysis.scan` and its reducers, `analysis.charts`.
"""

import base64
import hashlib
import json
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
from analysis.choices import Choices, transitions_of
from analysis.files import whole_file
from analysis.load import Load
from analysis.paths import MAX_WINDOWS, Windows
from analysis.results import Runner, measure
from analysis.scan import Reducer, accumulate, scan, sizes
from analysis.tokens import TopTokens
from store import Coverage, coverage, dataset_names
from store.reader import open_covered

WINDOW_LAYERS = 3
WINDOWS_LISTED = 10
TOKENS_LISTED = 8
TOKEN_ROWS = 4_096  # tokens listed for a data set: twice Mixtral's 32 layers of 8 experts (arbitrary)
TOKEN_MIN_COUNT = 20  # a lift of a rarer token is mostly luck (arbitrary)


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
    tokens: xr.Dataset


Ask = Callable[[Sequence[Reducer]], list[xr.Dataset]]


def answer(data: xr.Dataset, state: Coverage, label: str, ask: Ask | None = None) -> Answers:
    """Scan one capture once, as much of it as is there, or `ask` who knows the answers already."""
    top = TopTokens(token_layers(data), top=TOKENS_LISTED, by="lift", min_count=TOKEN_MIN_COUNT)
    reducers = [Load(), Choices(), top]
    size = window_layers(data)
    windows = [Windows(size, WINDOWS_LISTED)] if size else []
    load, choices, tokens, *counted = (ask or partial(scan, data))([*reducers, *windows])
    return Answers(
        label=label,
        state=state,
        attrs=data.attrs,
        load=load,
        moves=transitions_of(choices),
        windows=counted[0] if counted else None,
        tokens=tokens,
    )


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
    answers = []
    for path, name in found:
        label = name if len(paths) == 1 else f"{path}/{name}"
        told = None if progress is None else lambda done, total, label=label: progress(label, done, total)
        state = coverage(path, name)
        runner = runner_of(path, state)
        ask = partial(measure, path, name, state=state, progress=told, runner=runner)
        answers.append(answer(open_covered(path, state), state, label, ask))
    page = render(answers)
    with whole_file(output) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return answers


def render(answers: Sequence[Answers]) -> str:
    """The page as one HTML text."""
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    spread = charts.load_spread(*(each.load for each in answers))
    specs = {
        "load": [_spec(charts.load_heatmap(each.load, spread=spread)) for each in answers],
        "paths": [_spec(charts.path_chart(each.moves, each.load)) for each in answers],
        "tokens": [_spec(charts.token_chart(each.tokens)) for each in answers],
    }
    data = {"specs": specs, "themes": {"light": charts.theme(), "dark": charts.theme(dark=True)}}
    vega = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    scripts = [vega, (folder / "report.js").read_text(encoding="utf-8")]
    return environment.get_template("report.html.jinja").render(
        answers=answers,
        layers=sorted({int(number) for each in answers for number in each.tokens["layer"].values}),
        layers_captured=len({int(number) for each in answers for number in each.load["layer"].values}),
        sentences=sentences(answers),
        windows=[_windows(each.windows) for each in answers],
        provenance=[json.dumps(dict(each.attrs), indent=1, default=str) for each in answers],
        data=_inert_json(data),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        visible=charts.visible,
    )


def sentences(answers: Sequence[Answers]) -> list[str]:
    """What was measured, in words computed from the data."""
    said = []
    for each in answers:
        n, share = each.load.attrs["n"], each.load["share"]
        if not n:
            said.append(f"{each.label}: no token is captured yet.")
            continue
        even = each.load.attrs["null"]
        layer, expert = np.unravel_index(int(np.argmax(share.fillna(0).data)), share.shape)
        top = float(share[layer, expert])
        said.append(
            f"{each.label}: {n:,} tokens. The busiest expert is {int(share['expert'][expert])} at layer"
            f" {int(share['layer'][layer])}, with {top:.1%} of that layer's choices ({even:.1%} would be even)."
        )
    if len(answers) > 1:
        said.extend(_contrast(answers[0], other) for other in answers[1:] if _comparable(answers[0], other))
    return said


def _comparable(one: Answers, other: Answers) -> bool:
    same = all(np.array_equal(one.load[dim], other.load[dim]) for dim in ("layer", "expert"))
    return bool(same and one.load.attrs["n"] and other.load.attrs["n"] and one.attrs["model"] == other.attrs["model"])


def _contrast(one: Answers, other: Answers) -> str:
    difference = other.load["share"] - one.load["share"]
    layer, expert = np.unravel_index(int(np.argmax(abs(difference).data)), difference.shape)
    shares = [float(each.load["share"][layer, expert]) for each in (one, other)]
    distance = abs(difference).sum("expert") / 2
    return (
        f"{one.label} and {other.label} differ most at layer {int(difference['layer'][layer])}, expert"
        f" {int(difference['expert'][expert])}: {shares[0]:.1%} against {shares[1]:.1%} of the choices; on average over"
        f" the layers, {float(distance.mean()):.1%} of the choices would have to move to make their loads equal."
    )


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
        }
        for each in (windows.isel(window=index) for index in range(windows.sizes["window"]))
    ]


def _spec(chart: alt.Chart | alt.LayerChart) -> dict[str, Any]:
    spec: dict[str, Any] = chart.to_dict()
    spec.pop("config", None)  # the page puts in the theme for light or dark
    return spec


def _inert_json(data: object) -> Markup:
    """JSON that is inert inside a script element, whatever the text in it: no `<`, `>`, `&`, no U+2028."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII only: U+2028 and bidi marks are escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
