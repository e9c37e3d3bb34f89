"""The effects of experts equal those of whole runs with each expert masked, in every family and both forward passes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_families import EXPERTS, FAMILIES, VOCABULARY, checkpoint_of

from store import Layout
from store.plan import Rows
from workers.engine import ModelEngine
from workers.importance import EFFECTS, STEP, ImportanceEngine
from workers.interventions import Interventions, layers_named
from workers.models.loading import LoadedModel, load_model
from workers.record import Recorded
from workers.shard import RoutingError, route_rows

LENGTH = np.array([20, 1, 13])
TOKEN = np.random.default_rng(1).integers(3, VOCABULARY, (3, 20)).astype(np.int32)
FOLLOWED = np.arange(20) < LENGTH[:, None] - 1
FILLED = np.arange(20) < LENGTH[:, None]
OWN_FORWARD = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen2_moe")
ROUNDING = STEP / 2 + 1e-5  # of the stored effect and of log-probabilities in float32


def predicted(loaded: LoadedModel, *mask: str) -> np.ndarray:
    """Log-probabilities of a whole run without some experts."""
    asked = Interventions(mask=mask)
    return ModelEngine(loaded, Recorded(record=("logprob",)), asked).route(TOKEN, LENGTH)["logprob"]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_effect_is_the_difference_of_two_whole_runs(name: str, tmp_path: Path) -> None:
    own = name in OWN_FORWARD
    loaded = load_model(checkpoint_of(name, tmp_path), quantization="nf4" if own else "none", device="cpu")
    engine = ImportanceEngine(loaded)
    assert (engine.forward is not loaded.model) == own
    found = engine.route(TOKEN, LENGTH)
    effect, layers = found["effect"], FAMILIES[name].layers
    assert effect.shape == (3, 20, len(layers), EXPERTS)
    assert np.isfinite(effect[FOLLOWED]).all()
    assert np.isnan(effect[~FOLLOWED]).all()

    before = predicted(loaded)
    np.testing.assert_array_equal(found["logprob"], before)
    often = [np.bincount(found["expert"][FILLED][:, at].ravel(), minlength=EXPERTS) for at in range(len(layers))]
    places = [(0, often[0].argmax()), (0, often[0].argmin()), (len(layers) - 1, often[-1].argmax())]
    for at, expert in places:
        wanted = predicted(loaded, f"{layers[at]}:{expert}") - before
        np.testing.assert_allclose(effect[:, :, at, expert], wanted, atol=ROUNDING)
    assert abs(effect[FOLLOWED][:, 0, places[0][1]]).max() > 0.01
    if name in ("mixtral", "granitemoe"):  # renormalized: a token that did not choose the expert does not change
        chose = (found["expert"][FOLLOWED][:, -1, :, None] == np.arange(EXPERTS)).any(axis=1)
        assert (effect[FOLLOWED][:, -1][chose] != 0).any()
        np.testing.assert_allclose(effect[FOLLOWED][:, -1][~chose], 0, atol=STEP)
        never = often[0] == 0
        assert (effect[FOLLOWED][:, 0, never] == 0).all()


def test_layers_that_are_not_asked_for_are_not_measured_and_progress_adds_up(tiny_model: Any) -> None:
    engine, said = ImportanceEngine(tiny_model, layers=(6, 7)), list[int]()
    token = np.random.default_rng(2).integers(3, 32_000, (2, 9)).astype(np.int32)
    rows = Rows(token=token, length=np.array([9, 4], np.int32))
    layout = Layout(
        sequence_length=9, rows_per_shard=2, layers=engine.layers, num_experts=8, experts_per_token=2,
        vocab_size=32_000, record=EFFECTS.record,
    )  # fmt: skip
    effect = route_rows(engine, rows, layout, 9, said.append)()["effect"]  # a micro-batch for each row
    assert np.isnan(effect[:, :, :6]).all()
    assert np.isfinite(effect[0, :8, 6:]).all()
    assert np.isnan(effect[1, 3:]).all()
    assert (sum(said), len(said), min(said) >= 0) == (13, 2 * 16, True)
    assert engine.description["effect_layers"] == [6, 7]


def test_a_batch_without_a_prediction_has_no_effect(tiny_model: Any) -> None:
    engine, said = ImportanceEngine(tiny_model, layers=(7,)), list[int]()
    engine.report = said.append
    found = engine.route(np.full((2, 1), 5, np.int32), np.array([1, 1]))
    assert np.isnan(found["effect"]).all()
    assert said == [2]


def test_effects_beside_a_mask_are_those_of_captures_with_both(tmp_path: Path) -> None:
    loaded = load_model(checkpoint_of("mixtral", tmp_path), quantization="none", device="cpu")
    found = ImportanceEngine(loaded, EFFECTS, Interventions(mask=("1:0", "1:1")), layers=(1,)).route(TOKEN, LENGTH)
    both = predicted(loaded, "1:0", "1:1", "1:4")
    np.testing.assert_allclose(found["effect"][:, :, 1, 4], both - predicted(loaded, "1:0", "1:1"), atol=ROUNDING)
    assert np.nanmax(abs(found["effect"][:, :, 1, 4])) > 0.01
    assert np.nanmax(abs(found["effect"][:, :, 1, :2])) == 0, "they are masked already"


@pytest.mark.parametrize("fault", ["another state", "no number"])
def test_a_run_that_resumes_otherwise_stops_the_shard(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = ImportanceEngine(
        load_model(checkpoint_of("mixtral", tmp_path), quantization="none", device="cpu"), layers=(1,)
    )
    resumed: Callable[[int], torch.Tensor] = engine.kept.resumed
    calls: list[int] = []

    def faulty(layer: int) -> torch.Tensor:
        calls.append(layer)
        if fault == "another state":
            return resumed(layer).roll(1, dims=0)
        return resumed(layer) * (torch.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(engine.kept, "resumed", faulty)
    wanted = (
        "run again, the predictions differ"
        if fault == "another state"
        else r"layer 1: without expert \d, predictions are"
    )
    with pytest.raises(RoutingError, match=wanted):
        engine.route(TOKEN, LENGTH)


def test_layers_are_named_by_numbers_and_ranges() -> None:
    there = (1, 2, 4, 7)
    assert layers_named((), there) == [1, 2, 4, 7]
    assert layers_named(("4", "1-2"), there) == [1, 2, 4]
    for wrong, why in (("3", "there is no layer 3"), ("x", "is not a layer"), ("4-2", "ends before it starts")):
        with pytest.raises(ValueError, match=why):
            layers_named((wrong,), there)
