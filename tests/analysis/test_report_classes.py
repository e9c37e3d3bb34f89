"""The report's section on classes of tokens: its cells compared with the metric, and sentences that appear only where
they are true."""

import re

import numpy as np
import pytest
from synthetic import bursty, make_capture, state_of

from analysis import class_experts
from analysis.report import page
from analysis.report.answers import answer
from analysis.report.section import Answers
from analysis.report.sections import load, token_classes, tokens

PIECES = [f"{number}" if number % 4 == 0 else f"▁w{'abcdefghij'[number % 10]}" for number in range(40)]
SECTIONS = (load.SECTION, tokens.SECTION, token_classes.SECTION)


def answers_of(**options: object) -> Answers:
    """The answers about a synthetic capture for the section and those that it needs."""
    data = make_capture(documents=30, pieces=PIECES, **options)  # type: ignore[arg-type]
    return answer(data, state_of(data), "a", sections=SECTIONS)


def test_a_cell_is_the_expert_with_the_highest_lift_and_its_numbers() -> None:
    data = make_capture(documents=30, pieces=PIECES)
    drawn = page.report_of([answers_of()], SECTIONS)
    [figure] = [figure for figure in drawn.figures if figure.kind == "classes"]
    rows = figure.spec["datasets"]["cells"]
    classes = {"digits", "lowercase", "word-initial", "latin"}
    assert {row["class"] for row in rows} == classes
    whole = class_experts(data, sorted(classes))
    assert len(rows) == len(classes) * data.sizes["layer"]
    for row in rows:
        own = whole.sel(token_class=row["class"], layer=row["layer"])
        often = own["lift"].where(own["counts"] >= 20)
        assert row["expert"] == int(often.argmax("expert"))
        at = own.sel(expert=row["expert"])
        assert (row["counts"], row["tokens"]) == (int(at["counts"]), int(own["tokens"]))
        for name, part in {"lift": 1, "lift_low": 1, "lift_high": 1, "share": 100}.items():
            assert row[name] == pytest.approx(float(at[name]) * part, rel=1e-3)


@pytest.mark.parametrize("by", ["token", "document"])
def test_a_class_is_told_where_its_tokens_and_not_their_documents_choose(by: str) -> None:
    data = bursty(by, documents=40, burst=0.3, pieces=PIECES, vocabulary=40)
    if by == "token":  # digits have their own expert
        digits = np.isin(data["token"].values, np.arange(0, 40, 4)) & (data["expert"].values[:, :, 1, 0] < 255)
        routes = data["expert"].values[:, :, 1]
        routes[digits & ~(routes == 3).any(-1), 0] = 3
    found = answer(data, state_of(data), "a", sections=SECTIONS)
    said = [finding.said for finding in token_classes.findings([found])]
    if by == "document":
        assert said == []
    else:
        n = int((np.isin(data["token"].values, np.arange(0, 40, 4)) & (data["token"].values >= 0)).sum())
        assert re.search(rf"a: (.*; )?100% of {n:,} digits at layer 1 go to expert 3 \(\d+%\)", said[0])


def test_a_data_set_without_a_frequent_class_has_no_chart_and_says_nothing() -> None:
    data = make_capture(documents=2, vocabulary=3, special_token_ids=(), pieces=["²", "½", "\x01"])
    found = answer(data, state_of(data), "a", sections=SECTIONS)
    assert list(token_classes.draw([found], None)) == []
    assert list(token_classes.findings([found])) == []
