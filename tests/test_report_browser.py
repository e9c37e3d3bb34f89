"""The report as people see it: in a real headless Chromium, offline, on a desk and on a phone."""

import csv
import os
import shutil
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from synthetic import HOSTILE, make_capture
from test_report import contrasted, specs_of

from analysis import report

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
MARKS = {"load": "cells", "domains": "cells", "paths": "links", "tokens": "tokens", "lines": "points"}
KINDS = ["lines"] * 4 + [kind for kind in ("load", "tokens", "domains", "paths") for _ in range(2)] + ["lines"] * 4


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A report of two data sets with hostile tokens, names and shards missing."""
    pieces = [*HOSTILE, *(f"w{index}" for index in range(60 - len(HOSTILE)))]
    common = {"documents": 80, "pieces": pieces, "vocabulary": 60, "layers": (0, 1, 2, 3)}
    captures = {
        "<img src=x onerror=alert(9)>": make_capture(seed=1, **common),
        "plain": make_capture(seed=2, missing=(2,), **common),
    }
    answers = contrasted(missing=(2,), **captures)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.render(answers), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium; without it the tests are skipped, unless they were asked for."""
    if CHROMIUM is None:
        assert os.environ.get("REQUIRE_BROWSER") != "1", "REQUIRE_BROWSER=1, and there is no chromium on the path"
        pytest.skip("no chromium on the path; REQUIRE_BROWSER=1 makes this a failure")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, page_file, request):
    """The page, drawn, and everything that it said, asked for or popped up."""
    options = getattr(request, "param", {})
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    page = context.new_page()
    heard = {"console": [], "requests": [], "dialogs": []}
    page.on("console", lambda message: heard["console"].append((message.type, message.text)))
    page.on("pageerror", lambda error: heard["console"].append(("error", str(error))))
    page.on("request", lambda asked: heard["requests"].append(asked.url))
    page.on("dialog", lambda dialog: (heard["dialogs"].append(dialog.message), dialog.dismiss()))
    page.goto(page_file.as_uri())
    page.wait_for_selector("body[data-drawn]", timeout=30_000)
    yield page, heard
    context.close()


