"""The explorer in use: a real headless Chromium, with desktop and phone sizes, and hostile texts."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from fake_model import ROLES, fake_capture, fake_layout, words
from synthetic import HOSTILE
from test_explore import serving
from test_report_browser import browser, patient, until

import analysis.explorer.token
from analysis.explorer.live import Explorer
from analysis.explorer.one_file import export_page
from analysis.explorer.token import token_page
from store import CaptureGroup, open_capture

pytestmark = pytest.mark.browser
__all__ = ["browser"]
PHONE = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True}
DESK = {"viewport": {"width": 1400, "height": 900}}
DARK = {"color_scheme": "dark"}
PAGES = ("/", "/fake", "/fake?by=tokens&name=e", "/-/search?q=1", "/-/search?q=nothing+has+this", "/fake/document/0",
         "/fake/token/{token}", "/fake/token/{token}?layer=1&expert=2",
         "/fake/expert/1/2", "/fake/search?q=1", "/fake/search?q=nothing+has+this", "/nothing")  # fmt: skip


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    """A capture whose names and pieces are hostile, and one that lacks a shard."""
    path = tmp_path_factory.mktemp("explore") / "s.zarr"
    fake_capture(path, [words(60, number) for number in range(6)] + [words(20, 9), ""])
    fake_capture(path, [words(60, 1)], name="some")
    CaptureGroup(path, "some").discard(1)
    explorer = Explorer(str(path), ["fake", "some"])
    for name in explorer.indexes:
        explorer.refresh(name)
    view = explorer.shown["fake"].view
    view.names[:] = [HOSTILE[number % len(HOSTILE)] for number in range(len(view.names))]
    view.texts[:] = [f" {HOSTILE[number % len(HOSTILE)]}{number}" for number in range(len(view.texts))]
    return explorer


@pytest.fixture(scope="module")
def address(explorer: Explorer) -> Iterator[str]:
    """The address of the explorer."""
    with serving(explorer) as address:
        yield address


@pytest.fixture(scope="module")
def token(explorer: Explorer) -> int:
    """The most frequent token."""
    return int(explorer.shown["fake"].view.token_counts.argmax())


@pytest.fixture
def opened(browser: Any, request: pytest.FixtureRequest) -> Iterator[tuple[Any, dict[str, list[Any]]]]:
    """A page, and its messages, requests and pop-ups."""
    options = getattr(request, "param", {})
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    page = patient(context).new_page()
    heard: dict[str, list[Any]] = {"console": [], "requests": [], "dialogs": []}
    page.on("console", lambda message: heard["console"].append(message.text))
    page.on("pageerror", lambda error: heard["console"].append(str(error)))
    page.on("request", lambda asked: heard["requests"].append(asked.url))
    page.on("dialog", lambda dialog: (heard["dialogs"].append(dialog.message), dialog.dismiss()))
    yield page, heard
    context.close()


def go(page: Any, url: str) -> None:
    """Open a page and wait until it is drawn."""
    page.goto(url)
    if "/document/" in url or url.startswith("file:"):
        page.wait_for_selector("body[data-drawn]")


def shown(page: Any) -> str:
    """The panel's text about a token."""
    return str(page.inner_text("#token"))


@pytest.mark.parametrize(
    "opened",
    [DESK, PHONE, DESK | DARK, PHONE | DARK],
    indirect=True,
    ids=["desk", "phone", "dark desk", "dark phone"],
)
def test_pages_are_quiet_inert_as_wide_as_the_screen_and_can_be_read_by_everybody(
    opened: Any, address: str, token: int
) -> None:
    page, heard = opened
    for place in PAGES:
        go(page, address + place.format(token=token))
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), place
        found = Axe().run(page)
        assert not found.response["violations"], f"{place}: {found.generate_report()}"
    asked_for = [url for url in heard["requests"] if not url.startswith((address, "data:"))]
    assert not asked_for
    assert not heard["dialogs"]
    page.keyboard.press("?")
    found = Axe().run(page)
    assert not found.response["violations"], f"the keys: {found.generate_report()}"
    assert [line for line in heard["console"] if "404" not in line] == []


