"""Exactly the planted faults are named; true routes show none; shifts relative to a reference are found."""

from typing import Any

import numpy as np
import pytest
import xarray as xr
from routes_drawn import FAMILIES, PLANTED, capture_of, drawn

from analysis.doctor.alignment import Texts, align, first_rows
from analysis.doctor.examination import examine
from analysis.doctor.published import published

DRAWS = 2  # of a fault in a family; tests/benchmarks/doctor.py does a hundred, and a thousand of true routes


@pytest.mark.parametrize("family", FAMILIES)
def test_true_routes_show_no_fault(family: str) -> None:
    for seed in range(10 * DRAWS):
        assert examine(capture_of(drawn(family, 50_000 + seed))) == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_named_and_nothing_else(planted: str, family: str) -> None:
    fault, make = PLANTED[planted]
    for seed in range(DRAWS):
        arrays = drawn(family, 60_000 + seed)
        make(arrays)
        found = examine(capture_of(arrays))
        assert {finding.fault for finding in found} == {fault}, found


@pytest.mark.parametrize("chunks", [1, 5, 24])
def test_what_is_found_does_not_depend_on_shards_or_on_weights_and_phases(chunks: int) -> None:
    arrays = drawn("mixtral", 3)
    PLANTED["a layer equal to another"][1](arrays)
    capture = capture_of(arrays)
    assert examine(capture.chunk({"doc": chunks})) == examine(capture)
    assert [one.fault for one in examine(capture.drop_vars(["weight", "phase"]))] == ["equal layers"]


def test_evidence_names_the_layer_the_rows_and_the_numbers() -> None:
    arrays = drawn("sigmoid", 0)
    arrays["expert"][5, 3, 1, 2], arrays["expert"][9, 0, 1, 0] = 77, 200
    [found] = examine(capture_of(arrays))
    assert (found.layers, found.rows) == ([2], [5, 9])
    assert "2 choices of" in found.evidence
    assert "have an expert id of 32 or more; the model has experts 0 to 31" in found.evidence
    arrays = drawn("sigmoid", 0)
    arrays["expert"][:, :, 0] = 0
    [found] = examine(capture_of(arrays))
    assert (found.fault, found.layers) == ("dense layers counted", [1])


def test_few_tokens_are_not_judged_by_their_load() -> None:
    assert examine(capture_of(drawn("olmoe", 0, documents=1))) == []


def test_what_is_published_of_a_model_is_found_by_its_name() -> None:
    mixtral, none = published("mistralai/Mixtral-8x22B-v0.1"), published("gpt2")
    assert none is None
    assert mixtral is not None
    assert (mixtral.num_experts, mixtral.experts_per_token, mixtral.total) == (8, 2, 1.0)
    capture = capture_of(drawn("sigmoid", 0))
    capture.attrs["model"] = "mixtral"
    evidence = [one.evidence for one in examine(capture) if one.fault == "another top-k"]
    assert evidence == [f"the capture has {here}" for here in (
        "4 experts per token, but Mixtral has 2", "32 experts per layer, but Mixtral has 8",
    )]  # fmt: skip


# --- With a reference -----------------------------------------------------------------------------------------------


def texts(arrays: dict[str, Any], layers: tuple[int, ...] = (0, 1, 2, 3)) -> Texts:
    filled = np.arange(arrays["token"].shape[1]) < arrays["length"][:, None]
    return Texts(
        layers=list(layers),
        document=np.arange(len(filled)),
        token=np.where(filled, arrays["token"], -1),
        expert=np.where(filled[..., None, None], arrays["expert"], -1),
        weight=arrays["weight"].astype(np.float32),
    )


def changed(own: Texts, **changes: Any) -> Texts:
    return Texts(**{**own.__dict__, **changes})


def moved(expert: np.ndarray, position: int) -> np.ndarray:
    """Each token's routes are those of the token a number of places after it."""
    found = np.full_like(expert, -1)
    width = expert.shape[1]
    here = slice(max(0, -position), width - max(0, position))
    found[:, here] = expert[:, here.start + position : here.stop + position]
    return found


