"""`jobs/compare.py` of data sets with other tokens: the contrast, against counts from the store's arrays."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ran
from fake_model import fake_capture, words
from recording_model import recorded_capture

from jobs import compare
from store import open_capture


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of ten documents with few words in different numbers. Tests must not change it."""
    path, random = tmp_path_factory.mktemp("compare") / "s.zarr", np.random.default_rng(3)
    for name, often in (("a", [8, 1, 1, 1]), ("b", [1, 1, 1, 8])):
        drawn = random.choice(4, (10, 30), p=np.array(often) / sum(often))
        fake_capture(path, [" ".join(f"w{word}" for word in text) for text in drawn], name)
    fake_capture(path, ["w0 w1 w2 w3"], "short")
    return path


def shares(path: Path, name: str) -> tuple[np.ndarray, Counter[tuple[int, int, int]], Counter[int], int]:
    """Shares (layer, expert) of tokens, how often a token reaches an expert, how often it occurs, and the number of all
    tokens."""
    capture = open_capture(path, name).load()
    there = (capture["token"] >= 0).values & ~np.isin(capture["token"], capture.attrs["special_token_ids"])
    reached, seen = Counter[tuple[int, int, int]](), Counter[int]()
    for token, routes in zip(capture["token"].values[there].tolist(), capture["expert"].values[there], strict=True):
        seen[token] += 1
        reached.update((layer, int(e), token) for layer, chosen in enumerate(routes) for e in chosen)
    found = np.zeros((capture.sizes["layer"], capture.attrs["num_experts"]))
    for (layer, expert, _), number in reached.items():
        found[layer, expert] += number / seen.total()
    return found, reached, seen, seen.total()


def test_other_tokens_have_a_contrast_with_experts_and_their_tokens(store: Path, command: Callable[..., Ran]) -> None:
    both = (store / "a", store / "b")
    found: dict[str, Any] = json.loads(command(*both, "--json", "--top", 5, main=compare.main).out)
    (one, reached, _, n), (other, there, _, m) = (shares(store, name) for name in ("a", "b"))
    assert (found["shows"], found["one"], found["n"]) == ("contrast", str(both[0]), {str(both[0]): n, str(both[1]): m})
    assert found["why"].startswith("the captures hold different texts")
    largest = np.sort(abs(one - other).ravel())[::-1][:5]
    assert [abs(row["difference"]) for row in found["experts"]] == pytest.approx(largest.tolist())
    layers = [row["layer"] for row in found["layers"]]
    assert len(layers) == len(one)
    assert found["cells"] == one.size
    for row in found["experts"]:
        layer, expert = layers.index(row["layer"]), row["expert"]
        assert (row["share"], row["other_share"]) == pytest.approx((one[layer, expert], other[layer, expert]))
        assert row["low"] < row["difference"] < row["high"]
        assert row["usage"] + row["routing"] == pytest.approx(row["difference"])
        for token in row["tokens"]:
            cell = (layer, expert, token["token_id"])
            assert token["contribution"] == pytest.approx(reached[cell] / n - there[cell] / m)
        assert sum(token["contribution"] for token in row["tokens"]) == pytest.approx(row["difference"])
    assert 0 < found["beyond_chance"] < found["cells"]
    assert found["experts"][0]["p"] < 0.05, "one word is eight times as frequent"


def test_the_contrast_is_drawn_and_says_what_it_is(store: Path, command: Callable[..., Ran]) -> None:
    told = command(store / "a", store / "b", "--top", 2, main=compare.main).out
    assert told.startswith(f"contrast of {store / 'a'} and {store / 'b'}: the captures hold different texts")
    assert "main tokens" in told
    assert "experts differ by more than chance; 95% intervals and p-values are simultaneous for all of them" in told
    few = command(store / "a", store / "short", main=compare.main)
    assert few.status == 0, few.err
    assert "the captures hold different rows: one has" in few.out.splitlines()[0]
    assert f"no intervals and no p-values: {store / 'short'}: it is one document" in few.out
    assert "nan" not in few.out
    refused = command(store / "a", store / "b", "--top", 0, main=compare.main)
    assert (refused.status, "--top is 0, but must be at least 1" in refused.err) == (2, True)


def test_two_stores_have_an_effect_on_each_of_their_data_sets(tmp_path: Path, command: Callable[..., Ran]) -> None:
    texts = {name: [words(12, 100 * at + n) for n in range(12)] for at, name in enumerate(["a", "b"])}
    for store, by in (("whole", 0.0), ("masked", 0.25)):
        for name, own in texts.items():
            recorded_capture(tmp_path / f"{store}.zarr", name, own, worse=by * (name == "b"))
    places = tmp_path / "whole.zarr", tmp_path / "masked.zarr"
    found = json.loads(command(*places, "--json", main=compare.main).out)
    assert (found["shows"], found["left_out"]) == ("effects", [])
    assert [row["data_set"] for row in found["data_sets"]] == ["a", "b"]
    for row in found["data_sets"]:
        one, other = (open_capture(place, row["data_set"]).load() for place in places)
        difference = (other["logprob"] - one["logprob"]).values[:, :-1]
        known = np.isfinite(difference) & ~np.isin(one["token"].values[:, 1:], one.attrs["special_token_ids"])
        assert (row["tokens"], row["effect"]) == (known.sum(), pytest.approx(difference[known].mean(), abs=1e-6))
        [digits] = [each for each in row["classes"] if each["class"] == "digits"]
        assert (digits["tokens"], digits["effect"]) == (row["tokens"], row["effect"]), "all pieces are numbers"
    a, b = found["data_sets"]
    assert b["difference"] == pytest.approx(b["effect"] - a["effect"])
    assert (a["effect"], a["p"], b["p"] < 0.05, b["difference_p"] < 0.05) == (0, 1, True, True)
    (places[1] / "b").rename(places[1] / "c")
    told = command(*places, main=compare.main).out
    assert told.startswith(f"effect of {places[0]} and {places[1]}, by data set; only in one of them: b, c")
    (places[1] / "a").rename(places[1] / "d")
    apart = command(*places, main=compare.main)
    assert (apart.status, f"{places[1]} has c, d: they have no data set in common" in apart.err) == (2, True)
