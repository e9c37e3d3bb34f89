"""Routes in each engine's form are read as they were made, in pieces, and what does not fit is named."""

import base64
import io
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from store import open_capture, write_capture
from store.layout import missing_expert
from workers.imports.blocks import Grid, blocks, shape_of, slots_of, tokenized
from workers.imports.files import json_lines, rows_of, shapes_of
from workers.imports.formats import FORMATS
from workers.imports.sequence import Asked, Routed, phases

LAYERS, CHOICES, EXPERTS = 3, 2, 8


def sequences(number: int = 5, *, layers: int = LAYERS, last: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts, completions, and the experts and weights of all tokens but the last, or of all."""
    random, made = np.random.default_rng(seed), []
    for _ in range(number):
        prompt, completion = (
            random.integers(0, 50, random.integers(1, 9)),
            random.integers(0, 50, random.integers(1, 9)),
        )
        tokens = len(prompt) + len(completion) - (not last)
        expert = random.random((tokens, layers, EXPERTS)).argsort(-1)[..., :CHOICES]
        weight = -np.sort(-random.random((tokens, layers, CHOICES)).astype(np.float32))
        made.append({"prompt": prompt, "completion": completion, "expert": expert, "weight": weight})
    return made


def npy(array: np.ndarray) -> str:
    """As vLLM 0.33 has it: vllm/utils/serial_utils.py, numpy2base64."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def vllm_http(folder: Path, made: list[dict[str, Any]]) -> Path:
    """Chat completions of 0.33, with `return_token_ids`."""
    responses = []
    for number, one in enumerate(made):
        choice = {
            "index": 0,
            "token_ids": one["completion"].tolist(),
            "routed_experts": npy(one["expert"].astype("u1")),
        }
        responses.append({"id": f"r{number}", "choices": [choice], "prompt_token_ids": one["prompt"].tolist()})
    return lines(folder / "vllm.jsonl", responses)


def vllm_completions(folder: Path, made: list[dict[str, Any]]) -> Path:
    """Completions have the prompt's ids in the choice; requests that left out a part of the prompt."""
    records = []
    for number, one in enumerate(made):
        start = len(one["prompt"]) // 2
        choice = {
            "index": 0,
            "token_ids": one["completion"].tolist(),
            "prompt_token_ids": one["prompt"].tolist(),
            "routed_experts": npy(one["expert"][start:].astype("u1")),
        }
        response = {"id": f"r{number}", "choices": [choice]}
        records.append({"request": {"routed_experts_prompt_start": start}, "response": response})
    return lines(folder / "completions.jsonl", records)


def vllm_previous(folder: Path, made: list[dict[str, Any]]) -> Path:
    """0.21: nested lists, the prompt's routes apart."""
    records = []
    for number, one in enumerate(made):
        cut = len(one["prompt"])
        choice = {"token_ids": one["completion"].tolist(), "routed_experts": one["expert"][cut:].tolist() or None}
        records.append(
            {
                "id": f"r{number}",
                "choices": [choice],
                "prompt_token_ids": one["prompt"].tolist(),
                "prompt_routed_experts": one["expert"][:cut].tolist(),
            }
        )
    return lines(folder / "previous.jsonl", records)


def vllm_offline(folder: Path, made: list[dict[str, Any]]) -> Path:
    arrays = {}
    for number, one in enumerate(made):
        arrays[f"{number}.prompt_token_ids"] = one["prompt"]
        arrays[f"{number}.token_ids"] = one["completion"]
        arrays[f"{number}.routed_experts"] = one["expert"].astype(np.uint8)
    np.savez(folder / "vllm.npz", **arrays)
    return folder / "vllm.npz"


def vllm_offline_previous(folder: Path, made: list[dict[str, Any]]) -> Path:
    arrays = {}
    for number, one in enumerate(made):
        cut = len(one["prompt"])
        arrays[f"{number}.prompt_token_ids"], arrays[f"{number}.token_ids"] = one["prompt"], one["completion"]
        arrays[f"{number}.prompt_routed_experts"] = one["expert"][:cut].astype(np.int16)
        arrays[f"{number}.routed_experts"] = one["expert"][cut:].astype(np.int16)
    np.savez_compressed(folder / "previous.npz", **arrays)
    return folder / "previous.npz"


def sglang_generate(folder: Path, made: list[dict[str, Any]], tag: str | None = None) -> Path:
    """As `extract_routed_experts_from_meta_info` of sglang 0.5.23 reads it: flat int32."""
    records = []
    for number, one in enumerate(made):
        data = one["expert"].astype("<i4" if tag is None else np.dtype(tag)).tobytes()
        meta = {"id": f"r{number}", "routed_experts": base64.b64encode(data).decode()}
        meta |= {} if tag is None else {"routed_experts_dtype": tag}
        output = {"output_ids": one["completion"].tolist(), "meta_info": meta}
        records.append(output | {"prompt_token_ids": one["prompt"].tolist()})
    return lines(folder / f"sglang-{tag}.jsonl", records)


def sglang_tagged(folder: Path, made: list[dict[str, Any]]) -> Path:
    return sglang_generate(folder, made, "uint8")


def sglang_openai(folder: Path, made: list[dict[str, Any]]) -> Path:
    """With `sgl_ext`, and routes from a start on, which only the request says."""
    records = []
    for number, one in enumerate(made):
        start = len(one["prompt"]) // 2
        data = base64.b64encode(one["expert"][start:].astype("<i4").tobytes()).decode()
        choice = {"index": 0, "token_ids": one["completion"].tolist(), "sgl_ext": {"routed_experts": data}}
        request = {"input_ids": one["prompt"].tolist(), "routed_experts_start_len": start}
        records.append({"request": request, "response": {"id": f"r{number}", "choices": [choice]}})
    return lines(folder / "openai.jsonl", records)


def plain_rows(made: list[dict[str, Any]], *, numbers: bool) -> list[dict[str, Any]]:
    rows = []
    for number, one in enumerate(made):
        names = ["prompt"] * len(one["prompt"]) + ["generated"] * len(one["completion"])
        rows.append(
            {
                "document": f"r{number}",
                "token": np.concatenate([one["prompt"], one["completion"]]).tolist(),
                "expert": one["expert"].tolist(),
                "weight": one["weight"].tolist(),
                "phase": len(one["prompt"]) if numbers else names,
            }
        )
    return rows


def plain_json(folder: Path, made: list[dict[str, Any]]) -> Path:
    return lines(folder / "plain.jsonl", plain_rows(made, numbers=False))


def plain_parquet(folder: Path, made: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(plain_rows(made, numbers=True)), folder / "plain.parquet", row_group_size=2)
    return folder / "plain.parquet"


def plain_npz(folder: Path, made: list[dict[str, Any]]) -> Path:
    """Rows padded with -1; the last token's experts are -1 in all layers."""
    width = max(len(one["prompt"]) + len(one["completion"]) for one in made)
    token = np.full((len(made), width), -1)
    expert = np.full((len(made), width, LAYERS, CHOICES), -1, np.int16)
    weight = np.zeros(expert.shape, np.float32)
    phase = np.full(token.shape, 255, np.uint8)
    for row, one in enumerate(made):
        both = np.concatenate([one["prompt"], one["completion"]])
        token[row, : len(both)], phase[row, : len(both)] = both, np.arange(len(both)) >= len(one["prompt"])
        expert[row, : len(one["expert"])], weight[row, : len(one["expert"])] = one["expert"], one["weight"]
    names = np.array([f"r{number}" for number in range(len(made))])
    np.savez(folder / "plain.npz", token=token, expert=expert, weight=weight, phase=phase, document=names)
    return folder / "plain.npz"


FORMS: dict[str, tuple[str, Callable[[Path, list[dict[str, Any]]], Path]]] = {
    "vllm 0.33, chat": ("vllm", vllm_http),
    "vllm 0.33, completions": ("vllm", vllm_completions),
    "vllm 0.21, HTTP": ("vllm", vllm_previous),
    "vllm 0.33, offline": ("vllm", vllm_offline),
    "vllm 0.21, offline": ("vllm", vllm_offline_previous),
    "sglang, generate": ("sglang", sglang_generate),
    "sglang, tagged": ("sglang", sglang_tagged),
    "sglang, openai": ("sglang", sglang_openai),
    "plain, JSON": ("plain", plain_json),
    "plain, Parquet": ("plain", plain_parquet),
    "plain, npz": ("plain", plain_npz),
}


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
    for _ in range(2):  # again: resumed and compared
        write_capture(
            tmp_path / "s.zarr", "d", blocks=blocks(read(), shape, grid), num_experts=EXPERTS, layers=(0, 1, 2),
            rows_per_shard=2,
        )  # fmt: skip
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


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("batched", [False, True])
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


def test_layers_without_experts_are_left_out() -> None:
    assert slots_of(3, [1, 2, 5]).tolist() == [0, 1, 2]
    assert slots_of(6, [1, 2, 5]).tolist() == [1, 2, 5]
    with pytest.raises(ValueError, match="routes are of 4 layers, and the model has experts at 3, numbered 1 to 5"):
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
        (with_routes(expert=[[[0, 1]]]), "has 3 tokens, and routes of 1 from token 0 on"),
        (with_routes(expert=[[0, 1]] * 3), r"experts of \(3, 2\)"),
        (with_routes(expert=[[[0, 1]], [[0]], [[0, 1]]]), "unequal lengths"),
        (with_routes(expert=[[[0.5, 1]]] * 3), "integers are wanted"),
        (with_routes(weight=[[[0.5]]] * 3), r"weights of the shape \(3, 1, 1\)"),
        (with_routes(phase=["prompt", "reply", "generated"]), "'reply', and prompt and generated are known"),
        (with_routes(phase=[0, 1]), "phases of the shape"),
        (with_routes(phase=4), "a prompt of 4 tokens, and 3 tokens in all"),
        (with_routes(tokens=[1]), "has 'tokens'; the plain form knows"),
        ({"token": [1]}, "has token: expert, and token or text, are wanted"),
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
            "no array in ba",
        ),
        ("vllm", {"choices": [{"token_ids": [1]}], "prompt_token_ids": [1]}, "start vLLM with enable_return_routed"),
        ("vllm", {"choices": [{"routed_experts": npy(np.zeros((1, 1, 1), np.uint8))}]}, "return_token_ids"),
        ("vllm", {"text": "a"}, "has no choices"),
        ("sglang", {"output_ids": [1], "prompt_token_ids": [1], "meta_info": {}}, "--enable-return-routed-experts"),
        (
            "sglang",
            {"output_ids": [1], "prompt_token_ids": [1, 2], "meta_info": {"routed_experts": "AAAAAA=="}},
            "1 ids for 2 tokens of 2 experts a layer do not come out even",
        ),
        (
            "sglang",
            {"output_ids": [1], "input_ids": [1], "meta_info": {"routed_experts": "AA==", "routed_experts_dtype": "x"}},
            "routed_experts_dtype is 'x'",
        ),
        ("olmoe", {"input_ids": [1]}, "has no exp_ids; it has input_ids"),
        ("replay", {"tokens": [1]}, "is no line of a replay"),
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
    with pytest.raises(ValueError, match="knows some experts of a token and not all"):
        list(blocks([torn], shape_of([torn], None), grid))


def test_a_sequence_of_another_shape_than_the_first_is_named() -> None:
    one = Routed(name="a", token=np.array([1]), expert=np.zeros((1, 3, 2), int))
    other = Routed(name="b", token=np.array([1]), expert=np.zeros((1, 3, 1), int))
    grid = Grid(positions=4, layers=(0, 1, 2), missing_expert=255)
    with pytest.raises(
        ValueError, match="sequence b has 3 layers, 1 experts a token and no weights; those before it 3, 2"
    ):
        list(blocks([one, other], shape_of([one], None), grid))


def test_files_are_read_in_pieces(tmp_path: Path) -> None:
    """Sixteen megabytes of routes in the memory of one sequence and one piece."""
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
    with pytest.raises(ValueError, match="line 4 is no JSON"):
        next(found)
