"""Recordings are what the model chose for these tokens; otherwise the shard stops with an error that names the
layer."""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from store import CaptureGroup, Layout
from store.plan import Plan, Rows
from workers.engine import ModelEngine
from workers.models import kernels, products
from workers.models.decoder import MixtralForward
from workers.models.family import find_routers
from workers.models.loading import LoadedModel, load_model
from workers.models.routers import choices, in_order
from workers.record import CHOICES_ALONE, Recorded
from workers.recorder import OTHERS, SAMPLE, RouteRecorder
from workers.shard import OutOfMemory, RoutingError, capture_shard, route_rows

LAYERS = 8  # of the tiny model
POSITIONS = 24
FLOAT16_STEP = 2.0**-10  # relative; a weight on the boundary may round to either side
NEAR_TIE = 1e-5  # between probabilities, in float32; hidden states of two batches differ by 1e-6


def random_rows(count: int, seed: int = 0, longest: int = POSITIONS, vocabulary: int = 32_000) -> Rows:
    """Rows of random tokens and lengths, the longest length among them."""
    random = np.random.default_rng(seed)
    length = random.integers(1, longest + 1, count).astype(np.int32)
    length[0] = longest
    token = random.integers(3, vocabulary, (count, longest)).astype(np.int32)
    token[np.arange(longest) >= length[:, None]] = -1
    index = np.arange(count)
    return Rows(token=token, length=length, document_id=index.astype(np.int64), offset=np.zeros(count, np.int32))


def layout_of(
    engine: ModelEngine, rows: Rows, rows_per_shard: int | None = None, recorded: Recorded = CHOICES_ALONE
) -> Layout:
    return Layout(
        sequence_length=rows.token.shape[1],
        rows_per_shard=rows_per_shard or len(rows.length),
        layers=engine.layers,
        num_experts=engine.num_experts,
        experts_per_token=engine.experts_per_token,
        vocab_size=32_000,
        **asdict(recorded),
    )


# --- An independent reference -----------------------------------------------------------------------------


@torch.inference_mode()
def reference(model: Any, layers: Sequence[int], row: np.ndarray, k: int, renormalize: bool = True) -> tuple[Any, ...]:
    """Expert, weight (float64) and margin to the next choice, for one row, run alone and unpadded.

    Computed in float64 from the hidden states that reach each router, at the router's own place in the model.
    """
    hidden: dict[int, np.ndarray] = {}
    handles = []
    for layer in layers:

        def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...], layer: int = layer) -> None:
            hidden[layer] = inputs[0].reshape(-1, inputs[0].shape[-1]).double().numpy()

        handles.append(model.layers[layer].mlp.gate.register_forward_pre_hook(keep))
    model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False)
    for handle in handles:
        handle.remove()
    shape = (len(row), len(layers), k)
    expert, weight, margin = np.zeros(shape, int), np.zeros(shape), np.zeros(shape[:2])
    for index, layer in enumerate(layers):
        logits = hidden[layer] @ model.layers[layer].mlp.gate.weight.double().numpy().T
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        probability = powers / powers.sum(axis=1, keepdims=True)
        ids = np.broadcast_to(np.arange(probability.shape[1]), probability.shape)
        order = np.lexsort((ids, -probability), axis=1)  # largest first, ties by lower id
        ordered = np.take_along_axis(probability, order, axis=1)
        expert[:, index] = order[:, :k]
        weight[:, index] = ordered[:, :k] / (ordered[:, :k].sum(axis=1, keepdims=True) if renormalize else 1)
        margin[:, index] = (ordered[:, :k] - ordered[:, 1 : k + 1]).min(axis=1)
    return expert, weight, margin


