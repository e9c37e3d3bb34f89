"""The report in a real headless Chromium, offline, with desktop and phone sizes."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from chromium import CHROMIUM, launched
from patience import HUNG_S, wait_until
from synthetic import HOSTILE, make_capture
from test_report import contrasted

from analysis.report import page as report
from analysis.report.summary import summary

pytestmark = pytest.mark.browser
MARKS = {
    "load": "cells", "domains": "cells", "classes": "cells", "repetition": "cells", "paths": "links",
    "tokens": "tokens", "lines": "points",
}  # fmt: skip
KINDS = [
    *["lines"] * 4,
    *(kind for kind in ("load", "tokens", "classes", "domains") for _ in range(2)),
    "paths",
    *["lines"] * 2,
    *["repetition"] * 2,
    *["lines"] * 7,  # confidence, position, caching
]


@pytest.fixture(scope="module")
def drawing():
    """A report of two data sets with hostile tokens and names, and missing shards."""
    pieces = [*HOSTILE, *(f"w{index}" for index in range(60 - len(HOSTILE)))]
    common = {"documents": 80, "pieces": pieces, "vocabulary": 60, "layers": (0, 1, 2, 3)}
    captures = {
        "<img src=x onerror=alert(9)>": make_capture(seed=1, **common),
        "plain": make_capture(seed=2, missing=(2,), **common),
    }
    answers = [replace(each, store="my store.zarr") for each in contrasted(missing=(2,), **captures)]
    return report.report_of(answers, again="python jobs/report.py 'my store.zarr'")


def findings_of(drawing):
    """The three sentences of the summary."""
    return summary(drawing.answers, drawing.apart, drawing.figures, drawing.again).findings


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, drawing):
    """Its page."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.render(drawing), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium; without it the tests are skipped, unless they were requested."""
    if CHROMIUM is None:
        assert os.environ.get("REQUIRE_BROWSER") != "1", "REQUIRE_BROWSER=1, and there is no chromium on the path"
        pytest.skip("no chromium on the path; REQUIRE_BROWSER=1 makes this a failure")
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def looked_at(browser, page_file):
    """The page, for tests that do not change it, and its messages, requests and pop-ups."""
    yield from a_page(browser, page_file, {})


@pytest.fixture
def opened(browser, page_file, request):
    """A separate page for one test."""
    yield from a_page(browser, page_file, getattr(request, "param", {}))


