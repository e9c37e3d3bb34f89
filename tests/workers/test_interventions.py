"""Interventions: each family chooses by its published rule among the remaining experts, in its own forward pass and in
transformers'."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_families import (
    EXPERTS,
    FAMILIES,
    FLOAT16_STEP,
    NEAR_TIE,
    ROUTERS_ALONE,
    VOCABULARY,
    Family,
    checkpoint_of,
    softmax,
    stock_of,
)

import workers
from workers.engine import ModelEngine
from workers.interventions import Interventions, experts_in_file, what_to_change
from workers.models.family import find_routers
from workers.models.intervening import Steering, choose_to_change
from workers.models.loading import LoadedModel, load_model
from workers.record import what_to_record
from workers.shard import OutOfMemory, RoutingError

LENGTH = np.array([20, 1, 13])
TOKEN = np.random.default_rng(1).integers(3, VOCABULARY, (3, 20)).astype(np.int32)
FILLED = np.arange(20) < LENGTH[:, None]
RELATIVE = 1e-3  # of weights: hidden states of two forward passes differ by 1e-6, in float32
TEXTS = [
    "The river rose in the night and the road was lost under it.",
    "def area(width, height):\n    return width * height\n",
    "The parties agree that this contract ends on the first day of May.",
]


# --- The reference: the published rules, in float64 -------------------------------------------------------------------


def ruled(family: Family, logits: np.ndarray, bias: np.ndarray, k: int, change: dict[str, list[int]]) -> Any:
    """Weights (T, E), 0 where an expert is not chosen, and the margin of each token, under a change of one layer."""
    logits = logits.copy()
    logits[:, change.get("mask", [])] = -np.inf
    weights, clear = family.rule(logits, bias, k)
    if not (forced := change.get("force")):
        return weights, clear
    chosen = np.zeros(logits.shape, bool)
    chosen[:, forced] = True
    for many in range(1, k + 1):  # one after the other, as long as there is room
        found, margin = family.rule(logits, bias, many)
        chosen |= (found > 0) & (chosen.sum(-1, keepdims=True) < k)
        clear = np.minimum(clear, margin)
    return weighed(family, logits, bias, chosen), clear


def weighed(family: Family, logits: np.ndarray, bias: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The weights of the family's rule for these choices, whatever it would have chosen."""
    rule, options = family.rule, {}
    if isinstance(rule, partial):
        rule, options = rule.func, rule.keywords
    if rule.__name__ == "top_then_softmax":
        return softmax(np.where(chosen, logits + bias, -np.inf))
    score = 1 / (1 + np.exp(-logits)) if rule.__name__.startswith("sigmoid") else softmax(logits)
    weights = np.where(chosen, score, 0)
    renormalized = options.get("renormalized", rule.__name__ == "sigmoid_in_groups")
    return options.get("scale", 1) * weights / (weights.sum(axis=-1, keepdims=True) if renormalized else 1)


