"""The explorer with planted experts: its pages show what was planted, compared with independent counts from the
store."""

import base64
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from axe_playwright_python.sync_playwright import Axe
from patience import HUNG_S
from planted import DIGIT_EXPERT, DIGITS, EXPERTS, NAMED, PROSE_EXPERT, planted_store
from test_explore import asked, serving, text_of
from test_explore_browser import PHONE, go, opened
from test_report_browser import browser

import analysis.explorer.compare
import analysis.explorer.counting
import analysis.results
from analysis.explorer.live import Explorer, differs
from analysis.metrics.class_experts import class_experts
from analysis.metrics.contrast import contrast
from analysis.metrics.document_scores import document_scores
from analysis.metrics.effect import effect
from analysis.metrics.token_contributions import token_contributions
from store import open_capture

__all__ = ["browser", "opened"]
Captures = dict[str, xr.Dataset]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_store(tmp_path_factory.mktemp("planted") / "s.zarr")


@pytest.fixture(scope="module")
def captures(store: Path) -> Captures:
    return {name: open_capture(store, name).load() for name in ("prose", "code", "prose-without")}


@pytest.fixture(scope="module")
def explorer(store: Path) -> Explorer:
    explorer = Explorer(str(store))
    for name in explorer.indexes:
        explorer.refresh(name)
    assert not explorer.problems
    return explorer


@pytest.fixture(scope="module")
def address(explorer: Explorer) -> Iterator[str]:
    """The address of the explorer, which waits for any count."""
    with pytest.MonkeyPatch.context() as patched, serving(explorer) as address:
        patched.setattr(analysis.explorer.counting, "PATIENCE_S", HUNG_S)
        yield address