def a_page(browser, page_file, options):
    """The drawn page, and its messages, requests and pop-ups; closed at the end."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    page = patient(context).new_page()
    heard = {"console": [], "requests": [], "dialogs": []}
    page.on("console", lambda message: heard["console"].append((message.type, message.text)))
    page.on("pageerror", lambda error: heard["console"].append(("error", str(error))))
    page.on("request", lambda asked: heard["requests"].append(asked.url))
    page.on("dialog", lambda dialog: (heard["dialogs"].append(dialog.message), dialog.dismiss()))
    page.goto(page_file.as_uri())
    page.wait_for_selector("body[data-drawn]")
    yield page, heard
    context.close()


def patient(context):
    """A browser context that waits until an event is considered hung, instead of half a minute."""
    context.set_default_timeout(1000 * HUNG_S)
    return context


def until(page, condition):
    """Wait for a condition; Playwright's own method needs `eval`, which the page's policy forbids."""
    wait_until(lambda: page.evaluate(condition), condition)


def table_of(figure):
    """The table in a chart's open menu: its head and its rows, as displayed."""
    return figure.evaluate(
        "figure => [...figure.querySelectorAll('.menu tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    )


def open_menu(figure):
    """Open a chart's menu if it is closed; another open menu is closed."""
    if not figure.evaluate("figure => figure.querySelector('.menu').matches(':popover-open')"):
        figure.evaluate("() => document.querySelector('.menu:popover-open')?.hidePopover()")
        figure.query_selector(".more").click()
    figure.wait_for_selector("tbody tr")


def rows_of(figure):
    """The rows of a chart's table, which its menu shows while it is open."""
    open_menu(figure)
    rows = table_of(figure)[1:]
    close_menu(figure)
    return rows


def close_menu(figure):
    """Close a chart's menu as a reader does, so that what is below it can be clicked."""
    if figure.evaluate("figure => figure.querySelector('.menu').matches(':popover-open')"):
        figure.query_selector(".close").click()


def figures(page):
    """Every chart: its kind, the marks drawn, and the rows of its table."""
    for figure in page.query_selector_all("figure[data-kind]"):
        kind = figure.get_attribute("data-kind")
        open_menu(figure)
        marks = figure.evaluate(f"figure => figure.querySelectorAll('.{MARKS[kind]}_marks > *').length")
        yield kind, marks, len(table_of(figure)) - 1


def saved(page, figure, form):
    """The name and the bytes of what a button saves."""
    open_menu(figure)
    with page.expect_download() as download:
        figure.query_selector(f"[data-save={form}]").click()
    return download.value.suggested_filename, Path(download.value.path()).read_bytes()


def drawn_links(page):
    """Whether each link of the picture of paths is lit."""
    links = "[...document.querySelectorAll('figure[data-kind=paths] .links_marks > *')]"
    return page.evaluate(f"{links}.map((link) => link.getAttribute('opacity') !== '0.02')")


def test_it_is_silent_and_asks_no_host_for_anything(looked_at, page_file):
    page, heard = looked_at
    list(figures(page))
    page.mouse.move(400, 700)
    assert heard == {"console": [], "requests": [page_file.as_uri()], "dialogs": []}


def test_each_chart_holds_as_many_marks_as_its_table_has_rows(looked_at):
    page, _ = looked_at
    counted = list(figures(page))
    assert [kind for kind, _, _ in counted] == KINDS
    for kind, marks, rows in counted:
        assert marks == rows > 0, kind
    assert [rows for kind, _, rows in counted if kind == "load"] == [32, 32]


def test_each_chart_is_saved_as_the_numbers_of_its_table(looked_at):
    page, heard = looked_at
    names = set()
    for number, kind in enumerate(KINDS):
        figure = page.query_selector(f"figure[data-number='{number}']")
        name, data = saved(page, figure, "csv")
        names.add(name)
        assert name.endswith(".csv")
        assert kind == "lines" or name.startswith(f"{kind}-")
        assert not set("<>/ ") & set(name)
        rows = list(csv.reader(data.decode().splitlines()))
        head, *shown = table_of(figure)
        assert rows[0] == [cell.replace(" ", "_") for cell in head]
        assert [[cell.lstrip("'") for cell in row] for row in rows[1:]] == [
            ["" if cell == "–" else cell.lstrip("'") for cell in row] for row in shown
        ]
    assert len(names) == len(KINDS)
    assert heard["console"] == []


@pytest.mark.parametrize("kind", sorted(MARKS))
def test_a_chart_is_saved_as_a_picture(looked_at, kind):
    page, heard = looked_at
    figure = page.query_selector(f"figure[data-kind={kind}]")
    for form, begins in (("svg", b"<svg"), ("png", b"\x89PNG")):
        name, data = saved(page, figure, form)
        assert name.endswith(f".{form}")
        assert data.startswith(begins)
        if form == "svg":
            title = figure.query_selector("h3").text_content()
            assert title.split()[0] in data.decode(), "a saved picture has its title in it"
    assert heard["console"] == []


def test_hovering_an_expert_leaves_its_own_links(opened, drawing):
    page, heard = opened
    figure = page.query_selector("figure[data-kind=paths]")
    [paths] = [one for one in drawing.figures if one.kind == "paths"]
    links, circles = paths.shown(paths.options[0])["datasets"].values()
    own = max(circles, key=lambda row: row["first"])
    figure.query_selector_all(".experts_marks > *")[circles.index(own)].hover()
    ends = [{(row["layer"], row["expert"]), (row["next_layer"], row["next_expert"])} for row in links]
    lit = [(own["layer"], own["expert"]) in both for both in ends]
    assert {True, False} == set(lit)
    wait_until(lambda: drawn_links(page) == lit, "the other links are dim")
    page.mouse.move(5, 5)
    until(page, "document.querySelectorAll('figure[data-kind=paths] .links_marks > [opacity=\"0.02\"]').length === 0")
    assert heard["console"] == []


def test_choosing_a_data_set_and_a_token_draws_its_own_path(opened, drawing):
    page, heard = opened
    [paths] = [one for one in drawing.figures if one.kind == "paths"]
    figure = page.query_selector("figure[data-kind=paths]")
    caption = "document.querySelector('figure[data-kind=paths] figcaption .of').textContent"
    figure.query_selector("[data-choose=group]").select_option("plain")
    until(page, f"{caption} === 'plain: all tokens'")
    listed = [choice for choice in paths.options if choice.group == "plain"]
    options = figure.query_selector_all("[data-choose=value] option")
    assert [one.text_content() for one in options] == [choice.label for choice in listed]
    assert len(listed) == 17
    for choice in (listed[9], listed[0], listed[16]):
        figure.query_selector("[data-choose=value]").select_option(str(choice.value))
        until(page, f"{caption} === {json.dumps(choice.caption)}")
        shown = paths.shown(choice)["datasets"]["links"]
        open_menu(figure)
        head, *rows = table_of(figure)
        close_menu(figure)
        assert head == ["data set", "token", *(name.replace("_", " ") for name in shown[0])]
        told = [[*map(str, choice.row.values()), *(f"{value:g}" for value in row.values())] for row in shown]
        assert rows == told
        assert len(drawn_links(page)) == len(shown)
        assert choice.subtitle[0] in figure.query_selector("figcaption .soft").text_content()
    name, data = saved(page, figure, "csv")
    assert name.startswith("paths-plain-")
    assert len(data.decode().splitlines()) == len(rows) + 1
    assert heard == {"console": [], "dialogs": [], "requests": heard["requests"][:1]}


def test_typing_narrows_the_tokens_and_enter_draws_the_first(opened, drawing):
    page, _ = opened
    [paths] = [one for one in drawing.figures if one.kind == "paths"]
    figure = page.query_selector("figure[data-kind=paths]")
    field, tokens = (figure.query_selector(f"[data-choose={part}]") for part in ("typed", "value"))
    field.focus()
    page.keyboard.type("SCRIPT")
    left = [one.text_content() for one in tokens.query_selector_all("option")]
    own = [choice for choice in paths.options if choice.group == paths.options[0].group]
    assert left == ["all tokens", *(c.label for c in own[1:] if "script" in c.label.lower())]
    assert len(left) > 1
    page.keyboard.press("Enter")
    [wanted] = [choice for choice in own if choice.label == left[1]]
    caption = "document.querySelector('figure[data-kind=paths] figcaption .of').textContent"
    until(page, f"{caption} === {json.dumps(wanted.caption)}")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")
    until(page, f"{caption}.endsWith(': all tokens')")
    assert page.evaluate("document.activeElement.dataset.choose") == "value", "drawing does not take the focus away"


@pytest.mark.parametrize("opened", [{"color_scheme": "dark"}], indirect=True)
def test_what_is_chosen_stays_when_light_and_dark_change(opened, drawing):
    page, heard = opened
    figure = page.query_selector("figure[data-kind=paths]")
    [paths] = [one for one in drawing.figures if one.kind == "paths"]
    figure.query_selector("[data-choose=value]").select_option("3")
    links = len(paths.shown(paths.options[3])["datasets"]["links"])
    until(page, f"document.querySelectorAll('figure[data-kind=paths] .links_marks > *').length === {links}")
    title = "getComputedStyle(document.querySelector('figure[data-kind=paths] .role-axis-title text')).fill"
    before = page.evaluate(title)
    page.emulate_media(color_scheme="light")
    until(page, f"{title} !== {before!r}")
    assert len(drawn_links(page)) == links
    assert heard["console"] == []


def test_no_cell_of_a_saved_table_is_a_formula(looked_at):
    page, _ = looked_at
    _, data = saved(page, page.query_selector("figure[data-kind=tokens]"), "csv")
    cells = [cell for row in csv.reader(data.decode().splitlines()) for cell in row]
    assert any(cell.startswith("'") for cell in cells)
    assert not [cell for cell in cells if cell[:1] in ("=", "+", "@") or (cell[:1] == "-" and not cell[1:2].isdigit())]


def test_choosing_a_layer_changes_charts_and_tables_alike(opened, drawing):
    page, _ = opened
    charts = page.query_selector_all("figure[data-kind=tokens]")
    drawn = [one for one in drawing.figures if one.kind == "tokens"]
    named = next(finding.layer for finding in findings_of(drawing) if finding.layer is not None)
    other = next(layer for layer in (3, 2) if layer != named)
    assert page.input_value("#layer") == str(named), "the layer that the summary names first is open"
    link = page.query_selector(f"[data-layer='{named}']")
    choose = (lambda: None, lambda: page.select_option("#layer", str(other)), link.click)
    for layer, how in zip((named, other, named), choose, strict=True):
        how()
        for figure, one in zip(charts, drawn, strict=True):
            [choice] = [choice for choice in one.options if choice.value == layer]
            wanted = one.shown(choice)["datasets"]["tokens"]
            texts = "figure => [...figure.querySelectorAll('.tokens_marks text')].map((text) => text.textContent)"
            wait_until(lambda f=figure, w=wanted, t=texts: len(f.evaluate(t)) == len(w), "as many words are drawn")
            shown = [[str(layer), row["piece"]] for row in wanted]
            wait_until(
                lambda f=figure, s=shown: [[row[0], row[3]] for row in rows_of(f)] == s, "the table is this layer's"
            )


def test_hostile_text_is_shown_and_does_nothing(looked_at):
    page, heard = looked_at
    page.evaluate("new Promise(done => requestIdleCallback(done, { timeout: 1000 }))")  # never idle in the background
    assert page.query_selector("img") is None
    assert page.evaluate("document.querySelectorAll('script').length") == 3
    assert "<img src=x onerror=alert(9)>" in page.inner_text("header")
    assert "missing shards: 2" in page.inner_text(".warning")
    assert heard["dialogs"] == []


WIDTHS = [{"viewport": {"width": width, "height": 900}, "bypass_csp": True} for width in (1400, 390)]


@pytest.mark.parametrize("opened", WIDTHS, indirect=True, ids=["1400", "390"])
def test_nothing_is_cut_off_and_axe_finds_nothing_that_keeps_somebody_out(opened):
    page, _ = opened
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    cut = """[...document.querySelectorAll('header *, main *')].filter((part) => {
        const { left, right, width } = part.getBoundingClientRect();
        return width > 0 && (left < -1 || right > innerWidth + 1);
    })"""
    assert page.evaluate(f"{cut}.map((part) => part.textContent)") == []
    open_menu(page.query_selector("figure[data-kind=tokens]"))
    # The charts are the same ones at both widths, and their thousands of marks take most of the time.
    context = None if width > 390 else {"exclude": [[".chart svg"]]}
    found = Axe().run(page, context, {"resultTypes": ["violations"]}).response
    assert len(found["passes"]) > 30
    page.emulate_media(color_scheme="dark")
    until(page, "getComputedStyle(document.querySelector('.role-axis-title text')).fill === 'rgb(163, 172, 186)'")
    only = {"runOnly": ["color-contrast"], "resultTypes": ["violations"]}  # nothing else changes
    dark = Axe().run(page, {"exclude": [[".chart svg"]]}, only).response
    assert len(dark["passes"]) == 1
    faults = [*found["violations"], *dark["violations"]]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in faults] == []