@pytest.mark.parametrize("seed", range(3))
def test_equal_routes_agree_whatever_the_order_of_choices(seed: int) -> None:
    reference = texts(drawn("mixtral", seed))
    found = align(changed(reference, expert=reference.expert[..., ::-1]), reference, 8)
    assert (found.verdict, found.position, found.layer, found.agreement, found.differing) == ("agrees", 0, 0, 1.0, 0)
    assert found.explained is None
    assert found.chance < 0.4


@pytest.mark.parametrize("position", [-2, -1, 1, 3])
def test_a_shift_in_position_is_found(position: int) -> None:
    reference = texts(drawn("mixtral", 1))
    found = align(changed(reference, expert=moved(reference.expert, position)), reference, 8)
    assert (found.position, found.layer) == (position, 0)
    assert found.verdict.startswith("shifted by")
    assert found.agreement == 1.0
    assert found.unshifted < 0.6


@pytest.mark.parametrize(("layer", "words"), [(1, "1 layer earlier"), (-1, "1 layer later")])
def test_a_shift_in_layers_is_found_by_their_numbers(layer: int, words: str) -> None:
    reference = texts(drawn("mixtral", 2))
    found = align(changed(reference, layers=[number - layer for number in reference.layers]), reference, 8)
    assert (found.position, found.layer, found.verdict) == (0, layer, f"shifted by {words}")
    both = align(changed(reference, layers=[1, 2, 3, 4], expert=moved(reference.expert, 1)), reference, 8)
    assert both.verdict == "shifted by 1 token earlier and 1 layer later"


def test_rounding_is_told_from_another_model_by_near_ties() -> None:
    """Noise on the logits turns near-ties; another seed is another model."""
    arrays = drawn("sigmoid", 4)
    reference = texts(arrays, (1, 2, 3))
    expert = reference.expert.copy()
    random = np.random.default_rng(0)
    swapped = (random.random(expert.shape[:3]) < 0.05) & (expert[..., 0] >= 0)
    other = (expert[..., -1] + 1 + random.integers(0, 3, swapped.shape)) % 32
    clash = (expert[..., :-1] == other[..., None]).any(-1)
    expert[..., -1] = np.where(swapped & ~clash, other, expert[..., -1])
    found = align(changed(reference, expert=expert), reference, 32)
    assert (found.verdict, found.explained) == ("agrees but for rounding", 1.0)
    assert 0.9 < found.agreement < 0.97
    expert = reference.expert.copy()
    expert[..., 0] = np.where(swapped, (expert[..., 0] + 1) % 32, expert[..., 0])  # the first choice is not a near-tie
    assert align(changed(reference, expert=expert), reference, 32).verdict == "not the same model"
    another = drawn("sigmoid", 5)
    another |= {"token": arrays["token"], "length": arrays["length"]}
    assert align(texts(another, (1, 2, 3)), reference, 32).verdict == "not the same model"


def test_unknown_tokens_are_not_compared_and_other_texts_are_refused() -> None:
    reference = texts(drawn("mixtral", 6))
    expert = reference.expert.copy()
    expert[:, 10:] = -1
    found = align(changed(reference, expert=expert), reference, 8)
    assert (found.verdict, found.tokens) == ("agrees", 10 * len(expert))
    token = reference.token.copy()
    token[3, 4] += 1
    with pytest.raises(ValueError, match="the two hold different texts: at position 4 of document 3, the tokens are"):
        align(changed(reference, token=token), reference, 8)
    with pytest.raises(ValueError, match="1 experts per token cannot be compared with 2"):
        align(changed(reference, expert=expert[..., :1]), reference, 8)


def test_first_rows_are_those_at_which_documents_begin() -> None:
    capture = capture_of(drawn("mixtral", 7))
    capture = capture.assign(offset=("doc", np.arange(24) % 2 * 64), captured=("doc", np.arange(24) != 4))
    found = first_rows(capture, 5)
    assert found.document.tolist() == [0, 2, 6, 8, 10]
    assert found.token.shape[1] == int(capture["length"].values[[0, 2, 6, 8, 10]].max())
    wanted: xr.DataArray = capture["expert"][2, :30].astype(int)
    np.testing.assert_array_equal(found.expert[1, :30], wanted)