class Counted:
    """A visitor, starting at the first page, whose actions are counted."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.actions = page, 0
        go(page, address)

    def click(self, selector: str) -> None:
        """Follow a link, or choose a token."""
        self.actions += 1
        self.page.click(selector)

    def search(self, text: str) -> None:
        """Type into the first page's search and submit."""
        self.actions += 1
        self.page.fill("main input[type=search]", text)
        self.page.press("main input[type=search]", "Enter")
        self.page.wait_for_selector("h1:has-text('“')")


def test_three_actions_tell_where_a_token_goes_at_a_layer(opened: Any, address: str, explorer: Explorer) -> None:
    capture = open_capture(explorer.path, "fake").load()
    number = int(explorer.shown["fake"].view.token_counts.argmax())
    chosen = capture["expert"].values[capture["token"].values == number][:, 2]
    visitor = Counted(opened[0], address)
    visitor.search(str(capture["piece"].values[number]))
    visitor.click(f"a[href='/fake/token/{number}']")
    opened[0].wait_for_selector("h1:has-text('Token')")
    cells = opened[0].locator(".map tbody tr:nth-child(3) td").all_inner_texts()
    assert cells == [f"{100 * (chosen == e).any(1).mean():.0f}" for e in range(8)]
    assert visitor.actions <= 3


def test_three_actions_show_the_path_of_a_token(opened: Any, address: str, explorer: Explorer) -> None:
    visitor, page = Counted(opened[0], address), opened[0]
    visitor.click(".cards a[href='/fake']")
    visitor.click("a[href='/fake/document/2']")
    page.wait_for_selector("body[data-drawn]")
    visitor.click("#text span:nth-child(5)")
    said = page.eval_on_selector_all("#path title", "(titles) => titles.map((title) => title.textContent)")
    view = explorer.shown["fake"].view
    experts = open_capture(explorer.path, "fake")["expert"].values[view.pages_of(2)[0][0], 4]
    wanted = {f"layer {layer}: choice {k + 1} is expert {experts[layer, k]}" for layer in range(3) for k in range(2)}
    assert {title.split(",")[0] for title in said} == wanted
    assert visitor.actions <= 3


def test_three_actions_find_a_phrase_in_the_text(opened: Any, address: str, explorer: Explorer) -> None:
    capture, page = open_capture(explorer.path, "fake").load(), opened[0]
    phrase = "".join(str(capture["piece"].values[number]) for number in capture["token"].values[0, 2:4].tolist())
    phrase = phrase.replace("▁", " ")[1:]
    rows = zip(capture["token"].values, capture["length"].values, strict=True)
    texts = ["".join(str(capture["piece"].values[number]) for number in row[:length]) for row, length in rows]
    number = sum(text.replace("▁", " ").count(phrase) for text in texts)
    visitor = Counted(page, address)
    visitor.search(phrase)
    assert f"{number} place" in page.inner_text("section:has(a[href^='/fake/search'])")
    visitor.click("section:has(a[href^='/fake/search']) .contexts a >> nth=0")
    page.wait_for_selector("body[data-drawn]")
    assert "token 2; layer 0" in shown(page)
    assert visitor.actions <= 3


def test_keys_search_help_and_go_to_the_next_occurrence_and_layer(
    opened: Any, address: str, explorer: Explorer, token: int
) -> None:
    page, now = opened[0], explorer.shown["fake"].view.now
    place = now.neighbour(token, 0, 0)
    go(page, f"{address}/fake/place?row={place[0]}&position={place[1]}")
    page.wait_for_selector("body[data-drawn]")
    page.keyboard.press("k")
    assert "; layer 1" in shown(page)
    for key, back in (("n", False), ("n", False), ("p", True)):
        place = now.neighbour(token, *place, back=back)
        document, at, index = explorer.shown["fake"].view.page_at(*place)
        page.keyboard.press(key)
        page.wait_for_url(re.compile(rf"/fake/document/{document}\?(.*&)?token={index}(&|$)"))
        page.wait_for_selector("body[data-drawn] #text .at")
        assert f"page={at}" in page.url or at == 1
        assert "; layer 1" in shown(page)
    page.keyboard.press("j")
    assert "; layer 0" in shown(page)
    page.keyboard.press("?")
    assert "next occurrence" in page.inner_text("dialog")
    page.keyboard.press("k")
    assert "; layer 0" in shown(page), "the help is read"
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    page.keyboard.press("/")
    page.keyboard.type("n/?")
    assert page.input_value("#find") == "n/?"


