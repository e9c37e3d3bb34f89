"""The explorer's sentences: each appears only where it is true; and texts in lines."""

from typing import Any

import numpy as np
import pytest
import xarray as xr

from analysis.explorer.compared import verdict
from analysis.explorer.places import COLUMN, Word, in_lines, in_one_line, words_around
from analysis.explorer.similar import Similar
from analysis.explorer.summary import Kind, Set, apart, busiest, kinds_of, summary

CLASSES = ("digits", "words", "letters")


def kinds(p: tuple[float, ...], count: tuple[int, ...], tokens: tuple[int, ...]) -> list[Kind]:
    return kinds_of(CLASSES, np.array(p), np.array(count), np.array(tokens), (100, 1000))


def test_a_class_is_named_where_it_is_sure_and_frequent_at_the_expert_and_not_else() -> None:
    [first, second] = kinds((0.01, 0.05, 0.01), (30, 40, 10), (60, 100, 100))
    assert (first.name, second.name) == ("words", "digits"), "words tell more of the expert"
    assert (second.share, second.of_all, second.reach) == (0.3, 0.06, 0.5)
    assert second.lift == pytest.approx(5.0)
    assert kinds((0.051, 0.2, 1.0), (30, 40, 10), (60, 100, 100)) == [], "chance"
    assert kinds((0.0, 0.0, 0.0), (8, 14, 0), (60, 100, 0)) == [], "not 1.5 times as often as the average, or never"


def test_a_class_that_is_mostly_in_another_one_is_not_told_beside_it() -> None:
    members = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]], bool)
    found = kinds((0.0, 0.0, 0.0), (30, 40, 45), (60, 100, 150))
    assert [kind.name for kind in found] == ["words", "letters", "digits"]
    assert [kind.name for kind in apart(found, members, np.array([25, 5, 20, 20]))] == ["words", "digits"]
    assert [kind.name for kind in apart(found, members, np.array([25, 5, 20, 20]), most=1)] == ["words"]
    weak = [Kind(1, "words", 0.0, 0.9, 0.1, 1.0), Kind(0, "digits", 0.0, 0.1, 0.06, 1.0)]
    assert [kind.name for kind in apart(weak, members, np.array([25, 5, 20, 20]))] == ["words"], "tells too little"


def test_data_sets_are_the_strongest_only_where_their_intervals_lie_above_all_others() -> None:
    high, also, low = Set("a", 0.4, 0.35, 0.45), Set("b", 0.42, 0.36, 0.5), Set("c", 0.1, 0.05, 0.2)
    assert busiest([high, low]) == [high]
    assert busiest([low, high, also]) == [also, high]
    assert busiest([high, Set("c", 0.1, 0.05, 0.36)]) == []
    assert busiest([high, Set("c", 0.1, np.nan, np.nan)]) == [], "how high it is is not known"
    assert busiest([high]) == []


def test_an_expert_s_line_holds_what_is_known_of_it_and_no_more() -> None:
    own, other = Set("maths", 0.4, 0.35, 0.45), Set("prose", 0.1, 0.05, 0.2)
    digits, one = kinds((0.001, 1, 1), (30, 0, 0), (60, 1, 1))[0], Kind(7, "1", 0.01, 0.1, 0.02, 0.8)
    said = summary(own, 0.8, [digits], [one], [other])
    assert said["line"] == "Digits (5.0 × the average); strongest in maths"
    text = " ".join(said["evidence"])
    assert (
        "30% of the tokens that choose it in maths are digits, compared with 6% of all tokens there; 50% of them"
        in text
    )
    assert "“1” (5.0 ×, 80% of them choose it)" in text
    assert "40.0% of the choices of maths, compared with 10.0% of those of prose" in text
    assert summary(own, 0.8, [], [one], [])["line"] == "“1” (5.0 × the average)"
    assert summary(own, 0.8, [], [], [])["line"] == "80% of the tokens of maths"
    unused = {"line": "No token of maths chooses it", "evidence": []}
    assert summary(Set("maths", 0.0, np.nan, np.nan), 0.0, [], [], [other]) == unused
    nothing = summary(own, 0.2, [], [], [Set("prose", 0.4, 0.3, 0.5)])
    assert nothing["line"] == "Nothing distinguishes it in maths"
    assert "It is chosen by 20% of the tokens there" in nothing["evidence"][0]
    assert "strongest" not in str(nothing)


def contrast(low: float, high: float, **changes: Any) -> dict[str, Any]:
    row = {"layer": 7, "expert": 1, "share": 0.1, "other_share": 0.9, "difference": -0.8, "low": low, "high": high}
    told = [{"name": name, "right": 0.75, "documents": 8} for name in "ab"]
    return {"shows": "contrast", "untested": {}, "experts": [row], "level": 0.95, "beyond_chance": 3, "cells": 64,
            "told": told, "why": ""} | changes  # fmt: skip


