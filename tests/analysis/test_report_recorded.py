"""The report's charts and sentences about logits, norms and log-probabilities, and sentences that must not appear."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import xarray as xr
from synthetic import RECORD, make_capture, state_of
from test_logprob import planted

from analysis import logprob_by_expert, router_distribution, saliency, surprise, surprise_and_entropy
from analysis.report.answers import answer
from analysis.report.page import report_of
from analysis.report.section import Answers, Finding, Section
from analysis.report.sections import distribution
from analysis.report.sections import saliency as saliency_section
from analysis.report.sections import surprise as surprise_section
from analysis.report.sections.all import SECTIONS
from analysis.report.sections.distribution import less_sure
from analysis.report.sections.saliency import contributes_more, stands_out
from analysis.report.sections.surprise import matters

RECORDED = (distribution.SECTION, saliency_section.SECTION, surprise_section.SECTION)
LOAD = tuple(section for section in SECTIONS if section.id == "load")  # whose counts say how much is captured


def answered(sections: Sequence[Section] = RECORDED, **captures: xr.Dataset) -> list[Answers]:
    """Answers about captures of one model."""
    made = {label: data.assign_attrs(model="m", quantization="nf4") for label, data in captures.items()}
    return [answer(data, state_of(data), label, sections=(*LOAD, *sections)) for label, data in made.items()]


def drawn(answers: list[Answers]) -> dict[str, Any]:
    """Rows of each figure's first table, by the figure's name."""
    sections = report_of_sections(answers)
    return {figure.name: next(iter(figure.spec["datasets"].values())) for each in sections for figure in each.figures}


def report_of_sections(answers: list[Answers]) -> Sequence[Any]:
    return report_of(answers, RECORDED).sections


@pytest.mark.parametrize(
    ("record", "wanted"),
    [((), []), (("logit",), ["distribution"]), (("output_norm",), ["saliency"]), (("logprob",), ["surprise"]),
     (RECORD, ["distribution", "saliency", "surprise"])],
)  # fmt: skip
def test_a_section_is_there_when_its_array_is(record: Sequence[str], wanted: list[str]) -> None:
    answers = answered(a=make_capture(documents=20, record=record), b=make_capture(seed=2, documents=20))
    assert [section.id for section in report_of_sections(answers)] == wanted


def test_without_the_arrays_nothing_more_is_asked() -> None:
    [with_none] = answered(a=make_capture())
    assert set(with_none.found) == {"load", "counts"}


def test_of_a_router_that_is_not_known_the_distribution_is_left_out_and_the_rest_is_drawn() -> None:
    [found] = answered(a=make_capture(record=RECORD, scores="unknown"))
    assert [section.id for section in report_of_sections([found])] == ["saliency", "surprise"]
    assert found.get("surprise_entropy") is None


def test_charts_hold_what_the_metrics_say() -> None:
    captures = {
        name: make_capture(seed=seed, documents=30, vocabulary=9, record=RECORD) for name, seed in (("a", 1), ("b", 2))
    }
    charts = drawn(answered(**captures))
    routers, surprises = ({n: ask(c) for n, c in captures.items()} for ask in (router_distribution, surprise))
    both = {n: surprise_and_entropy(c) for n, c in captures.items()}
    for chart, found, variable, over in (
        ("router-effective-experts", routers, "mean_effective_experts", "layer"),
        ("router-mass", routers, "mean_mass", "layer"),
        ("router-margin", routers, "mean_margin", "layer"),
        ("surprise", surprises, "mean_surprise", "start"),
        ("surprise-entropy-correlation", both, "correlation", "layer"),
        ("surprise-entropy-within", both, "within", "layer"),
    ):
        assert {row["data_set"] for row in charts[chart]} == {"a", "b"}
        for row in charts[chart]:
            of = found[row["data_set"]].sel({over: row[over]})
            assert row["value"] == pytest.approx(float(of[variable]), rel=1e-3, abs=1e-9)
            if variable != "mean_mass":
                assert row["low"] == pytest.approx(float(of[f"{variable}_low"]), rel=1e-3, abs=1e-9)
    for name, capture in captures.items():
        mean, within = saliency(capture), logprob_by_expert(capture)
        for row in charts[f"saliency-{name}"]:
            of = mean.sel(layer=row["layer"], expert=row["expert"])
            layer = mean.sel(layer=row["layer"])
            usual = float(layer["total_saliency"].sum() / layer["tokens"].sum())
            assert row["saliency"] == pytest.approx(float(of["mean_saliency"]), rel=1e-3)
            assert row["times"] == pytest.approx(float(of["mean_saliency"]) / usual, rel=1e-3)
            assert row["tokens"] == int(of["tokens"])
        for row in charts[f"logprob-{name}"]:
            of = within.sel(layer=row["layer"], expert=row["expert"])
            for key, variable in (("within", "within"), ("p", "within_p"), ("difference", "difference")):
                wanted = float(of[variable])
                assert row[key] is None if np.isnan(wanted) else row[key] == pytest.approx(wanted, rel=1e-3)


def test_of_the_largest_logits_bounds_are_drawn_and_named_so() -> None:
    capture = make_capture(documents=20, record=("logit", "logit_expert"), top_logits=4)
    charts = drawn(answered(a=capture))
    assert list(charts) == [
        "router-effective-experts-at-least", "router-effective-experts-at-most", "router-mass-at-least",
        "router-mass-at-most", "router-margin",
    ]  # fmt: skip
    for low, high in zip(charts["router-mass-at-least"], charts["router-mass-at-most"], strict=True):
        assert low["value"] < high["value"]


def words_of(finding: Finding | None) -> str:
    """The sentence of a finding, which must exist."""
    assert finding is not None
    return finding.said


def halves(capture: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """The documents that have a row, in two data sets."""
    documents, number = np.unique(capture["document_id"].values, return_inverse=True)
    parts = []
    for own in (0, 1):
        rows, kept = number % 2 == own, documents[own::2]
        part = capture.isel(doc=rows, document=kept)
        parts.append(part.assign(document_id=("doc", number[rows] // 2)))
    return parts[0], parts[1]


# --- Sentences: that they appear where they are true, and not where they may be chance -------------------------------


def flatter(capture: xr.Dataset, layer: int, by: float) -> xr.Dataset:
    """The logits of a layer made smaller, so that the router is less certain; the choices stay the same."""
    logit = capture["logit"].values.copy()
    logit[:, :, layer] *= by
    return capture.assign(logit=(capture["logit"].dims, logit))


def test_routers_that_are_less_sure_on_a_data_set_are_told_and_those_that_are_not_are_not() -> None:
    shape: dict[str, Any] = {"documents": 40, "record": ("logit",), "chunked": False}
    one, other = make_capture(seed=1, **shape), make_capture(seed=1, **shape)
    unsure = words_of(less_sure(answered(RECORDED[:1], one=one, two=flatter(other, 1, 0.3))))
    assert unsure.startswith("Routers are less certain on two than on one at 1 of 3 layers, most clearly at layer 1")
    entropy = [float(router_distribution(each)["mean_entropy"][1]) for each in (one, flatter(other, 1, 0.3))]
    assert f"by {entropy[1] - entropy[0]:.2f} bits" in unsure
    assert less_sure(answered(RECORDED[:1], **dict(zip(("one", "two"), halves(one), strict=True)))) is None
    few = {"one": make_capture(seed=1, **{**shape, "documents": 5}), "two": flatter(other, 1, 0.3)}
    assert less_sure(answered(RECORDED[:1], **few)) is None
    assert less_sure(answered(RECORDED[:1], one=one)) is None
    assert less_sure(answered(RECORDED[:1], one=make_capture(documents=20))) is None


def with_norms(capture: xr.Dataset, *, at: int | None = None, largest: float = 1.0, times: float = 1.0) -> xr.Dataset:
    """Norms of about 1; expert 3 of a layer has `largest`, and all norms of that layer are scaled."""
    norm = np.where(
        capture["output_norm"].isnull(),
        np.nan,
        1 + 0.1 * np.sin(np.arange(capture["expert"].size)).reshape(capture["expert"].shape),
    )
    if at is not None:
        norm[:, :, at] *= np.where(capture["expert"].values[:, :, at] == 3, times, 1)
        row, position, k = np.argwhere(capture["expert"].values[:, :, at] == 3)[0]
        norm[row, position, at, k] = max(largest, norm[row, position, at, k])
    return capture.assign(output_norm=(capture["expert"].dims, norm.astype(np.float32)))


def test_an_expert_of_huge_outputs_is_told_and_a_usual_largest_one_is_not() -> None:
    capture = make_capture(documents=20, record=("output_norm",), special_token_ids=(), chunked=False)
    assert stands_out(answered(RECORDED[1:2], a=with_norms(capture))) is None
    assert stands_out(answered(RECORDED[1:2], a=with_norms(capture, at=1, largest=9))) is None
    said = words_of(stands_out(answered(RECORDED[1:2], a=with_norms(capture, at=1, largest=200))))
    assert said.startswith("In a, the largest output of expert 3 at layer 1 has a norm of 200, 18")
    assert stands_out(answered(RECORDED[1:2], a=make_capture(seed=3, documents=20, record=("output_norm",)))) is None


def test_an_expert_that_adds_more_on_a_data_set_is_told_and_halves_of_one_are_not_told_apart() -> None:
    capture = make_capture(documents=60, record=("output_norm",), chunked=False)
    one, other = halves(capture)
    assert contributes_more(answered(RECORDED[1:2], one=with_norms(one), two=with_norms(other))) is None
    said = words_of(
        contributes_more(answered(RECORDED[1:2], one=with_norms(one), two=with_norms(other, at=2, times=2.0)))
    )
    assert said.startswith("Expert 3 of layer 2 contributes more on two than on one: ")
    own, usual = (
        float(saliency(each)["mean_saliency"].sel(layer=2, expert=3))
        for each in (with_norms(other, at=2, times=2.0), with_norms(one))
    )
    assert f"{own:.3g} compared with {usual:.3g} (" in said
    assert contributes_more(answered(RECORDED[1:2], one=with_norms(one))) is None


def test_an_expert_that_goes_with_easier_words_is_told_within_the_same_token_only() -> None:
    capture = make_capture(documents=40, sequence_length=64, vocabulary=15, experts_per_token=1, record=("logprob",))
    [words] = answered(RECORDED[2:], a=planted(capture, of_token=1.0, of_expert=0.0))
    assert float(abs(words["logprob"]["difference"]).max()) > 0.5
    assert matters(words) is None
    [real] = answered(RECORDED[2:], a=planted(capture, of_token=1.0, of_expert=-0.7))
    said = words_of(matters(real))
    assert said.startswith("a: if a token chooses expert 2 at layer 1, the next one is less probable")
    cell = real["logprob"].sel(layer=1, expert=2)
    low, high = sorted(abs(float(cell[f"within_{end}"])) for end in ("low", "high"))
    assert f"by {abs(float(cell['within'])):.2f} nats ({low:.2f} to {high:.2f}, simultaneous 95%" in said
    assert "more probable" in words_of(
        matters(answered(RECORDED[2:], a=planted(capture, of_token=0.0, of_expert=0.7))[0])
    )
    [few] = answered(
        RECORDED[2:],
        a=planted(
            make_capture(documents=5, sequence_length=64, vocabulary=15, experts_per_token=1, record=("logprob",)),
            0.0,
            -0.7,
        ),
    )
    assert matters(few) is None
