"""The report's effect of changed choices: which captures are compared, and the charts and sentences about them."""

import numpy as np
import pytest
import xarray as xr
from synthetic import make_capture, state_of

from analysis import SampledPredictions, effect, scan
from analysis.charts.effects import COLUMNS, Read, passage_chart
from analysis.metrics.predictions import common_rows
from analysis.report import page
from analysis.report.answers import answer
from analysis.report.section import Answers
from analysis.report.sections import effect as section
from analysis.report.sections import load

WORDS = [f"▁w{'abcdefghij'[number % 10]}" if number % 4 else f"{number}" for number in range(40)]
SECTIONS = (load.SECTION, section.SECTION)


def captured(seed: int = 0, by: float = 0.0, documents: int = 24, **options: object) -> xr.Dataset:
    """A capture whose digits are predicted worse by a number of nats, and other tokens as well as without, on
    average."""
    data = make_capture(documents=documents, pieces=WORDS, record=("logprob",), seed=seed, chunked=False, **options)  # type: ignore[arg-type]
    follows = np.roll(data["token"].values, -1, axis=1) % 4 == 0
    noise = np.random.default_rng(7).normal(0, 0.2, follows.shape) if by else 0.0
    return data.assign(logprob=(data["logprob"] + np.where(follows, -by, noise)).astype(np.float32)).chunk({"doc": 4})


def answers_of(**data: xr.Dataset) -> list[Answers]:
    """The answers about some captures of one model, one of which may have a mask."""
    return [
        answer(each.assign_attrs(model="m"), state_of(each), name, sections=SECTIONS) for name, each in data.items()
    ]


def test_an_effect_on_all_rows_that_were_sampled_is_that_of_the_captures() -> None:
    one, other = captured(), captured(by=0.5)
    samples = [scan(each.chunk({"doc": 3}), [SampledPredictions()])[0] for each in (one, other)]
    both = common_rows(*samples)
    assert both is not None
    assert samples[0].attrs["n"] == samples[0].attrs["of"]
    sampled, whole = effect(*both, replicates=99), effect(one, other, replicates=99)
    assert sampled.attrs["n"] == whole.attrs["n"]
    for name in ("effect", "of_class", "class_tokens", "of_token", "tokens", "of_place"):
        np.testing.assert_array_equal(sampled[name], whole[name])
    for name in ("low", "high", "p", "class_low", "class_p"):  # documents are units in the same order
        np.testing.assert_allclose(sampled[name], whole[name], rtol=1e-6)


def test_a_sample_is_of_whole_documents_and_the_same_in_both_captures() -> None:
    one, other = (scan(each, [SampledPredictions(150)])[0] for each in (captured(), captured(by=0.5)))
    assert 150 <= one.attrs["n"] < one.attrs["of"]
    assert 150 <= one.attrs["n"] < 150 + one.sizes["position"]
    np.testing.assert_array_equal(one["document_id"], other["document_id"])
    whole = captured()
    rows = {int(d): int((whole["document_id"] == d).sum()) for d in np.unique(one["document_id"])}
    short = [d for d, n in rows.items() if int((one["document_id"] == d).sum()) < n]
    assert len(short) <= 1
    smaller = scan(captured(missing=(0, 2)), [SampledPredictions()])[0]
    both = common_rows(scan(captured(by=0.5), [SampledPredictions()])[0], smaller)
    assert both is not None
    assert both[0].sizes["doc"] == smaller.sizes["doc"] < whole.sizes["doc"]
    assert common_rows(one, scan(captured(seed=1), [SampledPredictions()])[0]) is None
    with pytest.raises(ValueError, match="size=0: must be at least 1"):
        SampledPredictions(0)