def test_routes_are_those_of_a_float64_reference_in_every_layer_sorted_by_weight(tiny_model: LoadedModel) -> None:
    engine, rows = ModelEngine(tiny_model), random_rows(60, longest=64)
    expert, weight = route_rows(engine, rows, layout_of(engine, rows), batch_tokens=640)().values()
    assert (expert.dtype, weight.dtype) == (np.uint8, np.float16)
    counted = near_ties = equal_in_float16 = 0
    for row, size in enumerate(rows.length):
        wanted, wanted_weight, margin = reference(tiny_model.model, range(LAYERS), rows.token[row, :size], k=2)
        clear = margin > NEAR_TIE
        np.testing.assert_array_equal(expert[row, :size][clear], wanted[clear])
        np.testing.assert_allclose(weight[row, :size][clear], wanted_weight[clear], rtol=FLOAT16_STEP, atol=0)
        assert (expert[row, size:] == 255).all()
        assert not weight[row, size:].any()
        counted, near_ties = counted + clear.size, near_ties + (~clear).sum()
        equal_in_float16 += (weight[row, :size, :, 0] == weight[row, :size, :, 1])[clear].sum()
    assert near_ties <= counted / 1000
    assert counted > 10_000
    assert equal_in_float16 > 0, "no pair that only the order before rounding to float16 can tell apart"


Used = dict[int, tuple[np.ndarray, np.ndarray]]


def kept_experts(ours: MixtralForward, used: Used) -> Callable[..., Any]:
    """`workers.models.experts.outputs_one_by_one` that records which experts it is called for."""
    original = ours._outputs

    def outputs(multiplying: Any, experts: nn.Module, operand: Any, expert_TK: torch.Tensor, **others: Any) -> Any:
        used[len(used)] = (expert_TK.numpy(), np.empty(0))
        return original(multiplying, experts, operand, expert_TK, **others)

    return outputs


def kept_weights(used: Used) -> Callable[..., Any]:
    """`kernels.add_norm` that records the weights with which experts are mixed."""

    def add_norm(*arguments: Any) -> torch.Tensor:
        if len(arguments) == 6:
            used[len(used) - 1] = (used[len(used) - 1][0], arguments[-1].float().numpy())
        return kernels.add_norm(*arguments)

    return add_norm


@torch.inference_mode()
def test_routes_are_the_models_own_choice(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the real inputs of the experts, and with transformers' own record of logits."""
    engine, rows = ModelEngine(tiny_model), random_rows(12)
    used: Used = {}
    handles = []
    for layer in range(LAYERS):

        def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...], layer: int = layer) -> None:
            used[layer] = (inputs[1].numpy(), inputs[2].float().numpy())

        handles.append(tiny_model.model.layers[layer].mlp.experts.register_forward_pre_hook(keep))
    if isinstance(engine.forward, MixtralForward):  # which multiplies the experts' matrices itself
        monkeypatch.setattr(engine.forward, "_outputs", kept_experts(engine.forward, used))
        monkeypatch.setattr(products, "add_norm", kept_weights(used))
    expert, weight = engine.route(rows.token, rows.length).values()
    for handle in handles:
        handle.remove()
    assert list(used) == list(range(LAYERS - 1)), "the last layer's experts are not needed, and were run"
    filled = np.arange(POSITIONS) < rows.length[:, None]
    for layer, (indices, weights) in used.items():
        order = np.argsort(-weights, axis=1, kind="stable")
        chosen = np.take_along_axis(indices, order, axis=1).reshape(*filled.shape, 2)
        given_weight = np.take_along_axis(weights, order, axis=1).reshape(*filled.shape, 2)
        np.testing.assert_array_equal(expert[filled][:, layer], chosen[filled])
        np.testing.assert_array_equal(weight[filled][:, layer], given_weight[filled].astype(np.float16))
    ids = torch.from_numpy(np.where(filled, rows.token, 0).astype(np.int64))
    logits = tiny_model.model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
    assert len(logits) == LAYERS
    for layer, each in enumerate(logits):
        best = np.sort(each.topk(2).indices.numpy().reshape(*filled.shape, 2))
        np.testing.assert_array_equal(np.sort(expert[filled][:, layer]), best[filled])