@torch.inference_mode()
def reference(
    stock: Any, family: Family, tensors: dict[str, torch.Tensor], asked: Interventions, row: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (T, L, E) of one row alone through transformers' modules, each layer by the rule on its input."""
    k = asked.top_k or family.settings["num_experts_per_tok"]
    wanted = []

    def keep(_: Any, inputs: tuple[torch.Tensor, ...], layer: int) -> None:
        prefix = f"model.layers.{layer}."
        bias = tensors[prefix + family.bias].double().numpy() if family.bias else np.zeros(EXPERTS)
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()
        logits = hidden @ tensors[prefix + family.gate].double().numpy().T
        change = {"mask": asked.masked().get(layer, []), "force": asked.forced().get(layer, [])}
        wanted.append(ruled(family, logits, bias, k, change))

    routers = find_routers(stock)
    handles = [router.register_forward_pre_hook(partial(keep, layer=layer)) for layer, router in routers.items()]
    with Steering(routers, EXPERTS, k, asked).attached():
        stock(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False)
    for handle in handles:
        handle.remove()
    weights, clear = zip(*wanted, strict=True)
    return np.stack(weights, axis=1), np.stack(clear, axis=1)


def assert_by_the_rule(
    loaded: LoadedModel, stock: Any, family: Family, tensors: dict[str, torch.Tensor], asked: Interventions
) -> np.ndarray:
    """Check that the engine's choices and weights are the reference's, except near-ties; returns the experts."""
    exact = what_to_record([], EXPERTS, "float32", weight_precision="float32")
    found = ModelEngine(loaded, exact, asked).route(TOKEN, LENGTH)
    near_ties = 0
    for row, size in enumerate(LENGTH):
        wanted, clear = reference(stock, family, tensors, asked, TOKEN[row, :size])
        got = np.zeros_like(wanted)
        np.put_along_axis(got, found["expert"][row, :size].astype(int), found["weight"][row, :size], axis=-1)
        sure = clear > NEAR_TIE
        np.testing.assert_allclose(got[sure], wanted[sure], rtol=RELATIVE, atol=0)
        near_ties += (~sure).sum()
    assert near_ties <= 3
    return found["expert"][FILLED]


@pytest.mark.parametrize("name", FAMILIES | ROUTERS_ALONE)
def test_a_family_chooses_by_its_rule_among_what_is_left_and_with_what_is_forced(name: str, tmp_path: Path) -> None:
    family, folder = (FAMILIES | ROUTERS_ALONE)[name], checkpoint_of(name, tmp_path)
    tensors, stock = load_file(folder / "model.safetensors"), stock_of(family, folder)
    loaded = load_model(folder, quantization=family.precision, device="cpu")
    plain = ModelEngine(loaded).route(TOKEN, LENGTH)["expert"][FILLED]
    often = np.argsort(-np.bincount(plain[:, 0].ravel(), minlength=EXPERTS))
    seldom = np.argsort(np.bincount(plain[:, -1].ravel(), minlength=EXPERTS))
    mask = [(family.layers[0], int(expert)) for expert in often[:3]]
    force = [(family.layers[-1], int(expert)) for expert in seldom[: min(2, family.settings["num_experts_per_tok"])]]

    masked = assert_by_the_rule(loaded, stock, family, tensors, choose_to_change(folder, None, mask=mask))
    assert not np.isin(masked[:, 0], often[:3]).any()
    assert np.isin(plain[:, 0], often[:3]).any()
    if name == "phimoe":
        for change in ({"force": force[:1]}, {"top_k": 3}, {"routes_from": "a" * 64}):
            with pytest.raises(ValueError, match=r"routers of PhimoeModel \(PhimoeTopKRouter\) cannot be changed"):
                choose_to_change(folder, None, **change)
        choose_to_change(folder, None, routes_from="a" * 64, routes_weights=True)
        return
    more = family.settings["num_experts_per_tok"] + 1
    for changes in ({"force": force}, {"mask": mask, "force": force, "top_k": more}, {"top_k": 2}):
        asked = choose_to_change(folder, None, **changes)
        found = assert_by_the_rule(loaded, stock, family, tensors, asked)
        for _, expert in changes.get("force", []):
            assert (found[:, -1] == expert).any(-1).all()
        assert found.shape[-1] == (asked.top_k or more - 1)
    again = ModelEngine(loaded).route(TOKEN, LENGTH)["expert"][FILLED]
    np.testing.assert_array_equal(again, plain, err_msg="a change outlives its engine")


def test_what_may_leave_too_few_in_the_groups_that_a_router_keeps_is_refused(tmp_path: Path) -> None:
    folder = checkpoint_of("deepseek_v3", tmp_path)  # keeps 2 of 4 groups of 4 and chooses 4
    choose_to_change(folder, None, mask=["1:0-3"])
    for change, fewest in (({"mask": ["1:0-2", "1:4-6"]}, 2), ({"mask": ["1:0"], "top_k": 8}, 7), ({"top_k": 9}, 8)):
        with pytest.raises(ValueError, match=f"DeepseekV3TopkRouter.*at layer 1: .* groups with {fewest} experts left"):
            choose_to_change(folder, None, **change)


class OneWeightForEachExpert(torch.nn.Module):
    """A router that returns weights of all experts, 0 for unchosen ones, like older versions of gpt-oss."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.weight = 2, torch.nn.Parameter(torch.zeros(EXPERTS, 4))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = torch.nn.functional.linear(hidden, self.weight)
        values, ids = torch.topk(logits, self.top_k, dim=-1)
        return logits, torch.zeros_like(logits).scatter(1, ids, values.softmax(-1)), ids


def test_a_router_that_would_not_take_the_weights_that_are_given_to_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.models.intervening.find_routers", lambda model: {0: OneWeightForEachExpert()})
    folder, change = checkpoint_of("mixtral", tmp_path), partial(choose_to_change, routes_from="a" * 64)
    with pytest.raises(ValueError, match=r"OneWeightForEachExpert.* would not return the choices and weights that are"):
        change(folder, None, routes_weights=True)
    change(folder, None)


# --- Effects of a change on predictions ------------------------------------------------------------------------------


@pytest.fixture
def tiny() -> LoadedModel:
    """The tiny model, unquantized; its own copy, to be changed."""
    return load_model(workers.tiny_checkpoint(), quantization="none", device="cpu")


def captured(model: LoadedModel, **changes: Any) -> Any:
    return workers.capture_texts(model, TEXTS, record=["logits", "logprob"], weight_precision="float32", **changes)


def lost(before: Any, after: Any) -> np.ndarray:
    """The decrease of each token's log-probability."""
    difference = (before["logprob"] - after["logprob"]).values
    return difference[np.isfinite(difference)]


def experts_of(model: Any, layer: int) -> Any:
    return model.layers[layer].mlp.experts


def test_a_masked_expert_never_occurs_and_logits_are_those_before_the_mask(tiny: LoadedModel) -> None:
    before, after = captured(tiny), captured(tiny, mask=["7:1", "2:0-2"])
    there = before["token"].values >= 0
    assert (before["expert"].values[there][:, 7] == 1).any()
    assert not (after["expert"].values[there][:, 7] == 1).any()
    assert not np.isin(after["expert"].values[there][:, 2], [0, 1, 2]).any()
    for layer in (0, 1, 2):  # up to the first change, and there before it
        np.testing.assert_array_equal(before["logit"][:, :, layer], after["logit"][:, :, layer])
    assert after.attrs["mask"] == ["2:0", "2:1", "2:2", "7:1"]
    assert "mask" not in before.attrs
    assert np.abs(lost(before, after)).max() > 0.01


def test_to_mask_what_is_never_chosen_changes_nothing(tiny: LoadedModel) -> None:
    before = workers.capture_texts(tiny, TEXTS[:1], record=["logprob"], weight_precision="float32")
    chosen = before["expert"].values[before["token"].values >= 0]
    never = [(layer, expert) for layer in range(8) for expert in range(8) if expert not in chosen[:, layer]]
    assert len(never) > 5
    after = workers.capture_texts(tiny, TEXTS[:1], record=["logprob"], weight_precision="float32", mask=never)
    np.testing.assert_array_equal(before["expert"], after["expert"])
    np.testing.assert_allclose(before["weight"], after["weight"], rtol=1e-5)
    np.testing.assert_allclose(lost(before, after), 0, atol=1e-5)


@torch.no_grad()
def test_of_equal_experts_with_renormalized_weights_any_one_can_be_masked_or_forced(tiny: LoadedModel) -> None:
    experts = experts_of(tiny.model, 4)
    for matrices in (experts.gate_up_proj, experts.down_proj):
        matrices.copy_(matrices[:1].expand_as(matrices))
    before = captured(tiny)
    for changes in ({"mask": ["4:0"]}, {"mask": ["4:5", "4:1-3"]}, {"force": ["4:6"]}):
        after = captured(tiny, **changes)
        assert (before["expert"].values[:, :, 4] != after["expert"].values[:, :, 4]).any()
        np.testing.assert_allclose(lost(before, after), 0, atol=2e-5)


@torch.inference_mode()
def test_a_planted_expert_that_alone_carries_predictions_shows_exactly_that_loss(tiny: LoadedModel) -> None:
    causal = transformers.AutoModelForCausalLM.from_pretrained(workers.tiny_checkpoint(), dtype=torch.float32)
    for model in (tiny.model, causal.model):  # in the last layer, only expert 2 adds anything
        down = experts_of(model, 7).down_proj
        down.copy_(torch.where(torch.arange(8)[:, None, None] == 2, 4 * down, 0))
    before, after = captured(tiny), captured(tiny, mask=["7:2"])
    tokens = [row[row >= 0].astype(np.int64) for row in before["token"].values]

    def logprobs() -> np.ndarray:
        found = [causal(input_ids=torch.from_numpy(ids)[None]).logits[0].log_softmax(-1) for ids in tokens]
        next_ones = zip(found, tokens, strict=True)
        return np.concatenate([part[:-1].gather(-1, torch.from_numpy(ids[1:, None]))[:, 0] for part, ids in next_ones])

    whole = logprobs()
    experts_of(causal.model, 7).down_proj.zero_()
    np.testing.assert_allclose(lost(before, after), whole - logprobs(), atol=1e-4)
    carried = np.isfinite(before["logprob"].values) & (before["expert"].values[:, :, 7] == 2).any(-1)
    carried = carried[np.isfinite(before["logprob"].values)]
    assert carried.any()
    assert not carried.all()
    np.testing.assert_allclose(lost(before, after)[~carried], 0, atol=1e-5)
    assert np.abs(lost(before, after)[carried]).max() > 0.1


def test_the_proof_asks_each_router_under_the_change_that_its_choices_were_made_under(tiny: LoadedModel) -> None:
    token = np.random.default_rng(2).integers(3, 32_000, (4, 40)).astype(np.int32)
    length = np.array([40, 40, 7, 40])
    there = np.arange(40) < length[:, None]
    logits = what_to_record(["logits"], 8, "float32")
    masked = ModelEngine(tiny, logits, choose_to_change(tiny.folder, None, mask=["*:0-2"]))
    given = masked.route(token, length)
    follows = Interventions(routes_from="a" * 64)
    following = ModelEngine(tiny, logits, follows), ModelEngine(tiny, logits, replace(follows, routes_weights=True))
    for engine in following:
        found = engine.start(token, length, given)()
        for name in ("expert", "weight"):
            np.testing.assert_allclose(found[name][there], given[name][there], rtol=FLOAT16_STEP)
    unchanged = type(tiny.routers[3]).forward
    handle = tiny.routers[3].register_forward_hook(lambda router, args, output: unchanged(router, args[0]))
    try:  # the layer's experts get choices made without the change
        for engine, theirs in ((masked, None), *((engine, given) for engine in following)):
            with pytest.raises(RoutingError, match="layer 3: its recorded choices are not those of its router"):
                engine.start(token, length, theirs)()
    finally:
        handle.remove()


def test_given_choices_that_do_not_fit_on_the_device_halve_the_micro_batch(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 MiB")

    engine = ModelEngine(tiny, interventions=Interventions(routes_from="a" * 64))
    monkeypatch.setattr(engine.steering, "begin", full)
    given = {"expert": np.zeros((1, 4, 8, 2), np.uint8)}
    with pytest.raises(OutOfMemory, match="CUDA out of memory"):  # then `capture_shard` halves the micro-batch
        engine.start(np.zeros((1, 4), np.int32), np.array([4]), given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": ["8:1"]}, "--mask 8:1: there is no layer 8; the layers with experts are 0 to 7"),
        ({"force": [(0, 8)]}, "--force 0:8: there is no expert 8; the experts of each layer are 0 to 7"),
        ({"mask": ["7:*"]}, "--mask leaves 0 of 8 experts at layer 7, but 2 are chosen for each token"),
        ({"mask": ["*:0-6"]}, "--mask leaves 1 of 8 experts at layer 0"),
        ({"mask": ["1:0-4"], "top_k": 4}, "--mask leaves 3 of 8 experts at layer 1, but 4 are chosen"),
        ({"force": ["3:0-2"]}, "--force gives 3 experts at layer 3, but 2 are chosen for each token"),
        ({"mask": ["7:1"], "force": ["*:1"]}, "7:1 is given with both --mask and --force"),
        ({"top_k": 9}, "--top_k is 9, but must be 1 to 8, the number of experts"),
        ({"top_k": 0}, "--top_k is 0, but must be 1 to 8"),
        ({"mask": ["7"]}, "--mask '7' is not LAYER:EXPERT"),
        ({"mask": ["7:1-"]}, "--mask '7:1-' is not LAYER:EXPERT"),
        ({"mask": ["7:3-1"]}, "--mask 7:3-1: the range 3-1 ends before it starts"),
    ],
)
def test_what_makes_no_sense_is_refused_before_weights_are_read(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.notebook.load_model", lambda *_, **__: pytest.fail("weights are loaded"))
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        workers.capture_texts("tiny", TEXTS, **changes)


def test_names_stand_for_experts_of_the_layers_that_have_some() -> None:
    asked = what_to_change(["*:1", "2-4:0-1"], [(8, 3)], 2, layers=[0, 2, 4, 8], num_experts=4, experts_per_token=2)
    assert asked.masked() == {0: [1], 2: [0, 1], 4: [0, 1], 8: [1]}
    assert (asked.forced(), asked.top_k) == ({8: [3]}, None)


def test_a_file_holds_layers_with_lists_of_experts(tmp_path: Path) -> None:
    file = tmp_path / "experts.json"
    file.write_text(json.dumps({"7": [1, 3], "2": []}))
    assert experts_in_file("--mask_file", file) == ["7:1", "7:3"]
    for wrong in ("[[7, 1]]", '{"7": 1}', '{"7": [true]}', '{"x": [1]}', '{"7": [-1]}'):
        file.write_text(wrong)
        with pytest.raises(ValueError, match=r"--mask_file .* must hold layers with lists of experts"):
            experts_in_file("--mask_file", file)
    file.write_text("{7: [1]}")
    with pytest.raises(ValueError, match=r"--force_file .* is not JSON"):
        experts_in_file("--force_file", file)
