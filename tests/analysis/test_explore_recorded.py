"""Surprise, entropy and the whole distribution in the explorer: the sent data, the colors, and the details of a
token."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from axe_playwright_python.sync_playwright import Axe
from fake_model import fake_capture, fake_layout, words
from recording_model import recorded_capture
from scipy.special import softmax
from scipy.stats import entropy
from test_explore import asked, data_of, serving
from test_explore_browser import PHONE, go, opened
from test_report_browser import browser

from analysis.explorer.live import Explorer
from analysis.explorer.one_file import export_page
from store import CaptureGroup, open_capture

__all__ = ["browser", "opened"]
LAYERS = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture with all logits, one with the largest four, and one without any, which lacks a shard."""
    path = tmp_path_factory.mktemp("recorded") / "s.zarr"
    texts = [words(60, number) for number in range(4)]
    recorded_capture(path, "all", texts, sequence_length=16)
    recorded_capture(path, "top", texts, top=4, sequence_length=16)
    recorded_capture(path, "some", texts, sequence_length=16)
    CaptureGroup(path, "some").discard(1)
    fake_capture(path, texts, "none", layout=fake_layout(sequence_length=16))
    return path


@pytest.fixture(scope="module")
def explorer(store: Path) -> Explorer:
    explorer = Explorer(str(store))
    for name in explorer.indexes:
        explorer.refresh(name)
    assert not explorer.problems
    return explorer


@pytest.fixture(scope="module")
def address(explorer: Explorer) -> Iterator[str]:
    with serving(explorer) as address:
        yield address


def floats(own: dict[str, Any], name: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(own[name]), "<f4")


def row_of(data: xr.Dataset, document: int, page: int = 1) -> int:
    rows = np.flatnonzero(data["document_id"].values == document)
    return int(rows[np.argsort(data["offset"].values[rows])][page - 1])


def test_a_page_holds_surprise_and_entropy_and_none_where_they_were_not_recorded(address: str, store: Path) -> None:
    for name in ("all", "top"):
        data = open_capture(store, name).load()
        row = row_of(data, 2, 2)
        length = int(data["length"].values[row])
        [own] = data_of(asked(f"{address}/{name}/document/2?page=2")[2])["documents"]
        np.testing.assert_array_equal(floats(own, "surprise"), -data["logprob"].values[row, :length])
        wanted = entropy(softmax(data["logit"].values[row, :length].astype(float), -1), base=2, axis=-1)
        np.testing.assert_allclose(floats(own, "entropy").reshape(length, LAYERS), wanted, rtol=1e-6)
    shown = data_of(asked(f"{address}/none/document/2")[2])
    assert (shown["documents"][0]["surprise"], shown["documents"][0]["entropy"]) == (None, None)
    assert shown["distributions"] is False


def test_what_is_not_captured_has_no_numbers(address: str, store: Path) -> None:
    data = open_capture(store, "some", allow_incomplete=True)
    row = int(np.flatnonzero(~data["captured"].values)[0])
    [own] = data_of(asked(f"{address}/some/place?row={row}&position=0")[2])["documents"]
    assert np.isnan(floats(own, "surprise")).all()
    assert np.isnan(floats(own, "entropy")).all()
    status, _, answer = asked(f"{address}/some/distribution?row={row}&position=0")
    assert (status, "is not captured yet" in json.loads(answer)["error"]) == (404, True)


def test_a_token_s_distribution_is_the_softmax_of_its_logits(address: str, store: Path) -> None:
    for name, recorded in (("all", 8), ("top", 4)):
        data = open_capture(store, name).load()
        found = json.loads(asked(f"{address}/{name}/distribution?row=3&position=5")[2])
        at = data.isel(doc=3, position=5)
        assert "error" not in found, found
        np.testing.assert_allclose(found["probability"], softmax(at["logit"].values.astype(float), -1), atol=1e-6)
        assert found["chosen"] == at["expert"].values.tolist()
        ids = at["logit_expert"].values.tolist() if recorded == 4 else [list(range(8))] * LAYERS
        assert (found["experts"], found["of"]) == (ids, 8)
    for place, said in (("all/distribution?row=999&position=0", "no token in row 999"),
                        ("none/distribution?row=0&position=0", "logits were not recorded")):  # fmt: skip
        status, _, answer = asked(f"{address}/{place}")
        assert (status, said in json.loads(answer)["error"]) == (404, True)


