"""Unusual documents and specialists, compared with plain Python."""

from pathlib import Path

import numpy as np
import pytest
from fake_model import fake_capture, words

from analysis.explorer import unusual
from analysis.explorer.dataset import documents
from analysis.explorer.home import Home, specialists
from analysis.explorer.live import Explorer
from store import open_capture


@pytest.fixture(scope="module")
def explorer(tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    """Two data sets of one kind; documents span several parts."""
    path = tmp_path_factory.mktemp("unusual") / "s.zarr"
    for name, seed in (("one", 0), ("other", 50)):
        fake_capture(path, [words(60, seed + at) for at in range(8)] + ["", words(3, seed)], name=name)
    explorer = Explorer(str(path))
    for name in explorer.indexes:
        explorer.refresh(name)
    assert not explorer.problems
    return explorer


def test_documents_are_ordered_by_their_divergence_from_the_others(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unusual, "LEAST", 20)
    capture, view = open_capture(explorer.path, "one").load(), explorer.shown["one"].view
    expert, of_row, length = capture["expert"].values, capture["document_id"].values, capture["length"].values
    count = np.zeros((10, 3, 8), int)
    for row, document in enumerate(of_row):
        for position in range(length[row]):
            if capture["token"].values[row, position] not in capture.attrs["special_token_ids"]:
                for layer in range(3):
                    for e in expert[row, position, layer]:
                        count[document, layer, e] += 1
    found = unusual.unusual_documents(view)
    for document in range(10):
        if count[document].sum() < 3 * 20:
            assert np.isnan(found.bits[document])
            continue
        rest, bits, most = count.sum(0) - count[document], 0.0, (0.0, 0, 0)
        for layer in range(3):
            n = count[document, layer].sum()
            for e in range(8):
                own, other = count[document, layer, e] / n, (rest[layer, e] + 0.5) / (rest[layer].sum() + 4)
                here = own * np.log2(own / other) if own else 0.0
                bits, most = bits + here / 3, max(most, (here, layer, e))
            bits -= 7 / (2 * n * np.log(2)) / 3
        assert found.bits[document] == pytest.approx(bits)
        assert (found.layer[document], found.expert[document]) == most[1:]
        own = count[document, most[1]]
        assert found.share[document] == pytest.approx(own[most[2]] / own.sum())
    order = [row["id"] for row in documents(view, found, by="unusual")["rows"]]
    assert order == sorted(range(10), key=lambda at: (np.isnan(found.bits[at]), -found.bits[at], at))
    assert [row["id"] for row in documents(view, found, by="tokens")["rows"]][-1] == 8, "the empty one"
    assert [row["id"] for row in documents(view, containing="MENT 3")["rows"]] == [3]


def test_data_sets_of_one_kind_have_no_specialists(explorer: Explorer) -> None:
    one, other = (explorer.shown[name].profiles for name in ("one", "other"))
    assert specialists(one, [other]) == []
    page = Home(explorer).page()
    assert not [each for each in page["findings"] if each["kind"] == "specialist"]
    assert {name: len(each) for name, each in page["busiest"].items()} == {"one": 3, "other": 3}


def test_a_specialist_is_one_whose_interval_lies_above_those_of_the_others(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (explorer.shown[name].profiles for name in ("one", "other"))
    share = np.full((3, 8), 0.125)
    own, low, high = (share.copy() for _ in range(3))
    own[1, 2], low[1, 2], own[2, 5], low[2, 5] = 0.5, 0.4, 0.5, 0.1
    monkeypatch.setitem(one._bounds, 2, (own, low, high))
    monkeypatch.setitem(other._bounds, 2, (share, share, share + 0.01))
    found = specialists(one, [other])
    assert [(each["layer"], each["expert"], each["rest"]) for each in found] == [(1, 2, 0.125)]
    assert found[0]["told"] == pytest.approx(0.5 * 2)


def test_what_the_first_page_says_of_a_token_was_counted(explorer: Explorer, tmp_path: Path) -> None:
    for each in Home(explorer).page()["findings"]:
        if each["kind"] == "token":
            capture = open_capture(explorer.path, each["dataset"]).load()
            here = capture["token"].values == each["token"]
            went = (capture["expert"].values[here][:, each["layer"]] == each["expert"]).any(-1)
            assert (each["count"], each["share"]) == (here.sum(), went.mean())
            return
    pytest.fail("the fake model's tokens each have their experts, which is told")
