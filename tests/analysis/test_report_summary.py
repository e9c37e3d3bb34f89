"""The top of the page, its paragraphs and examples, and the explorer's pages, compared with an independent count."""

import html
import re
import shlex
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import fake_capture, words
from starlette.testclient import TestClient
from synthetic import make_capture
from test_report import contrasted, few, planted

from analysis.charts.theme import theme
from analysis.explorer.live import Explorer
from analysis.explorer.site import site
from analysis.report import page as report
from analysis.report.headline import findings
from analysis.report.passages import SHOWN, passages
from analysis.report.section import Answers
from analysis.report.sections import contrast
from analysis.report.sections.contrast import contrast_between
from analysis.report.summary import TINY, header, summary
from analysis.report.windows import examples
from analysis.scanning import Selection
from jobs import report as job
from workers.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def special() -> list[Answers]:
    """Two data sets of which the second has a specialist, expert 6 at layer 4."""
    one, other = (make_capture(seed=seed, documents=90, layers=(0, 4, 9), strength=0) for seed in (1, 2))
    return contrasted(one=one, other=planted(other, layer=4, expert=6, share=0.5))


def test_the_summary_names_the_planted_specialist_with_its_picture_and_opens_its_layer(special: list[Answers]) -> None:
    drawn = report.report_of(special, again="python jobs/report.py s.zarr")
    told = summary(special, drawn.apart, drawn.figures, drawn.again)
    assert len(told.findings) == 3
    assert told.commands == ["python jobs/report.py s.zarr"]
    assert told.findings[2].said == "No token goes to an expert more often than its documents explain."
    assert told.findings[0].said.startswith("m (2 of 8 experts at 3 layers) chose experts for ")
    assert "expert 6 at layer 4: " in told.findings[1].said
    assert told.findings[1].page == "expert/4/6"
    assert told.figure is not None
    assert drawn.figures[told.figure].name == "domains-other"
    page = report.render(drawn)
    assert "<option selected>4</option>" in page
    assert page.index('href="#summary"') < page.index('<h2 id="summary"')
    anchors = set(re.findall(r'<li><a href="#([a-z_]+)"', page))
    assert {section.id for section in drawn.sections} < anchors
    assert all(f'id="{anchor}"' in page for anchor in anchors)


def test_of_nothing_captured_nothing_is_summed_up() -> None:
    empty = few(none=make_capture(documents=4, missing=tuple(range(10))))
    assert [finding.said for finding in summary(empty, None, [], None).findings] == ["none: no token is captured yet."]


def test_the_header_says_what_was_looked_at_and_where_the_data_sets_differ() -> None:
    captures: dict[str, Any] = {name: make_capture(seed=seed) for seed, name in enumerate("ab")}
    captures["a"] = captures["a"].assign_attrs(model=TINY, model_revision="0123456789abcdef0123456789abcdef01234567")
    captures["b"] = captures["b"].assign_attrs(model="big", quantization="int8")
    answers = few(**captures)
    told = header(answers, date(2026, 3, 7))
    assert told["Model"] == f"{TINY} (a); big (b)"
    assert told["Layers and experts"] == "2 of 8 experts at 3 layers"
    assert told["Revision"] == "0123456789ab (a); not stated (b)"
    assert told["Quantization"] == "nf4 (a); int8 (b)"
    tokens = sum(int(((c["token"] >= 0) & (c["token"] != 1)).sum()) for c in captures.values())
    assert told["Tokens"] == f"{tokens:,}"
    assert (told["Data sets"], told["Generated"]) == ("2: a and b", "7 March 2026")
    shards = sum(each.state.shards_total for each in answers)
    assert told["Coverage"] == f"complete: {shards} of {shards} shards"


def test_the_tiny_model_s_findings_are_its_own_and_no_other_s(special: list[Answers]) -> None:
    assert tiny_checkpoint().name == TINY
    own = "The results describe this model only"
    tiny = [replace(each, attrs={**each.attrs, "model": TINY}) for each in special]
    assert own in report.render(report.report_of(tiny, [contrast.SECTION]))
    assert own not in report.render(report.report_of(special, [contrast.SECTION]))


