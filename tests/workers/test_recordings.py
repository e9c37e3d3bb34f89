"""Other recordings are those of a plain transformers forward pass; otherwise the shard stops with an error."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_families import EXPERTS, FAMILIES, FLOAT16_STEP, NEAR_TIE, VOCABULARY, Family, checkpoint_of
from test_loading import dequantized_reference
from test_recorder import POSITIONS, planned, random_rows

from store import Layout
from workers.engine import ModelEngine, load_engine
from workers.models.head import Head
from workers.models.loading import LoadedModel, load_model
from workers.models.transformation import router_dtype, transformation_of
from workers.record import Recorded, what_to_record
from workers.recorder import rounded
from workers.recordings import logits, logprobs, norms
from workers.recordings.chosen import recordings_of
from workers.shard import RoutingError, capture_shard

ALL = what_to_record(["logits", "output_norm", "logprob"], EXPERTS, "float32")
LENGTHS = np.array([24, 1, 17, 9, 2])
TRANSFORMATIONS = {
    "mixtral": "renormalized", "qwen3_moe": "renormalized", "qwen2_moe": "softmax", "olmoe": "softmax",
    "deepseek_v3": "sigmoid", "glm4_moe": "sigmoid", "gpt_oss": "renormalized", "granitemoe": "renormalized",
    "phimoe": "unknown", "deepseek_v2": "softmax",
}  # fmt: skip

Arrays = dict[str, np.ndarray]


# --- An independent reference: transformers' own modules, in float32, each row alone ----------------------------------


def expert_output(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """One expert for some tokens, from its matrices, by the formulas of the papers, in float64."""
    both, down = experts.gate_up_proj[expert].double(), experts.down_proj[expert].double()
    if not hasattr(experts, "gate_up_proj_bias"):
        gate, up = (hidden.double() @ both.T).chunk(2, dim=-1)
        return (gate * gate.sigmoid() * up) @ down.T
    mixed = hidden.double() @ both + experts.gate_up_proj_bias[expert].double()  # gpt-oss, from its model card
    gate, up = mixed[..., ::2].clamp(max=7), mixed[..., 1::2].clamp(-7, 7)
    return ((up + 1) * gate * (1.702 * gate).sigmoid()) @ down + experts.down_proj_bias[expert].double()


@torch.inference_mode()
def reference(stock: Any, family: Family, causal: Any, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits (T, L, E), norms of every expert's output (T, L, E), and log-probabilities (T - 1,) of one row."""
    logit, norm = [], []
    handles = []
    for layer in family.layers:
        router = stock.layers[layer].get_submodule(family.router)
        block = stock.layers[layer].get_submodule(family.router.rpartition(".")[0])

        def keep(module: Any, inputs: Any, output: Any, experts: Any = block.experts) -> None:
            hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
            product = hidden.double() @ module.weight.double().T
            bias = getattr(module, "bias", None)
            logit.append((product if bias is None else product + bias.double()).numpy())
            norm.append(np.stack([expert_output(experts, e, hidden).norm(dim=-1).numpy() for e in range(EXPERTS)], -1))

        handles.append(router.register_forward_hook(keep))
    ids = torch.from_numpy(row.astype(np.int64))[None]
    logprob = causal(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    return np.stack(logit, 1), np.stack(norm, 1), logprob[:-1].gather(-1, ids[0, 1:, None])[:, 0].numpy()


def causal_over(stock: Any, folder: Path) -> Any:
    """transformers' own model with its head, on top of the given one."""
    causal = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    setattr(causal, causal.base_model_prefix, stock)
    return causal.eval()


def random_tokens() -> np.ndarray:
    token = np.random.default_rng(1).integers(3, VOCABULARY, (len(LENGTHS), LENGTHS.max())).astype(np.int32)
    token[np.arange(LENGTHS.max()) >= LENGTHS[:, None]] = -1
    return token


def recorded(folder: Path, quantization: str, asked: Recorded = ALL) -> Arrays:
    engine = load_engine(folder, quantization=quantization, device="cpu", recorded=asked)
    return dict(engine.route(random_tokens(), LENGTHS))


CHANGES = {"granitemoe": {"logits_scaling": 3.0, "tie_word_embeddings": True}, "phimoe": {"lm_head_bias": True}}


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_records_is_what_its_plain_forward_computes(name: str, quantization: str, tmp_path: Path) -> None:
    family, folder = FAMILIES[name], checkpoint_of(name, tmp_path, **CHANGES.get(name, {}))
    stock = dequantized_reference(folder, "nf4") if quantization == "nf4" else None
    stock = stock or transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    causal, token, found = causal_over(stock, folder), random_tokens(), recorded(folder, quantization)
    assert {name: (part.dtype, part.shape[2:]) for name, part in found.items() if name not in ("expert", "weight")} == {
        "logit": (np.float32, (len(family.layers), EXPERTS)),
        "output_norm": (np.float32, found["expert"].shape[2:]),
        "logprob": (np.float32, ()),
    }
    for row, size in enumerate(LENGTHS):
        logit, norm, logprob = reference(stock, family, causal, token[row, :size])
        np.testing.assert_allclose(found["logit"][row, :size], logit, rtol=1e-4, atol=1e-4)
        chosen = np.take_along_axis(norm, found["expert"][row, :size].astype(int), axis=-1)
        np.testing.assert_allclose(found["output_norm"][row, :size], chosen, rtol=1e-3)
        np.testing.assert_allclose(found["logprob"][row, : size - 1], logprob, rtol=1e-4, atol=1e-4)
        assert np.isnan(found["logprob"][row, size - 1 :]).all(), "a prediction where no token follows"


@pytest.mark.parametrize("top", [None, 6])
@pytest.mark.parametrize("name", FAMILIES)
def test_stored_logits_give_the_stored_choices_and_weights_by_the_family_s_published_rule(
    name: str, top: int | None, tmp_path: Path
) -> None:
    family, folder = FAMILIES[name], checkpoint_of(name, tmp_path)
    loaded = load_model(folder, quantization="none", device="cpu")
    asked = what_to_record(["logits"], EXPERTS, "float32", top_logits=top)
    found = ModelEngine(loaded, asked).route(random_tokens(), LENGTHS)
    filled = np.arange(LENGTHS.max()) < LENGTHS[:, None]
    expert, weight, logit = (found[each][filled] for each in ("expert", "weight", "logit"))
    if top is None:
        assert "logit_expert" not in found
    else:
        assert (logit.shape[-1], found["logit_expert"].dtype) == (top, np.uint8)
        assert (np.diff(logit, axis=-1) <= 0).all(), "the largest come first"
        whole = ModelEngine(loaded, ALL).route(random_tokens(), LENGTHS)["logit"][filled]
        ids = found["logit_expert"][filled].astype(int)
        np.testing.assert_array_equal(np.take_along_axis(whole, ids, -1), logit)
        np.testing.assert_array_equal(ids, np.argsort(-whole, axis=-1, kind="stable")[..., :top])
        logit = whole
    for index, layer in enumerate(family.layers):
        router = loaded.model.layers[layer].get_submodule(family.router)  # type: ignore[operator, union-attr, index]
        correction = getattr(router, "e_score_correction_bias", torch.zeros(EXPERTS)).double().numpy()
        rows = logit[:, index].astype(float)
        wanted, clear = family.rule(rows, correction, family.settings["num_experts_per_tok"])
        got = np.zeros_like(wanted)
        np.put_along_axis(got, expert[:, index].astype(int), weight[:, index], axis=-1)
        sure = clear > NEAR_TIE
        assert sure.mean() > 0.95
        np.testing.assert_allclose(got[sure], wanted[sure], rtol=FLOAT16_STEP, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_which_transformation_gives_a_family_s_weights_is_found_without_its_weights(name: str, tmp_path: Path) -> None:
    assert transformation_of(checkpoint_of(name, tmp_path)) == TRANSFORMATIONS[name]


def test_choices_and_weights_are_the_same_to_the_bit_with_and_without_what_is_recorded(tiny_model: LoadedModel) -> None:
    token, length = random_rows(12).token, random_rows(12).length
    without, found = ModelEngine(tiny_model).route(token, length), ModelEngine(tiny_model, ALL).route(token, length)
    ModelEngine(tiny_model)  # leaves nothing behind in the model
    filled = np.arange(POSITIONS) < length[:, None]
    for name in ("expert", "weight"):
        np.testing.assert_array_equal(without[name][filled], found[name][filled])


def test_where_no_token_follows_another_there_is_no_log_probability(tiny_model: LoadedModel) -> None:
    found = ModelEngine(tiny_model, ALL).route(np.array([[5], [7]], np.int32), np.array([1, 1]))
    assert np.isnan(found["logprob"]).all()
    assert np.isfinite(found["output_norm"]).all()


def test_no_array_of_tokens_by_vocabulary_is_made(tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, rows, sizes = ModelEngine(tiny_model, ALL), random_rows(12), []
    head = engine.recorder.recordings[-2].head  # type: ignore[attr-defined]
    whole = engine.route(rows.token, rows.length)["logprob"]
    original = head.logits
    monkeypatch.setattr(head, "rows", 7)
    monkeypatch.setattr(head, "logits", lambda hidden: (sizes.append(len(hidden)), original(hidden))[1])
    found = engine.route(rows.token, rows.length)["logprob"]
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-4)
    assert max(sizes[:-1]) <= 7
    assert sum(sizes[:-1]) == (rows.length - 1).sum(), "each prediction once, and none of padding"


# --- The proof ------------------------------------------------------------------------------------------------------


def altered(module: Any, name: str, change: Callable[[torch.Tensor, list[Any]], torch.Tensor]) -> Any:
    """A function whose result is changed; the list holds the state of the change."""

    def plant(monkeypatch: pytest.MonkeyPatch, engine: ModelEngine) -> None:
        kept: list[Any] = []
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: change(original(*arguments), kept))

    return plant


def by_one_token(found: torch.Tensor, kept: list[Any]) -> torch.Tensor:
    return found.roll(1, dims=0)


def of_a_call_before(found: torch.Tensor, kept: list[Any], back: int = 1) -> torch.Tensor:
    """The result of an earlier call with the same shape, a number of calls ago."""
    kept.append(found)
    alike = [each for each in kept if each.shape == found.shape]
    return alike[-1 - back] if len(alike) > back else found


def among_layers(kind: str, shift: Callable[[list[Any]], list[Any]]) -> Any:
    """The kept values of layers are stored in each other's place."""

    def plant(monkeypatch: pytest.MonkeyPatch, engine: ModelEngine) -> None:
        [recording] = [each for each in engine.recorder.recordings if type(each).__name__ == kind]
        original = recording.doubts

        def doubts(chosen: Any) -> Any:
            if kind == "RouterLogits":
                recording._values_TLM = torch.stack(shift(list(recording._values_TLM.unbind(1))), 1)  # type: ignore[attr-defined]
            else:
                order = sorted(recording._norms)  # type: ignore[attr-defined]
                recording._norms = dict(zip(order, shift([recording._norms[at] for at in order]), strict=True))  # type: ignore[attr-defined]
            return original(chosen)

        monkeypatch.setattr(recording, "doubts", doubts)

    return plant


def probabilities(monkeypatch: pytest.MonkeyPatch, engine: ModelEngine) -> None:
    """As in transformers#45120: the router always returns a softmax under the name of logits."""
    for layer in engine.layers:
        gate = engine.model.layers[layer].mlp.gate  # type: ignore[operator, union-attr, index]
        original = gate.forward
        monkeypatch.setattr(gate, "forward", lambda hidden, original=original: _softened(original(hidden)))


def _softened(output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return output[0].softmax(-1), *output[1:]


def ids_of_the_token_before(monkeypatch: pytest.MonkeyPatch, engine: ModelEngine) -> None:
    """The experts of the largest logits, not the logits."""
    recording, _ = engine.recorder.recordings
    original = recording.doubts

    def doubts(chosen: Any) -> Any:
        recording._ids_TLM = recording._ids_TLM.roll(1, dims=0)  # type: ignore[attr-defined]
        return original(chosen)

    monkeypatch.setattr(recording, "doubts", doubts)


LAYER_ON = partial(lambda parts: [parts[-1], *parts[:-1]])
PLANTED: dict[str, tuple[str, Any, str]] = {
    "logits of the token before": ("logits", altered(logits, "router_logits", by_one_token), logits.OTHERS),
    "logits of the layer before": ("logits", among_layers("RouterLogits", LAYER_ON), logits.OTHERS),
    "logits of the batch before": (
        "logits", altered(logits, "router_logits", partial(of_a_call_before, back=8)), logits.OTHERS),
    "experts of the largest logits of the token before": ("logits", ids_of_the_token_before, logits.OTHERS),
    "probabilities for logits": ("logits", probabilities, logits.NO_LOGITS),
    "norms of the token before": ("output_norm", altered(norms, "row_norms", by_one_token), norms.OTHERS),
    "norms of the layer before": ("output_norm", among_layers("OutputNorms", LAYER_ON), norms.OTHERS),
    "norms of the batch before": (
        "output_norm", altered(norms, "row_norms", partial(of_a_call_before, back=8)), norms.OTHERS),
    "log-probabilities of the token before": ("logprob", altered(Head, "logprobs", by_one_token), logprobs.OTHERS),
    "log-probabilities of the batch before": ("logprob", altered(Head, "logprobs", of_a_call_before), logprobs.OTHERS),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_what_lies_beside_its_place_stops_the_shard(
    tiny_model: LoadedModel, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, plant, message = PLANTED[fault]
    asked = what_to_record([name], 8, "float32", top_logits=3 if "largest" in fault else None)
    engine, rows = ModelEngine(tiny_model, asked), random_rows(16, seed=1)
    rows.length[:] = POSITIONS  # both shards are micro-batches of one shape
    rows.token[rows.token == -1] = 7
    group = planned(engine, tmp_path / "s.zarr", rows, rows_per_shard=8, recorded=asked)
    capture_shard(group, 0, group.read_rows(0), engine, batch_tokens=8 * POSITIONS)()
    with monkeypatch.context() as patch:
        plant(patch, engine)
        if "batch" in fault:
            capture_shard(group, 0, group.read_rows(0), engine, batch_tokens=8 * POSITIONS)()
        with pytest.raises(RoutingError, match=f"^shard 1 of broken: layer [07]: {message}, first seen at position"):
            capture_shard(group, 1, group.read_rows(1), engine, batch_tokens=8 * POSITIONS)()
    capture_shard(group, 1, group.read_rows(1), engine, batch_tokens=8 * POSITIONS)()


def test_a_router_that_makes_its_choices_of_another_product_cannot_be_proved(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, rows = ModelEngine(tiny_model, what_to_record(["logits"], 8, "float32")), random_rows(2)
    gate: Any = next(iter(tiny_model.routers.values()))
    original = gate.forward
    monkeypatch.setattr(
        gate, "forward", lambda hidden: (torch.nn.functional.linear(hidden, gate.weight), original(hidden))[1]
    )
    with pytest.raises(RoutingError, match="MixtralTopKRouter computes 2 linear products instead of 1"):
        engine.route(rows.token, rows.length)


# --- The precision of weights ---------------------------------------------------------------------------------------


def test_weights_are_rounded_to_so_many_bits_ties_to_even() -> None:
    weight = np.random.default_rng(0).random(4000).astype(np.float32)
    weight[:4] = [1.0, 0.5 + 2**-7, 0.5 + 3 * 2**-7, 0.0]  # two ties with 5 bits
    found = rounded(torch.from_numpy(weight), 5).numpy()
    assert found.dtype == np.float16
    fraction, exponent = np.frexp(weight.astype(np.float64))
    np.testing.assert_array_equal(found, np.ldexp(np.rint(fraction * 2**6) / 2**6, exponent))  # rint: ties to even
    np.testing.assert_array_equal(rounded(torch.from_numpy(weight), 10).numpy(), weight.astype(np.float16))
    np.testing.assert_array_equal(rounded(torch.from_numpy(weight), 23).numpy(), weight)


@pytest.mark.parametrize(
    ("precision", "dtype", "bits"),
    [("float16", "bfloat16", 10), ("float32", "bfloat16", 23), ("compact", "bfloat16", 5), ("compact", "float16", 8),
     ("compact", "float32", 10)],
)  # fmt: skip
def test_compact_keeps_what_the_router_s_dtype_can_mean(precision: str, dtype: str, bits: int) -> None:
    assert what_to_record([], 8, dtype, weight_precision=precision).weight_bits == bits


@pytest.mark.parametrize(
    ("name", "wanted"), [("mixtral", "bfloat16"), ("deepseek_v2", "float32"), ("glm4_moe", "float32")]
)
def test_routers_that_compute_in_float32_in_any_dtype_are_found_without_weights(
    name: str, wanted: str, tmp_path: Path
) -> None:
    folder = checkpoint_of(name, tmp_path)
    assert router_dtype(folder, None, torch.bfloat16) == wanted
    loaded = load_model(folder, quantization="none", device="cpu", dtype="bfloat16")
    token = torch.arange(8)[None]
    kept: list[torch.Tensor] = []
    handle = next(iter(loaded.routers.values())).register_forward_hook(lambda *found: kept.append(found[2][0]))
    loaded.model(input_ids=token)
    handle.remove()
    rounded_again = kept[0].float().bfloat16().float()
    assert torch.equal(rounded_again, kept[0].float()) == (wanted == "bfloat16")


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["mood"], {}, "'mood' cannot be recorded; choose from logits, output_norm, logprob"),
        (["logprob"], {"top_logits": 4}, "no logits are recorded: add --record logits"),
        (["logits"], {"top_logits": 9}, "--top_logits is 9, but must be 1 to 8"),
        ([], {"weight_precision": "int8"}, "weight_precision 'int8' is none of float16, float32, compact"),
    ],
)
def test_what_cannot_be_recorded_is_refused(names: list[str], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        what_to_record(names, 8, "float32", **options)


@pytest.mark.parametrize(("experts", "top", "kept"), [(64, None, 0), (65, None, 32), (128, 16, 16), (64, 64, 0)])
def test_all_logits_of_up_to_64_experts_are_kept_and_32_of_more(experts: int, top: int | None, kept: int) -> None:
    asked = what_to_record(["logits"], experts, "float32", top_logits=top)
    assert (asked.top_logits, "logit_expert" in asked.record) == (kept, kept > 0)


def test_a_token_of_mixtral_takes_75_bytes_where_weights_are_compact() -> None:
    """32 layers, 8 experts, random logits in bfloat16 whose routes take the same space in float16 as captured ones, 95
    to 100."""
    rows, positions, layers = 8, 512, 32
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.standard_normal((rows, positions, layers, 8)).astype(np.float32)).bfloat16()
    largest = logits.float().topk(2, dim=-1)
    weight, taken = largest.values.softmax(-1), {}
    for precision in ("float16", "compact"):
        asked = what_to_record([], 8, "bfloat16", weight_precision=precision)
        layout = Layout(
            sequence_length=positions, rows_per_shard=rows, layers=tuple(range(layers)), num_experts=8,
            experts_per_token=2, vocab_size=32_000, weight_bits=asked.weight_bits,
        )  # fmt: skip
        arrays = layout.arrays()
        token = random.integers(0, 32_000, (rows, positions)).astype(np.int32)
        values = {
            "expert": largest.indices.numpy().astype(np.uint8),
            "weight": rounded(weight, asked.weight_bits).numpy(),
            "token": token,
        }
        taken[precision] = sum(len(arrays[name].encode(part)) for name, part in values.items()) / token.size
    assert 95 < taken["float16"] < 100
    assert taken["compact"] <= 75


def test_experts_that_older_versions_computed_one_by_one_are_recorded_too(tmp_path: Path) -> None:
    folder = checkpoint_of("mixtral", tmp_path)
    unfused = load_model(folder, quantization="nf4", device="cpu", expert_backend="unfused")
    found, wanted = ModelEngine(unfused, ALL).route(random_tokens(), LENGTHS), recorded(folder, "nf4")
    filled = np.arange(LENGTHS.max()) < LENGTHS[:, None]
    for name in ALL.record:
        np.testing.assert_allclose(found[name][filled], wanted[name][filled], rtol=1e-3, atol=1e-4)


def test_a_checkpoint_without_its_head_or_with_a_quantized_one_is_refused_by_name(tmp_path: Path) -> None:
    folder = checkpoint_of("mixtral", tmp_path)
    loaded = load_model(folder, quantization="none", device="cpu")
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no lm_head\.weight, which --record logprob needs"):
        ModelEngine(loaded, ALL)
    scaled = {"lm_head.weight": head, "lm_head.weight_scale": torch.ones(1)}
    save_file(tensors | scaled, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has a quantized head \(lm_head\.weight_scale\)"):
        ModelEngine(loaded, ALL)
    save_file(tensors | {"lm_head.weight": head[:-1]}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"has lm_head\.weight of torch\.float32 \(127, 64\), but --record logprob needs floats of \(128, 64\)",
    ):
        ModelEngine(loaded, ALL)


def test_a_model_whose_final_norm_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    loaded: Any = SimpleNamespace(model=torch.nn.Linear(1, 1), folder=tmp_path)
    with pytest.raises(ValueError, match="Linear has no final norm"):
        recordings_of(loaded, loaded.model, Recorded(record=("logprob",)), 2)