def test_neither_padding_nor_the_make_up_of_a_micro_batch_changes_routes(tiny_model: LoadedModel) -> None:
    engine, rows = ModelEngine(tiny_model), random_rows(20, seed=3)
    layout = layout_of(engine, rows)
    true_expert, true_weight = route_rows(engine, rows, layout, batch_tokens=1)().values()  # every row alone, unpadded
    places = rows.length.sum() * LAYERS
    for batch_tokens in (50, 10_000):
        expert, weight = route_rows(engine, rows, layout, batch_tokens)().values()
        differ = (expert != true_expert).any(axis=-1)
        assert differ.sum() <= places / 1000
        np.testing.assert_allclose(weight[~differ], true_weight[~differ], rtol=2 * FLOAT16_STEP)
    # The padding may hold anything: attention is causal.
    padded = np.where(rows.token == -1, 31_999, rows.token)
    given_expert = engine.route(rows.token, rows.length)["expert"]
    other_expert = engine.route(padded, rows.length)["expert"]
    filled = np.arange(POSITIONS) < rows.length[:, None]
    np.testing.assert_array_equal(given_expert[filled], other_expert[filled])


def saved(config: transformers.PretrainedConfig, folder: Path) -> Path:
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):  # zeros if a family expects them from the checkpoint
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "eos_token_id": 2,
}


def test_layers_bear_the_models_own_numbers_and_weights_need_not_sum_to_one(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_hidden_layers=5, num_experts=6, num_experts_per_tok=3, head_dim=16,
        mlp_only_layers=[0, 3], norm_topk_prob=False,
    )  # fmt: skip
    loaded = load_model(saved(config, tmp_path / "qwen"), quantization="none", device="cpu")
    engine, rows = ModelEngine(loaded), random_rows(10, vocabulary=64)
    assert engine.layers == (1, 2, 4)
    expert, weight = route_rows(engine, rows, layout_of(engine, rows), batch_tokens=100)().values()
    sums = []
    for row, size in enumerate(rows.length):
        wanted, wanted_weight, margin = reference(loaded.model, (1, 2, 4), rows.token[row, :size], 3, renormalize=False)
        clear = margin > NEAR_TIE
        np.testing.assert_array_equal(expert[row, :size][clear], wanted[clear])
        np.testing.assert_allclose(weight[row, :size][clear], wanted_weight[clear], rtol=FLOAT16_STEP)
        sums.append(wanted_weight.sum(axis=-1).ravel())
    assert np.concatenate(sums).min() < 0.9


# --- The order of choices ---------------------------------------------------------------------------------


@given(st.data(), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_choices_are_found_in_a_tuple_of_any_order_and_sorted_with_ties_by_lower_expert(
    data: st.DataObject, k: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    tokens, num_experts = 5, 9  # more than k: weights (T, E) and (T, k) differ in shape
    experts = np.stack([random.permutation(num_experts)[:k] for _ in range(tokens)])
    dense = random.choice([0.125, 0.25, 0.25 + 1e-6, 0.5, 0.75], (tokens, num_experts)).astype(np.float32)
    chosen = np.take_along_axis(dense, experts, axis=1)
    parts = [torch.from_numpy(experts), torch.from_numpy(chosen), torch.from_numpy(random.normal(size=(tokens, 9)))]
    kept = [parts[0], torch.from_numpy(dense)] if data.draw(st.booleans(), label="weights (T, E)") else parts
    shaped = [part[None] for part in kept] if data.draw(st.booleans(), label="a batch dimension") else kept
    got_experts, got_weights = in_order(*choices((*data.draw(st.permutations(shaped)), None), k))
    for token in range(tokens):
        wanted = sorted(zip(-chosen[token], experts[token], strict=True))
        assert got_experts[token].tolist() == [expert for _, expert in wanted]
        assert got_weights[token].tolist() == [-negative for negative, _ in wanted]


def test_weights_stand_last_before_the_indices_where_other_parts_have_their_shape_too() -> None:
    """Logits if every expert is chosen, and the weights of as many shared experts in Inkling."""
    logits, weights, shared = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(1)).unbind()
    indices = torch.tensor([[0, 1]]).expand(5, 2)
    for output in ((logits, weights, indices), (logits, weights, indices, shared), (indices, weights, shared)):
        assert torch.equal(choices(output, 2)[1], weights)


@pytest.mark.parametrize(
    "output",
    [
        (torch.zeros(4, 8), torch.zeros(4, 2)),
        torch.zeros(4, 8),
        torch.zeros(4, 2, dtype=torch.long),
        (torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.long)),
        (torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 2, dtype=torch.int32)),
        None,
    ],
)
def test_an_output_without_one_set_of_choices_is_refused_with_its_shapes(output: Any) -> None:
    with pytest.raises(RoutingError, match=r"no choices of 2 experts per token in the router's output: \["):
        in_order(*choices(output, 2))


