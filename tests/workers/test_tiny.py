"""The tiny Mixtral: the published layout, the stated size, and its training."""

import json
import math
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from analysis.metrics.contrast import contrast
from analysis.metrics.load import expert_load
from analysis.metrics.vocabulary import vocabulary_specialization
from jobs import train_tiny
from jobs.sources.demo import DEMO_TEXTS, HELD_OUT, demo_files, demo_source, held_out
from workers import capture_texts
from workers.models.loading import load_model
from workers.tiny import tiny_checkpoint

FOLDER = tiny_checkpoint()
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
RECORD = json.loads((FOLDER / "training.json").read_text())


def test_names_shapes_and_types_are_those_of_the_published_checkpoints_in_12_megabytes() -> None:
    found = {name: (file, tensor) for file in FILES for name, tensor in load_file(FOLDER / file).items()}
    per_layer = {
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (64, 64),
        "self_attn.k_proj.weight": (32, 64),
        "self_attn.v_proj.weight": (32, 64),
        "self_attn.o_proj.weight": (64, 64),
        "block_sparse_moe.gate.weight": (8, 64),
        **{f"block_sparse_moe.experts.{e}.w1.weight": (256, 64) for e in range(8)},
        **{f"block_sparse_moe.experts.{e}.w2.weight": (64, 256) for e in range(8)},
        **{f"block_sparse_moe.experts.{e}.w3.weight": (256, 64) for e in range(8)},
    }
    expected = {f"model.layers.{n}.{name}": shape for n in range(8) for name, shape in per_layer.items()}
    expected |= {"model.embed_tokens.weight": (32000, 64), "model.norm.weight": (64,)}  # the head is the embedding
    assert {name: tuple(tensor.shape) for name, (_, tensor) in found.items()} == expected
    assert {tensor.dtype for _, tensor in found.values()} == {torch.bfloat16}
    index = json.loads((FOLDER / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in found.values())
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12e6


def test_the_tokenizer_is_made_from_mixtrals_own_by_the_training_script(tmp_path: Path) -> None:
    train_tiny.write_tokenizer(tmp_path / "made")
    made = {file.name: file.read_bytes() for file in (tmp_path / "made").iterdir()}
    assert len(made) == 3
    assert made == {name: (FOLDER / name).read_bytes() for name in made}


def test_stock_transformers_loads_it_with_nothing_missing() -> None:
    _, info = AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert {key: list(value) for key, value in info.items() if value} == {}


@pytest.mark.parametrize("name", DEMO_TEXTS)
def test_it_predicts_text_it_has_not_seen_about_as_well_as_recorded(name: str) -> None:
    recorded = RECORD["texts"][name]["held_out_nats_per_token"]
    ids = [np.array([1, *tokens], np.int64)[:512] for tokens in first_held_out(name, documents=24)]
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        losses = [
            torch.nn.functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="none")
            for row in map(torch.from_numpy, ids)
        ]
    by_document = np.array([loss.mean().item() for loss in losses])
    error = by_document.std(ddof=1) / math.sqrt(len(by_document))
    # Beginnings are harder than the rest: the first 64 positions are not tested.
    later = torch.cat([loss[64:] for loss in losses]).mean().item()
    assert abs(later - recorded) < 3 * error
    assert later < math.log(32_000) - 5  # a model that has learned nothing is at 10.4