def test_a_paragraph_is_of_a_row_and_shaded_where_its_tokens_choose_the_named_expert(special: list[Answers]) -> None:
    data = planted(make_capture(seed=2, documents=90, layers=(0, 4, 9), strength=0), layer=4, expert=6, share=0.5)
    found = passages(special, contrast_between(special))[1]
    assert (found.label, found.finding.page, found.why) == ("other", "expert/4/6", "the data set's specialist")
    token, expert, pieces = (data[name].values for name in ("token", "expert", "piece"))
    rows = []
    for row in range(len(token)):
        counted = np.flatnonzero((token[row] >= 0) & (token[row] != 1))[:SHOWN]  # 1 is special
        choices = [[*expert[row, at, 1], 6].index(6) + 1 for at in counted]
        text = "".join(str(pieces[token[row, at]]).replace("▁", " ") for at in counted)
        rows.append((text, sum(choice <= 2 for choice in choices), Counter(c for c in choices if c <= 2)))
    whole = "".join(run.text for run in found.shaded)
    assert (whole, found.chosen) in [(text, chosen) for text, chosen, _ in rows]
    assert found.tokens == max(int(((row >= 0) & (row != 1)).sum()) for row in token)
    assert {run.choice for run in found.shaded} <= {0, 1, 2}
    neighbours = zip(found.shaded, found.shaded[1:], strict=False)
    assert all(one.choice != other.choice for one, other in neighbours), "runs are as long as can be"


def test_the_tokens_of_a_window_are_those_that_take_it_most(special: list[Answers]) -> None:
    data = make_capture(seed=1, documents=90, layers=(0, 4, 9), strength=0)
    token, expert, pieces = (data[name].values for name in ("token", "expert", "piece"))
    counted = (token >= 0) & (token != 1)
    assert special[0]["sample"].sizes["token"] == counted.sum(), "the sample is all that there is"
    for index in range(3):
        window = special[0]["windows"].isel(window=index)
        taken = counted & (expert[..., 0] == window["expert"].values).all(-1)
        count = Counter(str(pieces[number]) for number in token[taken])
        shown = examples(special[0]["sample"], window)
        assert [count[piece] for piece in shown] == sorted(count.values(), reverse=True)[: len(shown)]
        assert len(shown) == min(6, len(count))


def test_a_data_set_has_one_colour_on_the_whole_page_and_nothing_else_has_it(special: list[Answers]) -> None:
    answers = [special[0], replace(special[1], found={k: v for k, v in special[1].found.items() if k != "weights"})]
    swapped = [answers[1], answers[0]]  # the first one is missing in some charts
    drawn, series = report.report_of(swapped), 0
    for figure in drawn.figures:
        for layer in figure.spec.get("layer", []):
            colour = layer.get("encoding", {}).get("color", {})
            if colour.get("field") == "data_set":
                series += 1
                assert colour["scale"] == {"domain": ["other", "one"], "range": "category"}
            else:
                assert colour.get("scale", {}).get("range") != "category"
    assert series > 10
    for name in ("light", "dark"):
        colours = theme(name == "dark")["range"]
        shared = [set(colours["category"]), {*colours["diverging"], *colours["ramp"]}, set(colours["ordinal"])]
        assert sum(map(len, shared)) == len(set.union(*shared))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of a fake model."""
    path = tmp_path_factory.mktemp("summary") / "a store.zarr"
    fake_capture(path, [words(90, number) for number in range(5)])
    return path


def test_the_explorer_has_the_pages_that_a_report_names(store: Path, tmp_path: Path) -> None:
    drawn = report.write_report([store], tmp_path / "r.html")
    explorer = Explorer(str(store), ["fake"], tmp_path)
    explorer.refresh("fake")
    named = [finding for finding in findings(drawn.answers, drawn.apart) if finding.place]
    assert named
    with TestClient(site(explorer), base_url="http://localhost") as client:
        for finding in named:
            assert client.get(f"/{finding.place}").status_code == 200
    page = html.unescape((tmp_path / "r.html").read_text())
    for finding in named:
        command = shlex.split(finding.command or "")
        assert command == ["python", "jobs/explore.py", str(store), "--page", finding.place]
        assert f"<code>{finding.command}</code>" in page
    assert "Open in the explorer" not in page
    page = html.unescape(report.render(drawn, "http://127.0.0.1:8177/"))
    assert f'<a href="http://127.0.0.1:8177/{named[0].place}">Open in the explorer</a>' in page
    assert "jobs/explore.py" not in page


def test_an_explorer_that_cannot_be_linked_is_refused(store: Path, tmp_path: Path, command: Any) -> None:
    ran = command(store, "--explorer", "javascript:alert(1)", main=job.main)
    assert (ran.status, "must begin with http:// or https://" in ran.err) == (2, True)
    with pytest.raises(ValueError, match="the explorer of one store, but 2"):
        report.write_report([store, store], tmp_path / "r.html", explorer="http://localhost:1")


def test_the_report_s_own_command_has_the_options_that_change_what_it_says(store: Path) -> None:
    only = Selection(roles=("user", "assistant"))
    told = report.again([(store, "fake")], 64, only)
    arguments = [str(store), "--block_tokens", "64", "--role", "user", "--role", "assistant"]
    assert shlex.split(told) == ["python", "jobs/report.py", *arguments]