# --- The proof of capture ---------------------------------------------------------------------------------

Broken = Callable[[ModelEngine, int], Any]


def gate_of(engine: ModelEngine, layer: int) -> Any:
    return engine.model.layers[layer].mlp.gate


def altered(change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> Broken:
    """The layer's router returns something else, also to its experts: another hook came before this project's."""

    def breaks(engine: ModelEngine, layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> Any:
            weights, experts = change(output[1].clone(), output[2].clone())
            return output[0], weights, experts

        return gate_of(engine, layer).register_forward_hook(hook).remove

    return breaks


def hook_removed(engine: ModelEngine, layer: int) -> Any:
    """Something clears a router's hooks while the model runs."""
    return engine.model.embed_tokens.register_forward_pre_hook(
        lambda *_: gate_of(engine, layer)._forward_hooks.clear()
    ).remove


def router_replaced(engine: ModelEngine, layer: int) -> Any:
    """The module with the hook is no longer the one in the model."""
    block, gate = engine.model.layers[layer].mlp, gate_of(engine, layer)
    block.gate = copy.deepcopy(gate)
    return lambda: setattr(block, "gate", gate)


def fired_twice(engine: ModelEngine, layer: int) -> Any:
    """The router is called twice, like in the recomputation of a checkpointed layer."""
    asked: list[bool] = []

    def ask_before(gate: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        asked.append(True)
        if len(asked) % 2:
            gate(*inputs)

    return gate_of(engine, layer).register_forward_pre_hook(ask_before).remove


def earlier_batch_from_a_hook(engine: ModelEngine, layer: int) -> Any:
    """A static buffer that is filled once and read forever."""
    kept: list[Any] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        kept.append(output)
        return kept[0]

    return gate_of(engine, layer).register_forward_hook(hook).remove


def earlier_batch_by_shape(engine: ModelEngine, layer: int) -> Any:
    """The router returns its first output for every input of the same shape, like a replayed graph."""
    gate = gate_of(engine, layer)
    original, kept = gate.forward, {}

    def forward(hidden: torch.Tensor) -> Any:
        return kept.setdefault(hidden.shape[-2] if hidden.ndim == 2 else hidden.shape[:-1].numel(), original(hidden))

    gate.forward = forward
    return lambda: delattr(gate, "forward")


def layer_above(engine: ModelEngine, layer: int) -> Any:
    """The layer's choices are those of the layer above, on this layer's hidden states."""
    other = gate_of(engine, (layer + 1) % LAYERS)
    return gate_of(engine, layer).register_forward_hook(lambda module, inputs, output: other.forward(inputs[0])).remove


def filed_one_layer_on(engine: ModelEngine, layer: int) -> Any:
    """The choices of two adjacent layers' routers are recorded in each other's place."""
    recorder, other = engine.recorder, layer - 1 if layer else 1
    original = recorder._after
    swap = {layer: other, other: layer}
    recorder._after = lambda index: original(swap.get(index, index)) if index != LAYERS - 1 else original(index)  # type: ignore[method-assign]
    return lambda: delattr(recorder, "_after")


def last_column(values: torch.Tensor, value: float) -> torch.Tensor:
    values[len(values) // 2 :, -1] = value
    return values


FAULTS: dict[str, tuple[Broken, str]] = {
    "a hook is removed": (hook_removed, "its router fired 0 times"),
    "the router is another module": (router_replaced, "its router fired 0 times"),
    "fired twice": (fired_twice, "its router fired 2 times"),
    "an earlier batch's rows": (earlier_batch_from_a_hook, "of an earlier batch or another layer"),
    "an earlier batch's rows by shape": (earlier_batch_by_shape, "of an earlier batch or another layer"),
    "the layer above's choices": (layer_above, "of an earlier batch or another layer"),
    "an expert at E": (altered(lambda w, e: (w, last_column(e, 8))), "an expert that does not exist"),
    "a negative expert": (altered(lambda w, e: (w, last_column(e, -1))), "an expert that does not exist"),
    "one expert twice": (altered(lambda w, e: (w, e[:, :1].expand(-1, 2).contiguous())), "one twice for a token"),
    "a weight that is NaN": (altered(lambda w, e: (last_column(w, float("nan")), e)), "weights are not finite"),
    "a weight that is infinite": (altered(lambda w, e: (last_column(w, float("inf")), e)), "weights are not finite"),
    "too few rows": (altered(lambda w, e: (w[:-1], e[:-1])), "its router chose for 191 tokens instead of 192"),
    "rows in another order": (altered(lambda w, e: (w.flip(0), e.flip(0))), "of an earlier batch or another layer"),
}


def planned(
    engine: ModelEngine, folder: Path, rows: Rows, rows_per_shard: int, recorded: Recorded = CHOICES_ALONE
) -> CaptureGroup:
    """A group with these rows planned and nothing captured."""
    layout = layout_of(engine, rows, rows_per_shard, recorded)
    group = CaptureGroup.create(folder, "broken", layout=layout, identity={"model": "tiny"}, attrs={}, pieces=["a"])
    plan = Plan(complete=True, rows=len(rows.length), tokens=int(rows.length.sum()), documents=len(rows.length))
    group.publish(rows, [f"row {number}" for number in rows.document_id], plan)
    return group


PLACES = [(fault, layer) for fault in FAULTS for layer in (0, 3, LAYERS - 1)]
PLACES.remove(
    ("fired twice", LAYERS - 1)
)  # the forward pass ends when the last router has fired, so there is no second time
PLACES.remove(("a negative expert", 0))  # the unquantized experts themselves fail on it, except the last layer's
PLACES.remove(("a negative expert", 3))


@pytest.mark.parametrize(("fault", "layer"), PLACES)
def test_a_fault_in_one_layer_stops_the_shard_and_names_the_layer(
    tiny_model: LoadedModel, tmp_path: Path, fault: str, layer: int
) -> None:
    breaks, message = FAULTS[fault]
    engine, rows = ModelEngine(tiny_model), random_rows(16, seed=1)
    rows.length[:] = POSITIONS  # both shards are micro-batches of one shape
    rows.token[rows.token == -1] = 7
    group = planned(engine, tmp_path / "s.zarr", rows, rows_per_shard=8)
    capture_shard(group, 0, group.read_rows(0), engine, batch_tokens=8 * POSITIONS)()
    restore = breaks(engine, layer)
    try:
        if "earlier" in fault:
            capture_shard(group, 0, group.read_rows(0), engine, batch_tokens=8 * POSITIONS)()
        with pytest.raises(RoutingError, match=f"^shard 1 of broken: layer {layer}: .*{message}"):
            capture_shard(group, 1, group.read_rows(1), engine, batch_tokens=8 * POSITIONS)()
    finally:
        restore()
    capture_shard(group, 1, group.read_rows(1), engine, batch_tokens=8 * POSITIONS)()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_a_logit_that_is_not_finite_stops_the_shard_with_layer_position_and_row(
    tiny_model: LoadedModel, tmp_path: Path, layer: int, value: float
) -> None:
    engine, rows = ModelEngine(tiny_model), random_rows(8, seed=3)
    row, position = 5, int(rows.length[5]) - 1
    group = planned(engine, tmp_path / "s.zarr", rows, rows_per_shard=8)
    place = int(np.flatnonzero(np.argsort(-rows.length, kind="stable") == row)[0]) * int(rows.length.max()) + position

    def spoil(module: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits, *others = (part.clone() for part in output)
        logits[place, 2] = value  # with weights that are still finite
        return (logits, *others)

    handle = gate_of(engine, layer).register_forward_hook(spoil)
    message = f"layer {layer}: its router's logits or weights are not finite, first seen at position {position}"
    try:
        with pytest.raises(RoutingError, match=f"^shard 0 of broken: {message} of row {row} of the shard$"):
            capture_shard(group, 0, group.read_rows(0), engine, batch_tokens=8 * POSITIONS)()
    finally:
        handle.remove()


def test_choices_that_are_not_the_routers_are_told_with_a_row_that_shows_them(tiny_model: LoadedModel) -> None:
    engine, rows = ModelEngine(tiny_model), random_rows(8)
    rows.length[:] = POSITIONS
    rows.token[rows.token == -1] = 7
    half = len(rows.token) // 2
    other = altered(lambda w, e: (torch.cat([w[: half * POSITIONS], w[half * POSITIONS :] / 2]), e))
    restore = other(engine, 3)
    try:
        with pytest.raises(RoutingError, match=r"^layer 3: .* another layer, first seen at position") as error:
            engine.route(rows.token, rows.length)
    finally:
        restore()
    assert error.value.row >= half


@pytest.mark.parametrize("layer", [1, 4])
def test_hooks_on_the_wrong_routers_stop_the_shard_and_name_the_layer(tiny_model: LoadedModel, layer: int) -> None:
    rows, routers = random_rows(8), tiny_model.routers
    swapped = routers | {layer: routers[layer + 1], layer + 1: routers[layer]}
    with pytest.raises(RoutingError, match=rf"^layer {layer}: the router recorded as that of layer {layer + 1} fired"):
        ModelEngine(replace(tiny_model, routers=swapped)).route(rows.token, rows.length)
    rotated = {number: routers[(number + 1) % LAYERS] for number in routers}
    with pytest.raises(RoutingError, match=r"^layer 0: its router fired 0 times"):
        ModelEngine(replace(tiny_model, routers=rotated)).route(rows.token, rows.length)
    shifted = routers | {number: routers[number + 1] for number in range(layer, LAYERS - 1)}
    with pytest.raises(
        RoutingError, match=rf"^layer {LAYERS - 1}: its router is also the router of layer {LAYERS - 2}"
    ):
        ModelEngine(replace(tiny_model, routers=shifted))
    engine = ModelEngine(tiny_model)
    filed_one_layer_on(engine, layer)
    with pytest.raises(RoutingError, match=rf"^layer {layer - 1}: .*"):
        engine.route(rows.token, rows.length)
    with pytest.raises(RoutingError, match="the model has no routers to record"):
        RouteRecorder({}, 8, 2)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_after_a_forward_also_after_one_that_failed(tiny_model: LoadedModel) -> None:
    engine, rows = ModelEngine(tiny_model), random_rows(4)
    before = hooks(tiny_model.model)
    engine.route(rows.token, rows.length)
    assert hooks(tiny_model.model) == before
    restore = fired_twice(engine, 2)
    with pytest.raises(RoutingError):
        engine.route(rows.token, rows.length)
    restore()
    with pytest.raises(IndexError):
        engine.route(np.full((1, 4), 32_000, np.int32), np.array([4]))  # no such token
    assert hooks(tiny_model.model) == before
    engine.recorder.routers[5] = None  # type: ignore[assignment]  # attaching fails halfway
    with pytest.raises(AttributeError):
        engine.route(rows.token, rows.length)
    assert hooks(tiny_model.model) == before


# --- No false alarm ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halved(tiny_model: LoadedModel) -> LoadedModel:
    """The same model computing in bfloat16, as on a GPU: logits tie and near-ties flip with the shape of a product."""
    if tiny_model.provenance["quantization"] != "none":
        pytest.skip("one bfloat16 model is enough")
    model = copy.deepcopy(tiny_model.model).to(torch.bfloat16)
    return replace(tiny_model, model=model, routers=find_routers(model))


def raise_no_alarm(engine: ModelEngine, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(30):
        count, longest = random.integers(1, 6), random.integers(1, 40)
        rows = random_rows(count, seed=int(random.integers(2**32)), longest=longest)
        engine.route(rows.token, rows.length)
        single = random.integers(3, 32_000, (count, 1)).astype(np.int32)
        engine.route(single, np.ones(count, np.int32))
        same = np.full((count, longest), random.integers(3, 32_000), np.int32)
        engine.route(same, rows.length)


def test_many_batches_raise_no_alarm(tiny_model: LoadedModel) -> None:
    raise_no_alarm(ModelEngine(tiny_model), seed=1)


def test_many_batches_raise_no_alarm_in_bfloat16(halved: LoadedModel) -> None:
    raise_no_alarm(ModelEngine(halved), seed=2)


def test_a_near_tie_that_falls_the_other_way_when_asked_again_is_no_alarm_though_every_token_has_it(
    tiny_model: LoadedModel,
) -> None:
    """One repeated token, and a product whose last bit depends on its number of rows, as on GPUs."""
    engine, gate = ModelEngine(tiny_model), tiny_model.routers[3]
    token = np.full((8, POSITIONS), 1234, np.int32)
    length = np.full(8, POSITIONS)
    expert = engine.route(token, length)["expert"]
    assert token.size > SAMPLE
    kept, second = gate.weight.clone(), int(expert[0, 0, 3, 1])
    twin = next(number for number in range(8) if number not in expert[0, 0, 3])
    original = type(gate).forward

    def forward(hidden: torch.Tensor) -> Any:
        with torch.inference_mode():
            gate.weight[twin] = gate.weight[second] * (1 + (1e-4 if len(hidden.reshape(-1, 64)) > SAMPLE else -1e-4))
        return original(gate, hidden)

    gate.forward = forward
    try:
        main = engine.route(token, length)["expert"]
        sample = engine.route(token[:2], length[:2])["expert"]
    finally:
        del gate.forward
        gate.weight.data = kept
    assert sorted({int(main[0, 0, 3, 1]), int(sample[0, 0, 3, 1])}) == sorted((second, twin)), "it did not flip"


@pytest.mark.parametrize(("experts", "k", "scale"), [(64, 8, 1 / 64), (8, 2, 1.0), (128, 8, 1.0)])
@pytest.mark.parametrize("sharp", [False, True])
def test_an_earlier_batch_is_found_whatever_the_size_of_the_weights(
    experts: int, k: int, scale: float, sharp: bool
) -> None:
    """Weights near 1/64 (many experts, not renormalized), and one choice that takes nearly all."""

    class Router(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.matrix = torch.randn(experts, 16, generator=torch.Generator().manual_seed(seed)) * (
                3 if sharp else 0.3
            )

        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = hidden @ self.matrix.T
            values, indices = logits.softmax(-1).topk(k)
            return logits, values * scale, indices

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.randn(500, 16, generator=torch.Generator().manual_seed(9))
            self.first, self.second = Router(1), Router(2)

        def forward(self, input_ids: torch.Tensor, **_: object) -> None:
            hidden = self.embedding[input_ids].reshape(-1, 16)
            self.first(hidden)
            self.second(hidden)

    model = Model()
    recorder = RouteRecorder({0: model.first, 1: model.second}, experts, k)
    random = np.random.default_rng(0)
    length = np.full(8, 32)
    stale: list[Any] = []
    with recorder.attached():
        for batch in range(12):
            token = torch.from_numpy(random.integers(0, 500, (8, 32)))
            faults = recorder.record(model, token, length).faults
            assert all((first == -1).all() for first in faults.values()), "a false alarm"
            keep = recorder._choices[0]
            if stale:
                recorder._choices[0] = stale
                faults = recorder._checked(torch.arange(256)).faults
                assert faults[OTHERS][0] >= 0, f"the batch before passed for batch {batch}"
            stale = keep


def test_what_did_not_fit_is_let_go_before_the_engine_says_so(tiny_model: LoadedModel) -> None:
    """A traceback holds allocated memory; torch and contextlib create cycles of tracebacks, which wait for the
    collector."""
    engine, rows, allocated = ModelEngine(tiny_model), random_rows(4), []

    def forward(**_: Any) -> None:
        hidden = torch.ones(8)
        allocated.append(weakref.ref(hidden))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 MiB")

    engine.forward = forward
    with pytest.raises(OutOfMemory, match=r"^CUDA out of memory$") as error:
        engine.start(rows.token, rows.length)
    assert [hidden() for hidden in allocated] == [None], error
