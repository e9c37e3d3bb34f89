"""One offline page about one or more stores: what was captured, and what the experts did.

Promises: every number comes from one scan of each data set, as much of it as is committed, and the page says how much
that is; all text from data sets and tokenizers is escaped, in HTML and in the charts' data; the page asks no host for
anything. The charts' own numbers are the tables', made from the same data in the page.

Does not know what is asked, said or drawn: `analysis.answers`, `analysis.sentences`, `analysis.sections`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
import xarray as xr
from markupsafe import Markup

from analysis import charts
from analysis.answers import Answers, answer, contrast_between, contrasted
from analysis.files import whole_file
from analysis.results import Runner, measure
from analysis.scan import accumulate
from analysis.sections import sections
from analysis.sentences import sentences
from store import Coverage, coverage, dataset_names
from store.reader import open_covered

FIGURE_WIDTH = 420  # pixels of a chart outside the page (arbitrary)
FORMS: Mapping[str, Callable[..., str | bytes]] = {
    "svg": vl_convert.vegalite_to_svg,
    "pdf": vl_convert.vegalite_to_pdf,
    "png": partial(vl_convert.vegalite_to_png, scale=3),
}


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
