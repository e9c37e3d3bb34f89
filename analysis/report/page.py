"""One offline page about one or more stores: what was captured, and what the experts did.

Promises: every number comes from one scan of the committed part of each data set, and the page says how much that is;
all text from data sets and tokenizers is escaped, in HTML and in the charts' data; the page makes no network requests.
Charts and tables are made from the same data in the page.

Does not know what is counted, said or drawn: `analysis.report.answers`, `analysis.report.headline`,
`analysis.report.summary`, `analysis.report.sections.all`.
"""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache, partial
from itertools import cycle, groupby, islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import vl_convert
import xarray as xr
from markupsafe import Markup

from analysis.charts.files import write_chart
from analysis.charts.theme import theme
from analysis.escaping import inert_json, policy_hash, visible
from analysis.report.answers import answer
from analysis.report.command import made
from analysis.report.figures import Figure, Option, in_common_colours
from analysis.report.headline import findings
from analysis.report.passages import passages
from analysis.report.section import Answers, Finding, Section
from analysis.report.sections.all import SECTIONS
from analysis.report.sections.contrast import contrast_between
from analysis.report.summary import has_tiny, header, summary
from analysis.report.windows import window_rows
from analysis.results import Runner, measure
from analysis.scanning import EVERYTHING, Selection, accumulate
from store import Coverage, coverage, dataset_names
from store.files import whole_file
from store.identity import changes_in_words
from store.reader import open_covered


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A section on the page."""

    id: str
    title: str
    reading: str
    findings: Sequence[Finding]
    figures: Sequence[Figure]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is drawn, for the page and for papers, made once."""

    answers: Sequence[Answers]
    apart: xr.Dataset | None
    """How the data sets differ; None if there is nothing to compare."""
    sections: Sequence[Drawn]
    again: str | None = None
    """The command that draws it again."""

    @property
    def figures(self) -> list[Figure]:
        """All charts, in the page's order."""
        return [figure for section in self.sections for figure in section.figures]


def report_of(
    answers: Sequence[Answers], sections: Sequence[Section] = SECTIONS, *, again: str | None = None
) -> Report:
    """Draw the charts; sections without charts are left out."""
    apart, labels = contrast_between(answers), [visible(each.label) for each in answers]
    drawn = []
    for section in sections:
        figures = [in_common_colours(figure, labels) for figure in section.draw(answers, apart)]
        reading = section.reading if isinstance(section.reading, str) else section.reading(answers)
        found = list(section.findings(answers)) if section.findings else []
        drawn.append(Drawn(id=section.id, title=section.title, reading=reading, findings=found, figures=figures))
    return Report(answers=answers, apart=apart, sections=[section for section in drawn if section.figures], again=again)


def write_report(
    paths: Sequence[Path | str],
    output: Path,
    *,
    datasets: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    runner_of: Callable[[Path | str, Coverage], Runner] = lambda path, state: accumulate,
    block_tokens: int | None = None,
    only: Selection = EVERYTHING,
    explorer: str | None = None,
) -> Report:
    """Draw every data set of some stores on one page.

    Parameters
    ----------
    paths
        Stores; they may be incomplete, and the page says so.
    output
        The HTML file; it is replaced atomically.
    datasets
        By path, the data sets to draw; default all.
    progress
        Called with a data set's label, shards read and shards in all.
    runner_of
        Reads the shards of a store whose answers are not kept yet; default this process.
    block_tokens
        Use blocks of so many tokens instead of documents in intervals and tests: see `Jackknife`.
    only
        What is counted.
    explorer
        The address at which an explorer of the store answers, for links; default commands that start one.

    Returns
    -------
    Report
        What the page shows.

    Raises
    ------
    FileNotFoundError
        When a path is not a store.
    ValueError
        When the stores hold no data set, one of them lacks the labels by which tokens are selected, or `explorer` is
        given with several stores.
    """
    if explorer is not None and len(paths) > 1:
        raise ValueError(
            f"{explorer} is the explorer of one store, but {len(paths)} stores are given: report on them one by one"
        )
    found = [(path, name) for path in paths for name in (datasets or {}).get(str(path)) or dataset_names(path)]
    if not found:
        raise ValueError(f"no data set in {', '.join(map(str, paths))}: nothing to report")
    opened = {}
    for path, name in found:
        state = coverage(path, name)
        opened[name if len(paths) == 1 else f"{path}/{name}"] = path, state, open_covered(path, state)
    answers = []
    for label, (path, state, data) in opened.items():
        on_shard = None if progress is None else lambda done, total, label=label: progress(label, done, total)
        ask = partial(
            measure, path, state.dataset, state=state, only=only, progress=on_shard, runner=runner_of(path, state)
        )
        answers.append(answer(data, state, label, ask, block_tokens=block_tokens, only=only, store=str(path)))
    report = report_of(answers, again=again(found, block_tokens, only))
    page = render(report, explorer)
    with whole_file(output) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return report