def until(page, condition):
    """Wait for a condition; Playwright's own way needs `eval`, which the page's policy refuses."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {condition}")


def figures(page):
    """Every chart: its kind, the marks drawn, and the rows of its table."""
    for figure in page.query_selector_all("figure[data-kind]"):
        kind = figure.get_attribute("data-kind")
        details = figure.query_selector(".numbers")
        if not details.evaluate("node => node.open"):
            details.query_selector("summary").click()
            details.wait_for_selector("tbody tr")
        yield (
            kind,
            len(figure.query_selector_all(f".{MARKS[kind]}_marks > *")),
            len(details.query_selector_all("tbody tr")),
        )


def test_it_is_silent_and_asks_no_host_for_anything(opened, page_file):
    page, heard = opened
    list(figures(page))
    page.mouse.move(400, 700)
    assert heard == {"console": [], "requests": [page_file.as_uri()], "dialogs": []}


def test_each_chart_holds_as_many_marks_as_its_table_has_rows(opened):
    page, _ = opened
    counted = list(figures(page))
    assert [kind for kind, _, _ in counted] == KINDS
    for kind, marks, rows in counted:
        assert marks == rows > 0, kind
    assert [rows for kind, _, rows in counted if kind == "load"] == [32, 32]


def test_each_chart_is_saved_as_numbers_and_as_a_picture(opened):
    page, heard = opened
    for number, kind in enumerate(KINDS):
        figure = page.query_selector(f"figure[data-number='{number}']")
        for form, begins in (("csv", b""), ("svg", b"<svg"), ("png", b"\x89PNG")):
            with page.expect_download() as saved:
                figure.query_selector(f"[data-save={form}]").click()
            name = saved.value.suggested_filename
            assert name.endswith(f".{form}")
            assert kind == "lines" or name.startswith(f"{kind}-")
            assert not set("<>/ ") & set(name)
            data = Path(saved.value.path()).read_bytes()
            assert data.startswith(begins)
        # The last form was the picture; the numbers are those of the table.
        with page.expect_download() as saved:
            figure.query_selector("[data-save=csv]").click()
        rows = list(csv.reader(Path(saved.value.path()).read_text().splitlines()))
        figure.query_selector(".numbers summary").click()
        figure.wait_for_selector("tbody tr")
        shown = [
            [cell.text_content() for cell in row.query_selector_all("td")]
            for row in figure.query_selector_all("tbody tr")
        ]
        assert rows[0] == [cell.text_content().replace(" ", "_") for cell in figure.query_selector_all("th")]
        assert [[cell.lstrip("'") for cell in row] for row in rows[1:]] == [
            ["" if cell == "–" else cell.lstrip("'") for cell in row] for row in shown
        ]
    assert heard["console"] == []


def test_hovering_an_expert_leaves_its_own_links(opened):
    page, heard = opened
    figure = page.query_selector("figure[data-kind=paths]")
    rows = specs_of(page.content(), "paths")[0]["datasets"]
    links = next(rows for rows in rows.values() if "next_expert" in rows[0])
    circles = next(rows for rows in rows.values() if "next_expert" not in rows[0])
    own = max(circles, key=lambda row: row["first"])
    figure.query_selector_all(".experts_marks > *")[circles.index(own)].hover()
    pale = "[...document.querySelector('figure[data-kind=paths]').querySelectorAll('.links_marks > *')]"
    until(page, f"{pale}.filter((link) => link.getAttribute('opacity') === '0.02').length > 0")
    shown = page.evaluate(f"{pale}.map((link) => link.getAttribute('opacity') !== '0.02')")
    ends = [{(row["layer"], row["expert"]), (row["next_layer"], row["next_expert"])} for row in links]
    assert shown == [(own["layer"], own["expert"]) in both for both in ends]
    page.mouse.move(5, 5)
    until(page, f"{pale}.every((link) => link.getAttribute('opacity') !== '0.02')")
    assert heard["console"] == []


def test_no_cell_of_a_saved_table_is_a_formula(opened):
    page, _ = opened
    figure = page.query_selector("figure[data-kind=tokens]")
    with page.expect_download() as saved:
        figure.query_selector("[data-save=csv]").click()
    cells = [cell for row in csv.reader(Path(saved.value.path()).read_text().splitlines()) for cell in row]
    assert any(cell.startswith("'") for cell in cells)
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@") or (cell[:1] == "-" and not cell[1:2].isdigit())]


def test_choosing_a_layer_changes_charts_and_tables_alike(opened):
    page, _ = opened
    before = [row.text_content() for row in page.query_selector_all("figure[data-kind=tokens] .tokens_marks > *")]
    list(figures(page))
    page.select_option("#layer", "3")
    until(page, "document.querySelector('figure[data-kind=tokens] tbody td').textContent === '3'")
    after = [row.text_content() for row in page.query_selector_all("figure[data-kind=tokens] .tokens_marks > *")]
    assert after != before
    for kind, marks, rows in figures(page):
        assert marks == rows, kind


def test_hostile_text_is_shown_and_does_nothing(opened):
    page, heard = opened
    page.wait_for_timeout(200)
    assert page.query_selector("main img, header img") is None
    assert page.evaluate("document.querySelectorAll('script').length") == 3
    assert "<img src=x onerror=alert(9)>" in page.inner_text("header")
    assert "missing shards: 2" in page.inner_text(".warning")
    assert heard["dialogs"] == []


@pytest.mark.parametrize("opened", [{"viewport": {"width": 390, "height": 844}}], indirect=True)
def test_a_phone_needs_no_sideways_scrolling(opened):
    page, _ = opened
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize(
    "opened", [{"color_scheme": scheme, "bypass_csp": True} for scheme in ("light", "dark")], indirect=True
)
def test_axe_finds_nothing_that_keeps_somebody_out(opened):
    page, _ = opened
    found = Axe().run(page).response
    assert len(found["passes"]) > 30
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found["violations"]] == []


def test_on_paper_nothing_is_left_to_click(opened):
    page, _ = opened
    page.emulate_media(media="print")
    assert not [one for one in page.query_selector_all(".save button, select") if one.is_visible()]
    assert all(chart.is_visible() for chart in page.query_selector_all(".chart"))


@pytest.mark.parametrize("opened", [{"color_scheme": "dark"}], indirect=True)
def test_dark_is_dark_and_follows_the_reader(opened):
    page, heard = opened
    ground = "getComputedStyle(document.body).backgroundColor"
    title = "getComputedStyle(document.querySelector('.role-title-text text')).fill"
    dark = page.evaluate(ground), page.evaluate(title)
    page.emulate_media(color_scheme="light")
    until(page, f"{title} !== {dark[1]!r}")
    assert page.evaluate(ground) != dark[0]
    assert heard["console"] == []


def test_the_layer_and_every_table_are_reached_by_keyboard(opened):
    page, _ = opened
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"layer", "SUMMARY", "BUTTON"} <= reached