@pytest.mark.parametrize("opened", [{"permissions": ["clipboard-read", "clipboard-write"]}], indirect=True)
def test_the_summary_is_copied_with_its_picture_and_a_finding_with_its_command(opened, drawing):
    page, _ = opened
    page.click("#copy")
    until(page, "document.querySelector('#copied').textContent === 'Copied'")
    read = """navigator.clipboard.read().then(async ([item]) =>
        Promise.all(["text/plain", "text/html"].map(async (form) => (await item.getType(form)).text())))"""
    text, markup = page.evaluate(read)
    *said, commands = text.split("\n\n")
    assert said == [finding.said for finding in findings_of(drawing)]
    assert commands == "python jobs/report.py 'my store.zarr'"
    assert markup.count("<img") == 1
    assert "data:image/png;base64," in markup
    command = page.query_selector(".findings [data-copy]")
    command.click()
    until(page, "document.querySelector('.findings [data-copy]').textContent === 'Copied'")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == command.get_attribute("data-copy")
    assert copied.startswith("python jobs/explore.py 'my store.zarr' --page synthetic")


def test_on_paper_nothing_is_left_to_click(opened):
    page, _ = opened
    page.emulate_media(media="print")
    assert not [one for one in page.query_selector_all("button, select, input, nav") if one.is_visible()]
    assert all(chart.is_visible() for chart in page.query_selector_all(".chart"))


@pytest.mark.parametrize("opened", [{"color_scheme": "dark"}], indirect=True)
def test_dark_is_dark_and_follows_the_reader(opened):
    page, heard = opened
    ground = "getComputedStyle(document.body).backgroundColor"
    title = "getComputedStyle(document.querySelector('.role-axis-title text')).fill"
    dark = page.evaluate(ground), page.evaluate(title)
    page.emulate_media(color_scheme="light")
    until(page, f"{title} !== {dark[1]!r}")
    assert page.evaluate(ground) != dark[0]
    assert heard["console"] == []


def test_the_layer_and_every_table_are_reached_by_keyboard(opened):
    page, _ = opened
    reached = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("((e) => e.id || e.dataset.choose || e.tagName)(document.activeElement)"))
    assert {"layer", "A", "SUMMARY", "BUTTON", "group", "typed", "value"} <= reached
    page.focus("figure[data-kind=paths] .more")
    page.keyboard.press("Enter")
    page.wait_for_selector("figure[data-kind=paths] tbody tr")
    page.keyboard.press("Escape")
    until(page, "document.querySelector('.menu:popover-open') === null")