def test_a_comparison_names_an_expert_only_beyond_chance() -> None:
    said = verdict(contrast(-0.9, -0.7), ("a", "b"))
    assert "Expert 1 of layer 7 differs most: it is chosen by 90% of the tokens of b and 10% of those of a" in said[0]
    assert "(70.0 to 90.0 percentage points more" in said[0]
    assert "3 of 64 experts differ by more than chance" in said[0]
    assert "75% of the 8 documents of a" in said[1]
    assert "differs most" not in str(verdict(contrast(-0.9, 0.1), ("a", "b")))
    untested = verdict(contrast(np.nan, np.nan, untested={"a": "one document"}, told=None, why="too few"), ("a", "b"))
    assert untested == [
        "Differences cannot be tested here. a: one document.",
        "How well documents can be classified is not known: too few.",
    ]


def test_predictions_are_called_worse_or_better_only_beyond_chance() -> None:
    def said(**effect: Any) -> str:
        known = {"effect": -0.3, "low": -0.4, "high": -0.2, "p": 0.01, "level": 0.95, "documents": 9, "known": True,
                 "untested": ""}  # fmt: skip
        found = {"shows": "agreement", "any_difference": 0.5, "tokens": 10, "effect": known | effect}
        return verdict(found, ("whole", "without"))[0]

    assert "without predicts a token 0.3000 nats worse than whole on average (0.2000 to 0.4000" in said()
    assert "0.3000 nats better than" in said(effect=0.3, low=0.2, high=0.4)
    for chance in ({"high": 0.1}, {"p": 0.2}):
        assert "neither better nor worse than whole beyond chance" in said(**chance)
    assert "not tested: few" in said(known=False, untested="few", low=np.nan, high=np.nan, p=np.nan)
    bare = {"shows": "agreement", "any_difference": 0.5, "tokens": 10, "effect": None}
    assert "both need --record logprob" in verdict(bare, ("whole", "without"))[0]


def test_in_lines_the_token_begins_in_one_column_and_nothing_else_is_lost() -> None:
    texts = ["if", " x", ":\n", "    ", "return", " y", "\n", "\n"]
    for at in range(len(texts)):
        shares = [0.5 if number == 4 else 0.0 for number in range(len(texts))]
        lines = in_lines(words_around(texts, at, shares))["lines"]
        drawn = ["".join(word.text for word in line) for line in lines]
        [line] = [number for number, line in enumerate(lines) if any(word.focus for word in line)]
        before = [word.text for word in lines[line]][: [word.focus for word in lines[line]].index(True)]
        assert len("".join(before)) == COLUMN
        first, second = (len(text) - len(text.lstrip()) for text in drawn if text.strip("↵ "))
        assert second - first == 4, "the code's own indents"
        assert "".join(drawn).replace("↵", "").split() == "".join(texts).split()
    long = in_lines(words_around(["x" * 50, "focus"], 1))["lines"][0]
    assert [word.text for word in long] == ["x" * COLUMN, "focus"], "what is further left is cut off"


def test_in_one_line_a_line_feed_is_a_sign_and_plain_neighbours_are_one_word() -> None:
    words = words_around(["a", "\n", "b", "c"], 2, [0.0, 0.0, 1.0, 0.25])
    assert words == [Word("a\n"), Word("b", 1.0, True), Word("c", 0.25)]
    line = in_one_line(words)
    assert (line["before"], line["focus"].text, line["lines"]) == ([Word("a↵")], "b", None)


def test_similar_experts_are_those_whose_choices_correlate() -> None:
    random = np.random.default_rng(0)
    expert = np.stack([np.argsort(random.random((300, 6)), -1)[:, :2] for _ in range(3)], 1)
    expert[:150, 2] = expert[:150, 0]  # (token, layer, k)
    routes = xr.Dataset({"expert": (("token", "layer", "k"), expert)}, {"layer": [3, 5, 9]}, {"experts": 6})
    chose = [(expert[:, at, :, None] == np.arange(6)).any(1) for at in range(3)]
    for at, own in ((0, 2), (2, 4)):
        wanted = {
            (layer, other): np.corrcoef(chose[at][:, own], chose[number][:, other])[0, 1]
            for number, layer in enumerate((3, 5, 9))
            for other in range(6)
            if number != at
        }
        found = Similar(routes).of(at, own, top=4)
        best = sorted((value for value in wanted.values() if value > 0), reverse=True)[:4]
        assert [row["correlation"] for row in found] == pytest.approx(best)
        assert all(wanted[row["layer"], row["expert"]] == pytest.approx(row["correlation"]) for row in found)
    assert found[0]["layer"] == 3
    assert Similar(routes.isel(token=slice(0))).of(0, 0) == []