def test_blanks_and_the_font_are_chosen_and_kept_in_the_link(opened: Any, address: str) -> None:
    page, _ = opened
    go(page, f"{address}/fake/document/0")
    assert "·" not in page.inner_text("#text")
    page.check("#blanks")
    page.check("#mono")
    assert page.inner_text("#text").startswith("·")
    go(page, page.url)
    assert page.is_checked("#blanks")
    assert "monospace" in page.evaluate("getComputedStyle(document.getElementById('text')).fontFamily")


def test_a_token_s_path_is_shown_at_a_hover_and_kept_at_a_click(opened: Any, address: str, explorer: Explorer) -> None:
    page, _ = opened
    go(page, f"{address}/fake/document/0")
    assert "Point at a token" in shown(page)
    page.hover("#text span:nth-child(3)")
    assert re.search(r"token 2; layer 0: expert \d \(\d\.\d{3}\), expert \d \(\d\.\d{3}\)", shown(page))
    assert page.locator("#path circle:not(.grid)").count() == 3 * 2, "both choices at every layer"
    page.hover("h1")
    assert "Point at a token" in shown(page)
    page.click("#text span:nth-child(4)")
    page.hover("h1")
    assert "token 3; layer 0" in shown(page)
    view = explorer.shown["fake"].view
    group = CaptureGroup(view.store, "fake")
    routes = view.arrays["expert"][view.pages_of(0)[0][0], 3]
    assert group.num_shards > 1
    for k in (0, 1):
        assert f"expert {routes[0, k]} (" in shown(page)


def test_a_link_shows_the_same_view_again(opened: Any, address: str, browser: Any) -> None:
    page, _ = opened
    go(page, f"{address}/fake/document/2")
    page.fill("#layer", "2")
    page.click("#text span:nth-child(5)")
    page.locator("#legend button").nth(1).click()
    link, said = page.evaluate("location.href"), shown(page)
    assert all(re.search(part, link) for part in ("layer=2", r"expert=\d", "token=4"))
    other = patient(browser.new_context()).new_page()
    go(other, link)
    assert shown(other) == said
    assert other.locator("#layer-number").inner_text() == "2"
    assert other.locator("#legend button[aria-pressed=true]").count() == 1
    coloured = "[...document.querySelectorAll('#text span')].map((span) => span.style.backgroundColor)"
    assert other.evaluate(coloured) == page.evaluate(coloured)
    other.context.close()


def test_the_colour_is_the_first_expert_s_and_its_strength_the_weight(opened: Any, address: str) -> None:
    page, _ = opened
    go(page, f"{address}/fake/document/0")
    spans = page.evaluate("[...document.querySelectorAll('#text span')].map((span) => span.style.backgroundColor)")
    legend = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#legend button')]"
        ".map((b) => [b.dataset.expert, b.style.backgroundColor]))"
    )
    bare = {expert: re.match(r"rgba?\((\d+, \d+, \d+)", colour)[1] for expert, colour in legend.items()}  # type: ignore[index]
    largest = page.evaluate("JSON.parse(document.getElementById('data').textContent).documents[0].scale * 65535")
    assert largest > 1
    for number, said in enumerate(every_token(page, len(spans))):
        [expert, weight] = re.search(r": expert (\d) \((\d\.\d{3})\)", said).groups()  # type: ignore[union-attr]
        rgb, alpha = re.match(r"rgba?\((\d+, \d+, \d+)(?:, ([\d.]+))?\)", spans[number]).groups()  # type: ignore[union-attr]
        assert rgb == bare[expert]
        assert float(alpha) == pytest.approx(0.6 * float(weight) / largest, abs=0.01)