def tokens_of(capture: xr.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Ids, experts and weights of all tokens, and their places."""
    filled = np.arange(capture.sizes["position"]) < capture["length"].values[:, None]
    places = [(int(row), int(position)) for row, position in np.argwhere(filled)]
    return *(capture[name].values[filled] for name in ("token", "expert", "weight")), places


def reach(chosen: np.ndarray) -> np.ndarray:
    """The share of tokens that reach each expert, (layer, expert)."""
    return (chosen[..., None] == np.arange(EXPERTS)).any(2).mean(0)


def test_an_expert_s_line_names_its_class_and_its_data_set(address: str, captures: Captures) -> None:
    layer, expert = DIGIT_EXPERT
    token, chosen, _, _ = tokens_of(captures["prose"])
    here, digit = (chosen[:, layer] == expert).any(1), token >= NAMED["0"]
    page = text_of(asked(f"{address}/prose/expert/{layer}/{expert}")[2])
    lift = (digit & here).sum() / here.sum() / digit.mean()
    assert f"Digits ({lift:.1f} × the average)." in page
    assert f"{(digit & here).sum() / here.sum():.0%} of the tokens that choose it in prose are digits" in page
    assert "strongest in prose." in text_of(asked(f"{address}/prose/expert/7/1")[2])
    assert "strongest" not in text_of(asked(f"{address}/prose/expert/3/3")[2])


def test_pages_of_a_masked_capture_and_the_first_page_s_card_say_so(address: str) -> None:
    page = text_of(asked(f"{address}/prose-without/expert/7/1")[2])
    assert "prose-without was captured with changed choices: mask 7:1." in page
    assert "changed choices" not in text_of(asked(f"{address}/prose/expert/7/1")[2])
    first = text_of(asked(f"{address}/")[2])
    assert first.count("with changed choices: mask 7:1") == 1
    assert "differences are therefore" not in text_of(asked(f"{address}/prose/compare/prose-without")[2])


def test_the_first_places_are_shaded_by_the_weights_around_them(address: str, captures: Captures) -> None:
    layer, expert = PROSE_EXPERT
    _, chosen, weight, places = tokens_of(captures["prose"])
    own = np.where(chosen[:, layer] == expert, weight[:, layer], 0).max(1).astype(float)
    page = asked(f"{address}/prose/expert/{layer}/{expert}")[2]
    [first] = re.findall(r"<li><a href=\"/prose/place\?row=(\d+)&amp;position=(\d+)[^>]*>(.*?)</a>", page)[:1]
    at = places.index((int(first[0]), int(first[1])))
    assert own[at] == own.max()
    shares = [float(share) for share in re.findall(r'data-share="([\d.]+)"', first[2])]
    row = [value for value, place in zip(own, places, strict=True) if place[0] == int(first[0])]
    around = row[max(0, int(first[1]) - 12) : int(first[1]) + 13]
    assert shares == [pytest.approx(value / own.max(), abs=6e-4) for value in around if value > 0]


def test_tokens_against_the_other_data_sets_are_the_contributions(explorer: Explorer, captures: Captures) -> None:
    layer, expert = PROSE_EXPERT
    own = explorer.shown["prose"]
    found = own.profiles.expert(layer, expert, explorer.alike(own))
    wanted = token_contributions(captures["prose"], captures["code"], [layer]).sel(layer=layer, expert=expert)
    assert found["against"]["names"] == ["code"], "one with a masked expert is no other data set of the model"
    assert found["against"]["difference"] == pytest.approx(float(wanted["difference"]))
    assert [row["token_id"] for row in found["against"]["rows"]] == [n for n in wanted["token_id"].values if n >= 0]
    assert [each["dataset"] for each in found["sets"]] == ["prose", "code", "prose-without"]
    assert found["sets"][2]["differs"] == "mask 7:1"
    assert [name for name, _ in found["elsewhere"]] == ["code"]


def test_two_data_sets_are_compared_as_the_metrics_do(address: str, captures: Captures) -> None:
    pair = {name: captures[name] for name in ("prose", "code")}
    found, scores = contrast(pair).isel(data_set=0), document_scores(pair)
    at = np.unravel_index(np.argmax(abs(found["difference"].values)), (8, EXPERTS))
    cell = found.isel(layer=at[0], expert=at[1])
    assert at == PROSE_EXPERT
    page = text_of(asked(f"{address}/prose/compare/code")[2])
    assert "Expert 1 of layer 7 differs most" in page
    low, high = (100 * float(cell[f"difference_{end}"]) for end in ("low", "high"))
    assert f"{low:+.1f} to {high:+.1f}" in page
    carried = token_contributions(*pair.values(), [7]).sel(layer=7, expert=1)
    assert f"{100 * float(carried['usage']):+.1f}{100 * float(carried['routing']):+.1f}" in page.replace(" ", "")
    for name, right in zip(pair, scores["right"].values, strict=True):
        assert f"{right:.0%} of the 12 documents of {name}" in page
    odd = scores["score"].values[:12, 0] - scores["score"].values[:12, 1]
    assert f"document {int(odd.argmin())}{odd.min():+.3f}" in page.replace("\n", "")


def test_what_was_counted_is_kept_and_a_long_count_is_announced(
    store: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(f"{address}/prose/compare/code")
    asked(f"{address}/code/class?q=digits")
    monkeypatch.setattr(analysis.results, "shards_to_read", lambda *_: pytest.fail("a second scan"))
    counted, contrast_of = threading.Event(), analysis.explorer.compare.contrast_of
    monkeypatch.setattr(
        analysis.explorer.compare, "contrast_of", lambda *a, **k: counted.wait() and contrast_of(*a, **k)
    )
    with serving(Explorer(str(store))) as other:
        assert "Experts by lift" in asked(f"{other}/code/class?q=digits")[2]
        monkeypatch.setattr(analysis.explorer.counting, "PATIENCE_S", 0.0)
        status, _, page = asked(f"{other}/prose/compare/code")
        assert (status, "Counting" in text_of(page), "data-reload" in page) == (200, True, True)
        counted.set()
        monkeypatch.setattr(analysis.explorer.counting, "PATIENCE_S", HUNG_S)
        assert "differs most" in asked(f"{other}/prose/compare/code")[2]


def test_of_equal_tokens_the_effect_is_shown(address: str, explorer: Explorer, captures: Captures) -> None:
    wanted = effect(captures["prose"], captures["prose-without"])
    page = text_of(asked(f"{address}/prose/compare/prose-without")[2])
    assert f"prose-without predicts a token {-float(wanted['effect']):.4f} nats worse than prose on average" in page
    assert "prose-without: mask 7:1." in page
    names = [("prose", "code"), ("prose", "prose-without"), ("prose-without", "prose")]
    said = [differs(*(explorer.shown[name].view for name in pair)) for pair in names]
    assert said == ["", "mask 7:1", "unchanged choices"]


def test_a_page_s_effect_is_the_difference_of_log_probabilities(address: str, captures: Captures) -> None:
    row, length = 3, int(captures["prose"]["length"].values[3])
    answer = json.loads(asked(f"{address}/prose/effect?row={row}&start=0&against=prose-without")[2])
    values = np.frombuffer(base64.b64decode(answer["effect"]), "<f4")
    one, other = (captures[name]["logprob"].values[row, : length - 1] for name in ("prose", "prose-without"))
    np.testing.assert_allclose(values, [np.nan, *(other - one)], atol=1e-6)
    assert (values[1:] < -0.4).any()
    for place, status, said in (
        ("prose/effect?row=0&start=0&against=code", 404, "no equal rows"),
        ("prose/effect?row=0&start=0&against=nobody", 404, "name another data set"),
        ("prose/effect?row=999&start=0&against=prose-without", 404, "no token in row 999"),
        ("prose/compare/prose", 400, "cannot be compared with itself"),
        ("prose/compare/nobody", 404, "no data set"),
        ("-/compare?one=prose", 404, "no data set"),
        ("code/class?q=nonsense", 404, "unknown token class"),
        ("code/class?q=/(/", 404, "/(/ is not a regular expression"),
        ("code/class?q=digits&layer=9&expert=0", 404, "name a layer of 0 to 7"),
    ):
        found, _, page = asked(f"{address}/{place}")
        assert (found, said in page) == (status, True), (place, page)


def test_a_class_s_page_says_what_the_metric_says(address: str, captures: Captures) -> None:
    wanted = class_experts(captures["code"], ["digits"]).isel(token_class=0)
    best = wanted.isel(wanted["lift"].where(wanted["counts"] >= 20).argmax(("layer", "expert")))
    page = text_of(asked(f"{address}/code/class?q=digits")[2]).replace(" ", "")
    interval = f"{float(best['lift_low']):.2f}to{float(best['lift_high']):.2f}" if best["lift_low"] > 0 else "–"
    first = f"{int(best['layer'])}:{int(best['expert'])}{float(best['lift']):.2f}{interval}{int(best['counts']):,}"
    assert first in page
    token, _, _, places = tokens_of(captures["code"])
    asked_for = asked(f"{address}/code/class?q=/^[05]$/&layer=6&expert=0")[2]
    there = {place for place, number in zip(places, token, strict=True) if number in (NAMED["0"], NAMED["5"])}
    shown = re.findall(r"row=(\d+)&amp;position=(\d+)", asked_for)
    assert shown
    assert {(int(row), int(position)) for row, position in shown} <= there
    assert "No token of this class occurs in code" in text_of(asked(f"{address}/code/class?q=han")[2])


# The tasks: each takes at most three actions from the first page


class Actions:
    """A page on which a user's actions are counted."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.number = page, 0
        go(page, f"{address}/")

    def do(self, action: str, *arguments: Any) -> None:
        """One action: a click, a typed text, a choice or a key."""
        getattr(self.page, action)(*arguments)
        self.number += 1


@pytest.mark.browser
def test_digits_in_code_are_found_in_three_actions(opened: Any, address: str, captures: Captures) -> None:
    person = Actions(opened[0], address)
    person.do("fill", "#find", "digits")
    person.do("press", "#find", "Enter")
    person.do("click", "a[href='/code/class?q=digits']")
    token, chosen, _, _ = tokens_of(captures["code"])
    digit = np.isin(token, [NAMED[digit] for digit in DIGITS])
    count = np.array([[(chosen[digit, at] == e).any(1).sum() for e in range(EXPERTS)] for at in range(8)])
    lift = (
        count / digit.sum() / np.array([[(chosen[:, a] == e).any(1).mean() for e in range(EXPERTS)] for a in range(8)])
    )
    best = np.unravel_index(np.where(count >= 20, lift, 0).argmax(), lift.shape)
    assert opened[0].locator("#experts ~ .scroll th a >> nth=0").inner_text() == f"{best[0]}:{best[1]}" == "6:0"
    assert f"{digit.sum():,} occurrences" in opened[0].inner_text("main")
    assert person.number <= 3


@pytest.mark.browser
def test_where_expert_7_1_weighs_most_in_prose_is_found_in_three_actions(
    opened: Any, address: str, captures: Captures
) -> None:
    person = Actions(opened[0], address)
    person.do("click", "main a[href='/prose']")
    person.do("click", "a[href='/prose/expert/7/1']")
    _, chosen, weight, places = tokens_of(captures["prose"])
    own = np.where(chosen[:, 7] == 1, weight[:, 7], 0).max(1)
    href = opened[0].locator(".contexts a >> nth=0").get_attribute("href")
    row, position = (int(number) for number in re.findall(r"=(\d+)", href)[:2])
    assert own[places.index((row, position))] == own.max()
    assert person.number <= 3


@pytest.mark.browser
def test_prose_against_code_is_answered_in_three_actions(opened: Any, address: str, captures: Captures) -> None:
    person = Actions(opened[0], address)
    person.do("select_option", "select[name=one]", "prose")
    person.do("select_option", "select[name=other]", "code")
    person.do("click", "text=Compare >> nth=-1")
    opened[0].wait_for_selector("#verdict")
    share = {name: reach(tokens_of(captures[name])[1]) for name in ("prose", "code")}
    layer, expert = np.unravel_index(abs(share["prose"] - share["code"]).argmax(), (8, EXPERTS))
    said = opened[0].inner_text("#verdict")
    assert f"layer {layer} differs most: it is chosen by {share['prose'][layer, expert]:.0%} of" in said
    assert person.number <= 3


@pytest.mark.browser
def test_what_is_expert_6_0_is_answered_in_three_actions(opened: Any, address: str, captures: Captures) -> None:
    person = Actions(opened[0], address)
    person.do("fill", "#find", "6:0")
    person.do("press", "#find", "Enter")
    person.do("click", "a[href='/prose/expert/6/0']")
    token, chosen, _, _ = tokens_of(captures["prose"])
    digit, here = token >= NAMED["0"], (chosen[:, 6] == 0).any(1)
    assert digit[here].mean() > 1.5 * digit.mean()
    assert (
        opened[0].inner_text("#verdict").startswith(f"Digits ({digit[here].mean() / digit.mean():.1f} × the average)")
    )
    assert person.number <= 3


@pytest.mark.browser
def test_a_text_is_coloured_by_the_effect_only_where_there_is_one(
    opened: Any, address: str, captures: Captures
) -> None:
    page, heard = opened
    go(page, f"{address}/prose/document/1?token=3")
    page.select_option("#by", "effect:prose-without")
    page.wait_for_selector("#token:has-text('effect of prose-without -')")
    assert "by=effect%3Aprose-without" in page.url
    row = int(np.flatnonzero(captures["prose"]["document_id"].values == 1)[0])
    one, other = (captures[name]["logprob"].values[row] for name in ("prose", "prose-without"))
    colours = page.evaluate("[...document.querySelectorAll('#text span')].map((s) => s.style.backgroundColor)")
    assert colours[0] == ""
    for at, colour in enumerate(colours[1:]):
        alpha = re.fullmatch(r"rgba?\(31, 95, 168(?:, ([\d.]+))?\)|rgba\(213, 94, 0, 0\)", colour)  # blue is worse
        assert alpha is not None, colour
        assert float(alpha[1] or 0) == pytest.approx(0.6 * min(1, float(one[at] - other[at]) / 2), abs=0.01)
    go(page, f"{address}/code/document/1")
    assert "effect" not in page.inner_text("#by-label")
    assert heard["console"] == []


DESK = {"viewport": {"width": 1400, "height": 900}}
DARK, LIGHT = {"color_scheme": "dark"}, {"color_scheme": "light"}
LOOKED_AT = (
    (DESK | LIGHT, "prose/compare/code"),
    (PHONE | DARK, "prose/compare/code"),
    (DESK | DARK, "prose/compare/prose-without"),
    (PHONE | LIGHT, "code/class?q=digits"),
)


@pytest.mark.browser
@pytest.mark.parametrize(("opened", "place"), LOOKED_AT, indirect=["opened"])
def test_these_pages_can_be_read_by_everybody(opened: Any, address: str, place: str) -> None:
    page, heard = opened
    go(page, f"{address}/{place}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = Axe().run(page)
    assert not found.response["violations"], found.generate_report()
    assert heard["console"] == []