def test_a_masked_capture_is_shown_beside_the_one_of_the_same_text_without() -> None:
    answers = answers_of(
        other=captured(seed=1),
        plain=captured(),
        masked=captured(by=0.5).assign_attrs(mask=["1:3"]),
        alone=captured(seed=2, by=0.5).assign_attrs(mask=["1:3"]),
        coarse=captured(by=0.1).assign_attrs(quantization="nf4", mask=["1:3"]),
    )
    assert [(pair.one.label, pair.other.label) for pair in section.pairs_in(answers)] == [("plain", "masked")]
    assert [pair.page for pair in section.pairs_in(answers)] == ["compare/synthetic"], "the data set, not its label"
    drawn = page.report_of(answers, SECTIONS)
    whole = effect(captured(), captured(by=0.5))
    classes, losing, *passages = [figure for figure in drawn.figures if figure.kind == "effect"]
    assert classes.spec["title"]["subtitle"][0] == "mask 1:3"
    rows = {row["class"]: row for row in classes.spec["datasets"]["points"]}
    assert rows["all tokens"]["effect"] == pytest.approx(float(whole["effect"]), rel=1e-3)
    assert rows["digits"]["effect"] == pytest.approx(-0.5, abs=1e-4)
    assert rows["digits"]["tokens"] == int(whole["class_tokens"].sel(token_class="digits"))
    assert rows["digits"]["p"] == pytest.approx(float(whole["class_p"].sel(token_class="digits")), rel=1e-3)
    listed = losing.spec["datasets"]["points"]
    assert listed[0]["lost"] == min(row["lost"] for row in listed) < 0
    assert len(passages) == section.PASSAGES
    cells = passages[0].spec["datasets"]["cells"]
    assert min(cell["effect"] for cell in cells if cell["effect"] is not None) == pytest.approx(
        float(whole["of_place"][0]), rel=1e-3
    )
    row, start = int(whole["row"][0]), max(0, int(whole["position"][0]) - section.BEFORE)
    tokens = captured()["token"].values[row][start:][: len(cells)]
    assert "".join(cell["text"] for cell in cells) == "".join(WORDS[token].replace("▁", " ") for token in tokens)
    [finding] = [each for section in drawn.sections for each in section.findings]
    assert finding.said.startswith(
        f"masked (mask 1:3) predicts worse than plain, by {-float(whole['effect']):.4f} nats"
    )


def test_nothing_is_said_of_a_change_that_changes_nothing_beyond_chance() -> None:
    noise = captured(by=1e-9).assign_attrs(mask=["1:3"])
    answers = answers_of(plain=captured(), masked=noise)
    assert len(list(section.pairs_in(answers))) == 1
    assert list(section.findings(answers)) == []
    few = [captured(by=by, documents=4) for by in (0.0, 0.5)]
    unsure = answers_of(plain=few[0], masked=few[1].assign_attrs(mask=["1:3"]))
    assert list(section.findings(unsure)) == []
    [first, *_] = section.draw(unsure, None)
    assert "none: " in first.about
    assert list(section.draw(answers_of(plain=captured()), None)) == []


def test_two_pairs_stand_beside_each_other() -> None:
    pair = {"plain": captured(), "masked": captured(by=0.5).assign_attrs(mask=["1:3"])}
    answers = answers_of(**pair, forced=captured(by=0.2).assign_attrs(force=["0:1"]))
    first = next(iter(section.draw(answers, None)))
    rows = first.spec["datasets"]["points"]
    assert [row["data_set"] for row in rows] == ["masked: mask 1:3", "forced: force 0:1"]
    assert rows[0]["effect"] < rows[1]["effect"] < 0


def test_a_passage_is_cut_into_lines_and_loses_no_token() -> None:
    texts = ["one", " two", "\n", "\n", " three", "x" * 60, *[" word"] * 30]
    rows = passage_chart([Read(text=text, effect=-0.1) for text in texts], spread=1.0, title="t").rows["cells"]
    assert [row["at"] for row in rows] == list(range(len(texts)))
    assert [row["line"] for row in rows[:5]] == [0, 0, 0, 1, 2]
    assert max(row["to"] for row in rows) <= COLUMNS
    assert rows[1]["begin"] == rows[1]["from"] + 1
    assert {row["ink"] for row in rows} == {"pale"}