@pytest.mark.slow
def test_experts_specialize_in_texts_and_in_tokens_beyond_chance_and_share_the_load() -> None:
    loaded = load_model(FOLDER, quantization="none", device="cpu")
    many = {"demo:prose": 3, "demo:code": 10, "demo:legal": 20, "demo:maths": 12}  # a fifth of the demo
    texts = {name: [one.text for one in islice(demo_source(name).read(0), count)] for name, count in many.items()}
    routes = {name: capture_texts(loaded, some, sequence_length=512) for name, some in texts.items()}
    apart = contrast(routes, replicates=199)
    assert int((apart["p"] <= 0.01).sum()) >= 6
    assert bool((apart["divergence"] > 3 * apart["divergence_by_chance"]).sum() >= 6)
    draws = np.random.default_rng(0)
    for capture in routes.values():
        token = capture["token"].values.copy()
        token[token >= 0] = draws.permutation(token[token >= 0])
        shuffled = capture.assign(token=(capture["token"].dims, token))
        informative, by_chance = (
            vocabulary_specialization(one, draws=1)["mutual_information"] for one in (capture, shuffled)
        )
        assert bool((informative > 2 * by_chance).all())
    loads = [expert_load(capture) for capture in routes.values()]
    share = sum(load["counts"].sum("k") for load in loads)
    violation = 8 * (share / share.sum("expert")).max("expert") - 1
    assert float(violation.max()) < 0.5


def first_held_out(name: str, documents: int) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    chosen = [document for document, _ in zip(demo_source(name).read(0), range(documents), strict=False)]
    assert all(held_out(document.name) for document in chosen)
    return [tokenizer.encode(document.text).ids for document in chosen]


def test_a_tenth_of_each_text_is_held_out_and_comes_first() -> None:
    for name, demo in DEMO_TEXTS.items():  # documents come in the order of their files and have their names
        out = [held_out(file) for file in demo_files(name, demo)]
        assert out == sorted(out, reverse=True)
        assert np.mean(out) == pytest.approx(HELD_OUT, abs=0.03)


def test_a_training_document_that_nearly_repeats_one_held_out_is_told() -> None:
    draws = np.random.default_rng(0)
    new, kept, short = (draws.integers(0, 32_000, size).astype(np.int32) for size in (100, 100, 5))
    copied = np.concatenate([new[:50], kept[20:70]])
    held = np.array([True, False, False, True, False])
    shared = train_tiny.shared_windows([kept, new, copied, short, short], held)
    assert shared[[1, 2, 4]].tolist() == [0.0, (50 - 13 + 1) / (100 - 13 + 1), 1.0]


def test_every_row_is_drawn_before_one_is_drawn_again() -> None:
    rows = np.arange(300, dtype=np.int32)[:, None]
    drawn = np.concatenate(list(train_tiny.batches(rows, 7)))[:, 0]
    assert len(drawn) == 7 * train_tiny.BATCH_ROWS
    assert sorted(drawn[:300]) == list(range(300)) == sorted(drawn[300:600])


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    rates = np.array([train_tiny.learning_rate(step, 1000) for step in range(1001)])
    assert rates.argmax() in (29, 30)
    assert rates.max() == pytest.approx(train_tiny.LEARNING_RATE)
    assert np.all(np.diff(rates[:30]) > 0)
    assert np.all(np.diff(rates[31:]) < 0)
    assert rates[-1] == pytest.approx(0)


def test_training_again_gives_the_same_bytes_of_a_model_that_loads_in_4_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = np.random.default_rng(1).integers(3, 32_000, (8, 24)).astype(np.int32)
    rows[::2, 12:] = -1
    monkeypatch.setattr(train_tiny, "text_rows", lambda name, tokenizer: (rows, rows[:3]))
    monkeypatch.setattr(train_tiny, "BATCH_ROWS", 4)
    monkeypatch.setattr(sys, "argv", ["train_tiny.py"])
    try:
        for folder in ("one", "other"):
            assert train_tiny.main([str(tmp_path / folder), "--steps", "3", "--device", "cpu"]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    one, other = ({file.name: file for file in (tmp_path / name).iterdir()} for name in ("one", "other"))
    assert one.keys() == other.keys() == {file.name for file in FOLDER.iterdir()} - {"README.md"}
    for name in one:
        if name != "training.json":  # which contains the seconds
            assert one[name].read_bytes() == other[name].read_bytes(), name
    assert {file.stat().st_mode & 0o777 for file in one.values()} == {0o644}
    assert load_model(tmp_path / "one", device="cpu").provenance["quantized_expert_matrices"] == 8 * 8 * 3
    with pytest.raises(ValueError, match="one exists already"):
        train_tiny.main([str(tmp_path / "one")])
