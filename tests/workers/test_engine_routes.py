"""Routes in each engine's format are read exactly and in pieces, and faults are named."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_forms import CHOICES, EXPERTS, FORMS, LAYERS, lines, npy, sequences
from safetensors.numpy import save_file

from store import open_capture, write_capture
from store.layout import missing_expert
from workers.imports.blocks import Grid, blocks, shape_of, slots_of, tokenized
from workers.imports.files import json_lines, rows_of, shapes_of
from workers.imports.formats import FORMATS
from workers.imports.sequence import Asked, Routed, phases


def imported(path: Path, name: str, **asked: Any) -> list[Routed]:
    return [tokenized(one, None) for one in FORMATS[name].read(path, Asked(experts_per_token=CHOICES, **asked))]


@pytest.mark.parametrize("form", FORMS)
def test_each_form_gives_the_tokens_routes_and_phases_that_the_engine_returned(form: str, tmp_path: Path) -> None:
    name, write = FORMS[form]
    made = sequences()
    found = imported(write(tmp_path, made), name)
    assert len(found) == len(made)
    for number, (routed, one) in enumerate(zip(found, made, strict=True)):
        both = np.concatenate([one["prompt"], one["completion"]])
        assert routed.token is not None
        assert routed.token.tolist() == both.tolist()
        known = routed.expert[(routed.expert >= 0).all((1, 2))]
        assert known.tolist() == one["expert"][routed.start :].tolist()
        assert (phases(routed) == (np.arange(len(both)) >= len(one["prompt"]))).all()
        if routed.weight is not None:
            np.testing.assert_array_equal(routed.weight[: len(known)], one["weight"])
        if "npz" not in form and "offline" not in form:
            assert routed.name == f"r{number}"


@pytest.mark.parametrize("form", FORMS)
def test_what_is_imported_is_a_capture_with_the_fill_value_where_nothing_is_known(form: str, tmp_path: Path) -> None:
    name, write = FORMS[form]
    made = sequences(number=7)
    path = write(tmp_path, made)
    read = lambda: (tokenized(one, None) for one in FORMATS[name].read(path, Asked(experts_per_token=CHOICES)))
    shape = shape_of(read(), None)
    assert (shape.positions, shape.layers, shape.choices, shape.phases) == (16, LAYERS, CHOICES, True)
    grid = Grid(positions=4, layers=(0, 1, 2), missing_expert=missing_expert(EXPERTS))  # four: documents of many rows
    given = blocks(read(), shape, grid)
    write_capture(tmp_path / "s.zarr", "d", blocks=given, num_experts=EXPERTS, layers=(0, 1, 2), rows_per_shard=8)
    found = open_capture(tmp_path / "s.zarr", "d").load()
    assert found["name"].values.tolist() == [one.name for one in read()]
    assert ("weight" in found) is shape.weights
    for document, (one, routed) in enumerate(zip(made, read(), strict=True)):
        own = found.isel(doc=found["document_id"].values == document)
        filled = np.arange(4) < own["length"].values[:, None]
        both = np.concatenate([one["prompt"], one["completion"]])
        assert own["token"].values[filled].tolist() == both.tolist()
        assert own["phase"].values[filled].tolist() == (np.arange(len(both)) >= len(one["prompt"])).tolist()
        assert (own["phase"].values[~filled] == 255).all()
        expert = own["expert"].values[filled]
        assert expert[routed.start : -1].tolist() == one["expert"][routed.start :].tolist()
        assert (expert[: routed.start] == 255).all()
        assert (expert[-1] == 255).all()
        if shape.weights:
            np.testing.assert_array_equal(own["weight"].values[filled][:-1], one["weight"].astype(np.float16))


@pytest.mark.parametrize(("suffix", "batched"), [("safetensors", False), ("npz", True)])
def test_router_logits_become_the_choices_and_weights_of_the_router(tmp_path: Path, suffix: str, batched: bool) -> None:
    import torch
    from transformers import MixtralConfig, MixtralModel

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=EXPERTS, num_experts_per_tok=CHOICES,
    )  # fmt: skip
    model = MixtralModel(config).eval()
    ids = torch.randint(1, 50, (11, 6))
    mask = torch.ones_like(ids)
    mask[3, :2] = 0  # padded on the left
    routers = [layer.mlp.gate for layer in model.layers]
    kept: list[Any] = []
    for router in routers:
        router.register_forward_hook(lambda module, args, out: kept.append(out[1:]))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
    shape = (11, 6, EXPERTS) if batched else (66, EXPERTS)
    arrays = {f"router_logits.{i}": layer.reshape(shape).numpy() for i, layer in enumerate(logits)}
    arrays |= {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    path = tmp_path / f"logits.{suffix}"
    save_file(arrays, path) if suffix == "safetensors" else np.savez(path, **arrays)
    found = imported(path, "transformers", weights="renormalized")
    assert [len(one.expert) for one in found] == [6, 6, 6, 4] + [6] * 7
    for row, routed in enumerate(found):
        own = mask[row].bool()
        for layer, (weight, expert) in enumerate(kept):
            assert routed.expert[:, layer].tolist() == expert.reshape(11, 6, -1)[row][own].tolist()
            assert routed.weight is not None
            np.testing.assert_allclose(routed.weight[:, layer], weight.reshape(11, 6, -1)[row][own], rtol=1e-6)
    probabilities = {f"router_logits.{i}": layer.softmax(-1).reshape(shape).numpy() for i, layer in enumerate(logits)}
    np.savez(tmp_path / "p.npz", **arrays | probabilities)  # transformers#45120
    for one, other in zip(imported(tmp_path / "p.npz", "transformers", weights="softmax"), found, strict=True):
        assert one.expert.tolist() == other.expert.tolist()
        assert one.weight is not None
        assert other.weight is not None
        np.testing.assert_allclose(one.weight / one.weight.sum(-1, keepdims=True), other.weight, rtol=1e-5)


def test_lines_of_olmoes_scripts_have_their_last_axes_turned(tmp_path: Path) -> None:
    made = sequences(last=True)
    rows = []
    for one in made:
        ids = np.concatenate([one["prompt"], one["completion"]]).tolist()
        rows.append(
            {"input_ids": ids, "predicted_token_ids": ids, "exp_ids": one["expert"].transpose(0, 2, 1).tolist()}
        )
    found = imported(lines(tmp_path / "c4_results.jsonl", rows), "olmoe")
    assert [routed.expert.tolist() for routed in found] == [one["expert"].tolist() for one in made]


def test_texts_are_tokenized_and_must_give_as_many_tokens_as_there_are_routes(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "3 1 4", "expert": [[[0, 1]]] * 2}])
    [routed] = FORMATS["plain"].read(path, Asked())
    tokenize = lambda text: np.array([int(word) for word in text.split()])
    found = tokenized(routed, tokenize)
    assert found.token is not None
    assert found.token.tolist() == [3, 1, 4]
    with pytest.raises(ValueError, match="has 5 tokens, but routes of 2 from token 0 on"):
        tokenized(routed, lambda text: np.arange(5))


def test_layers_without_experts_are_left_out() -> None:
    assert slots_of(3, [1, 2, 5]).tolist() == [0, 1, 2]
    assert slots_of(6, [1, 2, 5]).tolist() == [1, 2, 5]
    with pytest.raises(ValueError, match="routes have 4 layers, but the model has experts at 3, numbered 1 to 5"):
        slots_of(4, [1, 2, 5])


def test_choices_are_put_in_the_order_of_their_weights_with_ties_to_the_lower_id() -> None:
    expert = np.array([[[3, 1, 2]], [[0, 5, 4]]])
    weight = np.array([[[0.25, 0.5, 0.25]], [[0.5, 0.3, 0.2]]], np.float32)
    routed = Routed(name="a", token=np.array([1, 2]), expert=expert, weight=weight)
    grid = Grid(positions=4, layers=(0,), missing_expert=255)
    [block] = blocks([routed], shape_of([routed], None), grid)
    assert block["expert"][0, :2, 0].tolist() == [[1, 2, 3], [0, 5, 4]]
    np.testing.assert_allclose(block["weight"][0, :2, 0], [[0.5, 0.25, 0.25], [0.5, 0.3, 0.2]])


def with_routes(**changes: Any) -> dict[str, Any]:
    return {"token": [1, 2, 3], "expert": [[[0, 1]]] * 3} | changes


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (with_routes(expert=[[[0, 1]]]), "has 3 tokens, but routes of 1 from token 0 on"),
        (with_routes(expert=[[0, 1]] * 3), r"experts \(3, 2\), but"),
        (with_routes(expert=[[[0, 1]], [[0]], [[0, 1]]]), "unequal lengths"),
        (with_routes(expert=[[[0.5, 1]]] * 3), "must be integers"),
        (with_routes(weight=[[[0.5]]] * 3), r"weights of the shape \(3, 1, 1\)"),
        (with_routes(phase=["prompt", "reply", "generated"]), "'reply', but must hold prompt or generated"),
        (with_routes(phase=[0, 1]), "phases of the shape"),
        (with_routes(phase=4), "a prompt of 4 tokens, but only 3 tokens in all"),
        (with_routes(tokens=[1]), "has 'tokens'; the plain form knows"),
        ({"token": [1]}, "has token: expert, and token or text, are needed"),
        ({"text": "a", "expert": [[[0]]]}, "give --tokenizer"),
        ([1], "holds a JSON list"),
    ],
)
def test_what_does_not_fit_is_named_with_both_numbers(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imported(lines(tmp_path / "a.jsonl", [record]), "plain")


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        (
            "vllm",
            {"choices": [{"token_ids": [1], "routed_experts": "AAAA"}], "prompt_token_ids": [1]},
            "not an array in ba",
        ),
        ("vllm", {"choices": [{"token_ids": [1]}], "prompt_token_ids": [1]}, "start vLLM with enable_return_routed"),
        ("vllm", {"choices": [{"routed_experts": npy(np.zeros((1, 1, 1), np.uint8))}]}, "return_token_ids"),
        ("vllm", {"text": "a"}, "has no choices"),
        ("sglang", {"output_ids": [1], "prompt_token_ids": [1], "meta_info": {}}, "--enable-return-routed-experts"),
        (
            "sglang",
            {"output_ids": [1], "prompt_token_ids": [1, 2], "meta_info": {"routed_experts": "AAAAAA=="}},
            "1 ids cannot be divided among 2 tokens with 2 experts",
        ),
        (
            "sglang",
            {"output_ids": [1], "input_ids": [1], "meta_info": {"routed_experts": "AA==", "routed_experts_dtype": "x"}},
            "routed_experts_dtype is 'x'",
        ),
        ("olmoe", {"input_ids": [1]}, "has no exp_ids; it has input_ids"),
        ("replay", {"tokens": [1]}, "is not a line of a replay"),
    ],
)
def test_a_response_that_lacks_something_says_how_to_get_it(
    tmp_path: Path, name: str, record: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        imported(lines(tmp_path / "a.jsonl", [record]), name)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (print, ("unpickled",))

    objects = np.array([Bomb()], dtype=object)
    np.savez(tmp_path / "a.npz", token=objects, expert=objects, input_ids=objects, **{"0.token_ids": objects})
    for name in ("plain", "vllm", "transformers"):
        with pytest.raises(ValueError, match=r"object|pickle"):
            imported(tmp_path / "a.npz", name)


def test_a_token_of_which_some_experts_are_known_is_refused_and_one_of_none_is_unknown() -> None:
    grid = Grid(positions=4, layers=(0,), missing_expert=255)
    unknown = Routed(name="a", token=np.array([1, 2]), expert=np.array([[[-1, -1]], [[0, 1]]]))
    [block] = blocks([unknown], shape_of([unknown], None), grid)
    assert block["expert"][0, :2, 0].tolist() == [[255, 255], [0, 1]]
    torn = Routed(name="a", token=np.array([1, 2]), expert=np.array([[[-1, 3]], [[0, 1]]]))
    with pytest.raises(ValueError, match="knows only some of a token's experts"):
        list(blocks([torn], shape_of([torn], None), grid))


def test_a_sequence_of_another_shape_than_the_first_is_named() -> None:
    one = Routed(name="a", token=np.array([1]), expert=np.zeros((1, 3, 2), int))
    other = Routed(name="b", token=np.array([1]), expert=np.zeros((1, 3, 1), int))
    grid = Grid(positions=4, layers=(0, 1, 2), missing_expert=255)
    with pytest.raises(
        ValueError,
        match="sequence b has 3 layers, 1 experts per token and no weights; the sequences before it have 3, 2",
    ):
        list(blocks([one, other], shape_of([one], None), grid))


def test_files_are_read_in_pieces(tmp_path: Path) -> None:
    """Sixteen megabytes of routes, read with the memory of one sequence and one piece."""
    expert = np.zeros((256, 1024, 32, 2), np.uint8)
    np.savez(tmp_path / "a.npz", token=np.zeros((256, 1024), np.int32), expert=expert)
    assert shapes_of(tmp_path / "a.npz")["expert"] == expert.shape
    del expert
    tracemalloc.start()
    total = sum(len(part) for part in rows_of(tmp_path / "a.npz", "expert", 8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == 256
    assert peak < 4_000_000
    with pytest.raises(ValueError, match="has no array weight"):
        next(rows_of(tmp_path / "a.npz", "weight", 1))


def test_empty_lines_are_passed_over_and_what_is_no_json_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"b": 2}\n{')
    found: Iterator[Any] = json_lines(tmp_path / "a.jsonl")
    assert [next(found)[1], next(found)[1]] == [{"a": 1}, {"b": 2}]
    with pytest.raises(ValueError, match="line 4 is not JSON"):
        next(found)