@pytest.mark.browser
def test_a_text_is_coloured_by_what_is_chosen_and_a_link_shows_the_same(opened: Any, address: str) -> None:
    page, heard = opened
    go(page, f"{address}/all/document/1?layer=1")
    assert page.locator("#by option").all_inner_texts() == [
        *("expert", "surprise of the next token", "router entropy"),
        *("effect of some", "effect of top"),  # the same tokens
    ]
    [own] = page.evaluate("JSON.parse(document.getElementById('data').textContent)")["documents"]
    words_known = page.evaluate("JSON.parse(document.getElementById('data').textContent).words")
    for by, most, values in (
        ("surprise", np.log(words_known), floats(own, "surprise")),
        ("entropy", 3.0, floats(own, "entropy").reshape(-1, LAYERS)[:, 1]),
    ):
        page.select_option("#by", by)
        assert f"by={by}" in page.url
        colours = page.evaluate("[...document.querySelectorAll('#text span')].map((s) => s.style.backgroundColor)")
        for colour, value in zip(colours, values, strict=True):
            if np.isnan(value):
                assert colour == ""
                continue
            alpha = re.match(r"rgba?\(213, 94, 0(?:, ([\d.]+))?\)", colour)[1]  # type: ignore[index]
            assert float(alpha) == pytest.approx(0.6 * min(1, value / most), abs=0.01)
        assert f"{most:.1f}" in page.inner_text("#legend")
    page.reload()
    page.wait_for_selector("body[data-drawn]")
    assert page.input_value("#by") == "entropy"
    go(page, f"{address}/none/document/1?by=entropy")
    assert not page.is_visible("#by")
    assert page.locator("#legend button").count() > 0
    assert heard["console"] == []


@pytest.mark.browser
@pytest.mark.parametrize("opened", [{}, PHONE, {"color_scheme": "dark"}], indirect=True, ids=["desk", "phone", "dark"])
def test_a_chosen_token_shows_its_whole_distribution_to_everybody(opened: Any, address: str, store: Path) -> None:
    page, heard = opened
    data = open_capture(store, "all").load()
    row = row_of(data, 1)
    go(page, f"{address}/all/document/1?layer=2&token=4&by=surprise")
    page.wait_for_selector("#distribution table")
    at = data.isel(doc=row, position=4, layer=2)
    shares = softmax(at["logit"].values.astype(float))
    cells = page.locator("#distribution td:last-child").all_inner_texts()
    np.testing.assert_allclose([float(cell) for cell in cells], shares, atol=6e-4)
    chosen = page.locator("#distribution .chosen th").all_inner_texts()
    assert {int(text.split()[0]) for text in chosen} == set(at["expert"].values.tolist())
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = Axe().run(page)
    assert not found.response["violations"], found.generate_report()
    go(page, f"{address}/top/document/1?layer=2&token=4")
    page.wait_for_selector("#distribution table")
    assert "the 4 largest of 8 logits" in page.inner_text("#distribution caption")
    assert page.locator("#distribution tr").count() == 4
    assert heard["console"] == []


@pytest.mark.browser
def test_an_exported_file_is_coloured_and_asks_for_nothing(opened: Any, explorer: Explorer, tmp_path: Path) -> None:
    page, heard = opened
    (tmp_path / "one.html").write_text(export_page(explorer.shown["all"].view, [1]), encoding="utf-8")
    go(page, f"{(tmp_path / 'one.html').as_uri()}?by=entropy&token=3")
    assert page.input_value("#by") == "entropy"
    assert "router entropy" in page.inner_text("#token")
    assert page.locator("#distribution table").count() == 0
    assert [url for url in heard["requests"] if not url.startswith(("file:", "data:"))] == []
    assert heard["console"] == []