def again(drawn: Sequence[tuple[Path | str, str]], block_tokens: int | None, only: Selection) -> str:
    """The command that draws a report of some data sets again."""
    places: list[str] = []
    for path, group in groupby(drawn, key=lambda each: each[0]):
        names = [name for _, name in group]
        places += [str(path)] if names == dataset_names(path) else [f"{path}/{name}" for name in names]
    options = [] if block_tokens is None else ["--block_tokens", str(block_tokens)]
    options += [word for name, labels in only.labels.items() for label in labels for word in (f"--{name}", label)]
    return shlex.join(["python", "jobs/report.py", *places, *options])


def render(report: Report, explorer: str | None = None, drawn_on: date | None = None) -> str:
    """The page as one HTML text, dated today unless another day is given; `explorer` as in `write_report`."""
    answers = report.answers
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    data: dict[str, Any] = {
        "figures": [_packed(figure) for figure in report.figures],
        "themes": {"light": theme(), "dark": theme(dark=True)},
    }
    scripts = [_chart_runtime(), (folder / "page.js").read_text(encoding="utf-8")]
    main = summary(answers, report.apart, report.figures, report.again)
    samples = {each.label: each.get("sample") for each in answers}
    return environment.get_template("page.html.jinja").render(
        answers=answers,
        sections=report.sections,
        layers=sorted({int(number) for each in answers for number in each["tokens"]["layer"].values}),
        opens_at=next((finding.layer for finding in main.findings if finding.layer is not None), None),
        summary=main,
        header=header(answers, drawn_on or date.today()),
        tiny=has_tiny(answers),
        findings=findings(answers, report.apart),
        passages=passages(answers, report.apart),
        windows={
            name: [(each.label, rows) for each in answers if (rows := window_rows(each.get(name), samples[each.label]))]
            for name in ("windows", "surprising")
        },
        explorer=explorer and explorer.rstrip("/"),
        made=made({visible(each.label): each.attrs for each in answers}),
        provenance=[json.dumps(dict(each.attrs), indent=1, default=str) for each in answers],
        data=inert_json(data),
        figures=report.figures,
        dots=_dots([visible(each.label) for each in answers], data["themes"]),
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        hashes=[policy_hash(script) for script in scripts],
        visible=visible,
        changes_in_words=changes_in_words,
    )


def _dots(labels: Sequence[str], themes: Mapping[str, Any]) -> dict[str, str]:
    """The colour of each data set in the charts, as a CSS value."""
    light, dark = (themes[name]["range"]["category"] for name in ("light", "dark"))
    pairs = islice(cycle(zip(light, dark, strict=True)), len(labels))
    return {label: f"light-dark({one}, {other})" for label, (one, other) in zip(labels, pairs, strict=True)}


@cache
def _chart_runtime() -> str:
    """The script that draws charts, cached because bundling it takes a second."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def write_figures(report: Report, folder: Path) -> list[Path]:
    """Write every chart as SVG, PDF and PNG, for papers: tokens once for each layer, paths once for each data set.
    Existing files are replaced.

    Parameters
    ----------
    report : Report
        From `write_report`.
    folder : Path
        Created if it does not exist.

    Returns
    -------
    list of Path
        The files, in the page's order.
    """
    written = []
    for number, figure in enumerate(report.figures):
        options: list[Option | None] = [option for option in figure.options if option.for_papers]
        for option in options or [None]:
            suffix = "" if option is None else f"-{option.name}"
            written += write_chart(figure.shown(option), folder, f"{number:02d}-{figure.name}{suffix}")
    return written


def _packed(figure: Figure) -> dict[str, Any]:
    """A figure packed for the page's script: its tables by column, a third of the size."""
    tables = {
        name: {column: _column([row[column] for row in rows]) for column in (rows[0] if rows else ())}
        for name, rows in figure.spec["datasets"].items()
    }
    options = {
        option.value: {"row": option.row, "subtitle": option.subtitle, "caption": option.caption, "name": option.name}
        for option in figure.options
    }
    return {"spec": {**figure.spec, "datasets": {}}, "tables": tables, "by": figure.by, "options": options}


def _column(values: list[Any]) -> Any:
    """A column unchanged, or compressed: texts stored once, and whole numbers as runs of equal steps (step, count)."""
    if values and all(isinstance(value, str) for value in values):
        place = {text: index for index, text in enumerate(dict.fromkeys(values))}
        return {"texts": list(place), "places": _column([place[text] for text in values])}
    if all(isinstance(value, int) for value in values):
        steps = [[step, len(list(same))] for step, same in groupby(np.diff(values, prepend=0).tolist())]
        if 2 * len(steps) < len(values):
            return {"steps": steps}
    return values