def every_token(page: Any, number: int) -> list[str]:
    """The panel's text about the first tokens."""
    said = []
    for token in range(number):
        page.hover(f"#text span:nth-child({token + 1})")
        said.append(shown(page))
    return said


def test_the_keyboard_alone_walks_tokens_layers_and_pages(opened: Any, address: str, token: int) -> None:
    page, _ = opened
    go(page, f"{address}/fake/document/0")
    page.focus("#text")
    for key, said in (
        ("ArrowRight", "token 0; layer 0"),
        ("ArrowRight", "token 1; layer 0"),
        ("ArrowUp", "token 1; layer 1"),
        ("ArrowLeft", "token 0; layer 1"),
        ("ArrowDown", "token 0; layer 0"),
        ("ArrowDown", "token 0; layer 0"),
        ("Escape", "Point at a token"),
    ):
        page.keyboard.press(key)
        assert said in shown(page)
    go(page, f"{address}/fake")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.pathname") == "/fake/expert/0/1":
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/fake/expert/0/1")
    page.focus("input[type=search]")
    page.keyboard.type("3")
    page.keyboard.press("Enter")
    page.wait_for_url("**/fake/search?q=3")


def test_a_page_s_number_can_be_typed_and_what_was_asked_is_kept(
    opened: Any, explorer: Explorer, address: str, token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis.explorer.token, "CONTEXTS", 2)
    counts = token_page(explorer.shown["fake"].view, token)["counts"][0]
    page, _ = opened
    for place, asked in (("document/0", ""), (f"token/{token}", f"layer=0&expert={int(np.argmax(counts))}&")):
        go(page, f"{address}/fake/{place}?{asked}")
        number = page.locator("input[name=page] >> nth=0")
        assert number.input_value() == "1"
        number.fill("2")
        number.press("Enter")
        page.wait_for_url(f"**/fake/{place}?{asked}page=2")
        assert page.locator("input[name=page] >> nth=0").input_value() == "2"


def test_from_a_token_to_its_expert_to_its_contexts_and_back_to_the_text(opened: Any, address: str, token: int) -> None:
    page, _ = opened
    go(page, f"{address}/fake/document/0")
    page.click("#text span:nth-child(2)")
    page.click("#links a:has-text('expert')")
    page.wait_for_selector("h1:has-text('of layer 0')")
    page.click(".contexts a >> nth=0")
    page.wait_for_selector("body[data-drawn]")
    assert "layer=0" in page.url
    assert page.locator("#text .at").count() == 1
    page.click("#links a:has-text('all places of this token')")
    page.wait_for_selector("h2:has-text('Places')")
    assert page.locator("mark").count() > 0


@pytest.mark.parametrize("opened", [PHONE], indirect=True)
def test_a_tap_shows_a_token_s_path_on_a_phone(opened: Any, address: str) -> None:
    page, _ = opened
    go(page, f"{address}/fake/document/0")
    page.tap("#text span:nth-child(3)")
    assert "token 2; layer 0" in shown(page)
    box = page.locator("#panel").bounding_box()
    assert box["y"] < 800
    assert box["y"] + box["height"] <= 801, "in sight, at the foot of the screen"


def test_more_that_was_committed_is_offered_and_not_forced(opened: Any, explorer: Explorer, address: str) -> None:
    page, _ = opened
    go(page, f"{address}/some")
    page.wait_for_selector("#state:has-text('some is incomplete')")
    assert page.locator("#state button").count() == 0, "the page is up to date"
    old = explorer.shown["some"]
    explorer.shown["some"] = replace(old, digest="another")
    try:
        page.wait_for_selector("#state button:has-text('Show new results')")
        page.focus("#state button")
        for _ in range(2):  # when the second answer arrives, the first one is shown
            page.wait_for_event("response", lambda answer: answer.url.endswith("/-/state.json"))
        assert page.evaluate("document.activeElement.textContent") == "Show new results", "kept over a poll"
        page.keyboard.press("Enter")
        page.wait_for_selector("#state:has-text('some is incomplete')")
        assert page.locator("#state button").count() == 0
    finally:
        explorer.shown["some"] = old


@pytest.mark.parametrize("opened", [{}, PHONE, {"color_scheme": "dark"}], indirect=True, ids=["desk", "phone", "dark"])
def test_an_exported_file_works_alone(opened: Any, explorer: Explorer, tmp_path: Path) -> None:
    page, heard = opened
    file = tmp_path / "page.html"
    file.write_text(export_page(explorer.shown["fake"].view, [0, 6]), encoding="utf-8")
    go(page, file.as_uri())
    assert not [url for url in heard["requests"] if not url.startswith(("file:", "data:"))]
    page.click("#text span:nth-child(3)")
    assert "token 2; layer 0" in shown(page)
    options = page.locator("#document option").all_inner_texts()
    assert len(options) == 2, "each document whole"
    page.hover("h1")
    page.select_option("#document", str(len(options) - 1))
    assert "Point at a token" in shown(page)
    until(page, "document.querySelectorAll('#text span').length > 0")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.locator("#links a").count() == 0, "there is no server to go to"
    assert not Axe().run(page).response["violations"]
    assert heard["console"] == []
    assert not heard["dialogs"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A capture of 128 experts, eight per token, of conversations, with blank tokens and documents."""
    path = tmp_path_factory.mktemp("many") / "s.zarr"
    layout = fake_layout(num_experts=128, experts_per_token=8, roles=ROLES, layers=(3, 5))
    talks = [[{"role": role, "content": words(9, number)} for role in ("user", "assistant")] for number in range(4)]
    fake_capture(path, talks, layout=layout)
    explorer = Explorer(str(path))
    explorer.refresh("fake")
    view = explorer.shown["fake"].view
    view.names[:] = ["   ", "", "\u202eevil", "plain"]
    view.texts[:] = ["   " if number % 3 else f" {number}" for number in range(len(view.texts))]
    with serving(explorer) as address:
        yield address


@pytest.mark.parametrize("opened", [{}, PHONE, {"color_scheme": "dark"}], indirect=True, ids=["desk", "phone", "dark"])
def test_many_experts_blank_tokens_and_speakers_can_be_read_by_everybody(opened: Any, many: str) -> None:
    page, heard = opened
    for place in ("/fake", "/fake/document/0", "/fake/document/1", "/fake/expert/3/77", "/fake/search?q=+"):
        go(page, many + place)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), place
        found = Axe().run(page)
        assert not found.response["violations"], f"{place}: {found.generate_report()}"
    go(page, f"{many}/fake/document/3?expert=77&token=2")
    assert page.locator("#text .speaker").all_inner_texts() == ["user"]
    assert page.locator("#legend button[aria-pressed=true]").count() == 1
    assert page.locator("#path circle:not(.grid)").count() == 2 * 8
    go(page, f"{many}/fake/document/3?expert=999&token=1.5")
    assert page.locator("#legend button[aria-pressed=true]").count() == 0
    go(page, f"{many}/fake")
    page.fill("input[name=layer]", "5")
    page.fill("input[name=expert]", "99")
    page.keyboard.press("Enter")
    page.wait_for_url("**/fake/expert/5/99")
    assert [line for line in heard["console"] if "404" not in line] == []


@pytest.mark.parametrize(
    "opened", [PHONE, {"viewport": {"width": 844, "height": 390}}], indirect=True, ids=["phone", "flat"]
)
def test_the_chosen_token_is_never_under_the_panel(opened: Any, address: str) -> None:
    page, _ = opened
    go(page, f"{address}/fake/document/0")
    page.focus("#text")
    last = page.locator("#text span").count()
    for _ in range(last):
        page.keyboard.press("ArrowRight")
    token, panel = page.locator("#text .at").bounding_box(), page.locator("#panel").bounding_box()
    assert token["y"] + token["height"] <= panel["y"] or token["y"] >= panel["y"] + panel["height"]


def test_an_empty_document_takes_any_key(opened: Any, address: str) -> None:
    page, heard = opened
    go(page, f"{address}/fake/document/7")
    page.focus("#text")
    for key in ("ArrowRight", "ArrowLeft", "ArrowUp", "Escape"):
        page.keyboard.press(key)
    assert heard["console"] == []
