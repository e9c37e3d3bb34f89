"""A vocabulary that is extended by the files next to a tokenizer gives the same ids in every layout."""

import importlib.util
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workers.text.declared import MISTRAL_VOCABULARY
from workers.text.tokenizer import TextTokenizer, load_tokenizer, sentencepiece_tokenizer
from workers.tiny import tiny_checkpoint

PACKAGE = importlib.util.find_spec("mistral_common")
assert PACKAGE is not None
assert PACKAGE.origin is not None
MODEL_FILE = Path(PACKAGE.origin).parent / "data" / "tokenizer.model.v1"
SPECIAL = {"<|im_end|>": 32000, "<|im_start|>": 32001}
ADDED = {"<think>": 32002}
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "<think> Hi"}]
TEXT = "<|im_start|>user\nWhy<think> so <think><|im_end|> x"
NAMES = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "chat_template": CHATML}


def written(token: str, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": token, "special": special, **flags}


DECODER = {i: written(token, token in SPECIAL) for token, i in (SPECIAL | ADDED).items()}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "added_tokens_decoder": ({**NAMES, "added_tokens_decoder": DECODER}, {}),
    "legacy": (
        {"chat_template": CHATML},
        {
            "added_tokens.json": SPECIAL | ADDED,
            "special_tokens_map.json": {
                "bos_token": "<s>",
                "eos_token": "<|im_end|>",
                "additional_special_tokens": ["<|im_start|>"],
            },
        },
    ),
    "legacy objects": (
        {"chat_template": CHATML, "additional_special_tokens": ["<|im_start|>"]},
        {
            "added_tokens.json": SPECIAL | ADDED,
            "special_tokens_map.json": {
                "bos_token": "<s>",
                "eos_token": {"content": "<|im_end|>", "normalized": False},
            },
        },
    ),
    "version 5": ({**NAMES, "extra_special_tokens": ["<|im_start|>"]}, {"added_tokens.json": ADDED}),
    "named extra": ({**NAMES, "extra_special_tokens": {"turn_token": "<|im_start|>"}}, {"added_tokens.json": ADDED}),
    "own name": ({**NAMES, "turn_token": "<|im_start|>"}, {"added_tokens.json": ADDED}),
}


@cache
def bare() -> str:
    return sentencepiece_tokenizer(MODEL_FILE).to_str()


def full() -> Tokenizer:
    backend = Tokenizer.from_str(bare())
    backend.add_tokens([AddedToken(t, special=t in SPECIAL, normalized=False) for t in SPECIAL | ADDED])
    return backend


def folder(place: Path, kind: str, config: dict[str, Any], files: dict[str, Any]) -> Path:
    place.mkdir(exist_ok=True)
    if kind == "tokenizer.model":
        shutil.copy(MODEL_FILE, place / kind)
    else:
        made = {"full": full, "small": lambda: small(pre_tokenizers.ByteLevel())}
        made.get(kind, lambda: Tokenizer.from_str(bare()))().save(str(place / "tokenizer.json"))
    for name, content in {"tokenizer_config.json": config, **files}.items():
        (place / name).write_text(json.dumps(content))
    return place


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = folder(tmp_path_factory.mktemp("full") / "f", "full", NAMES, {})
    return PreTrainedTokenizerFast.from_pretrained(place)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("added_tokens_decoder", "tokenizer.json"),
        ("added_tokens_decoder", "tokenizer.model"),
        ("legacy", "tokenizer.json"),
        ("legacy", "tokenizer.model"),
        ("legacy objects", "tokenizer.json"),
    ],
)
def test_every_layout_gives_the_ids_of_a_tokenizer_that_has_the_tokens(
    layout: str, kind: str, tmp_path: Path, reference: Any
) -> None:
    mine = load_tokenizer(folder(tmp_path / "f", kind, *LAYOUTS[layout]))
    expected = reference.encode(TEXT, add_special_tokens=False, split_special_tokens=True)
    assert mine.encode_batch([TEXT])[0].tolist() == expected
    assert expected.count(32002) == 2
    assert mine.chat(MESSAGES)[0].tolist() == reference.apply_chat_template(MESSAGES, return_dict=False)
    assert (mine.vocab_size, mine.bos_id, mine.special_ids) == (32003, 1, [0, 1, 2, 32000, 32001])
    assert mine.pieces()[-3:] == ["<|im_end|>", "<|im_start|>", "<think>"]


@pytest.mark.parametrize("layout", ["version 5", "named extra", "own name"])
def test_tokens_without_a_declared_id_come_last_as_in_transformers(layout: str, tmp_path: Path) -> None:
    config, files = LAYOUTS[layout]
    files = {"added_tokens.json": {"<think>": 32000}}
    place = folder(tmp_path / "f", "tokenizer.json", config, files)
    mine, theirs = load_tokenizer(place), PreTrainedTokenizerFast.from_pretrained(place)
    for token in SPECIAL | ADDED:
        assert mine.pieces().index(token) == theirs.convert_tokens_to_ids(token)
    assert mine.vocab_size == len(theirs) == 32003
    assert mine.special_ids[3:] == [32001, 32002]


def test_folders_without_such_declarations_keep_their_identity() -> None:
    assert load_tokenizer(tiny_checkpoint()).sha256 == TextTokenizer(Tokenizer.from_str(bare()), {}, "x").sha256


@pytest.mark.parametrize(
    ("config", "files", "told"),
    [
        (
            {"added_tokens_decoder": {"300": written("<x>", False)}},
            {},
            r"tokenizer_config\.json declares '<x>' with the id 300, .* gives it 257",
        ),
        (
            {},
            {"added_tokens.json": {"<x>": 258}},
            r"added_tokens\.json declares '<x>' with the id 258, .* gives it 257",
        ),
        ({"added_tokens_decoder": {"5": written("▁", True)}}, {}, "declares '▁' with the id 5, .* gives it 256"),
        ({"added_tokens_decoder": {"5": 7}}, {}, "have a form that is not known"),
        ({}, {"added_tokens.json": [1]}, r"added_tokens\.json holds list, but must hold a JSON object"),
    ],
)
def test_a_token_that_would_get_another_id_is_an_error_with_both_and_the_file(
    config: Any, files: Any, told: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        load_tokenizer(folder(tmp_path / "f", "small", config, files))


def test_a_tokenizer_json_whose_token_has_another_id_than_it_says_is_an_error(tmp_path: Path) -> None:
    place = folder(tmp_path / "f", "small", {"pad_token": "<pad>"}, {})
    backend = Tokenizer.from_file(str(place / "tokenizer.json"))
    backend.add_tokens(["<think>"])
    data = json.loads(backend.to_str())
    data["added_tokens"][-1]["id"] = 277
    (place / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"tokenizer\.json declares '<think>' with the id 277, .* gives it 257"):
        load_tokenizer(place)


def test_a_token_of_the_vocabulary_that_a_file_calls_special_is_text_no_more(tmp_path: Path) -> None:
    place = folder(tmp_path / "f", "small", {"pad_token": "a"}, {})
    mine, theirs = load_tokenizer(place), PreTrainedTokenizerFast.from_pretrained(place)
    assert mine.special_ids == [theirs.convert_tokens_to_ids("a")]
    assert len(theirs) == mine.vocab_size == 257


# --- Settings that change ids ---------------------------------------------------------------------------------


def small(pre_tokenizer: Any, normalizer: Any = None) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "▁"])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    return backend


@pytest.mark.parametrize("wanted", [True, False])
def test_a_prefix_space_is_put_as_the_settings_say(wanted: bool, tmp_path: Path) -> None:
    small(pre_tokenizers.ByteLevel(add_prefix_space=not wanted)).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": wanted}))
    ids = load_tokenizer(tmp_path).encode_batch(["a", " a"])
    assert (ids[0].tolist() == ids[1].tolist()) is wanted


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer", "config", "told"),
    [
        (
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            None,
            {"add_prefix_space": False},
            "add_prefix_space: false",
        ),
        (pre_tokenizers.Metaspace(prepend_scheme="never"), None, {"add_prefix_space": True}, "add_prefix_space: true"),
        (
            None,
            normalizers.Sequence([normalizers.Prepend("▁")]),
            {"add_prefix_space": False},
            "add_prefix_space: false",
        ),
        (None, None, {"do_lower_case": True}, "do_lower_case: true"),
        (None, normalizers.Lowercase(), {"do_lower_case": False}, "do_lower_case: false"),
    ],
)
def test_a_setting_that_the_tokenizer_does_not_follow_is_an_error(
    pre_tokenizer: Any, normalizer: Any, config: Any, told: str, tmp_path: Path
) -> None:
    backend = small(pre_tokenizers.ByteLevel() if pre_tokenizer is None else pre_tokenizer, normalizer)
    if pre_tokenizer is None:
        backend.pre_tokenizer = None
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json says {told}, but the tokenizer next to it"):
        load_tokenizer(tmp_path)


def test_a_model_file_follows_the_settings_about_its_prefix_or_says_that_it_cannot(tmp_path: Path) -> None:
    plain = load_tokenizer(
        folder(tmp_path / "never", "tokenizer.model", {"add_prefix_space": False, "legacy": False}, {})
    )
    assert [plain.pieces()[i] for i in plain.encode_batch(["user x"])[0]] == ["user", "▁x"]
    assert load_tokenizer(folder(tmp_path / "a", "tokenizer.model", {"legacy": False}, {})).vocab_size == 32_000
    for config, files in (({"chat_template": CHATML}, {}), ({}, {"added_tokens.json": {"<x>": 32000}})):
        with pytest.raises(ValueError, match=r"says legacy: false.*copy the model's tokenizer\.json"):
            load_tokenizer(folder(tmp_path / "b", "tokenizer.model", {"legacy": False, **config}, files))


def test_files_by_version_are_refused_since_transformers_reads_another_than_tokenizer_json(tmp_path: Path) -> None:
    small(pre_tokenizers.ByteLevel()).save(str(tmp_path / "tokenizer.json"))
    small(pre_tokenizers.ByteLevel(add_prefix_space=False)).save(str(tmp_path / "tokenizer.4.0.0.json"))
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.0.json"]}))
    stock = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert stock("a").input_ids == stock("a").input_ids != stock(" a").input_ids, "not those of tokenizer.json"
    with pytest.raises(ValueError, match=r"says fast_tokenizer_files: tokenizer\.4\.0\.0\.json, one of which replaces"):
        load_tokenizer(tmp_path)
    config.write_text(json.dumps({"fast_tokenizer_files": ["tokenizer.json"]}))
    assert (
        load_tokenizer(tmp_path).encode_batch(["a"])[0].tolist()
        == load_tokenizer(tmp_path).encode_batch([" a"])[0].tolist()
    )


def test_the_pattern_that_a_setting_asks_for_must_be_in_the_tokenizer(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "aB", *(f"filler {n}" for n in range(MISTRAL_VOCABULARY))]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("a", "B")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    wrong, right = tmp_path / "wrong", tmp_path / "right"
    wrong.mkdir()
    backend.save(str(wrong / "tokenizer.json"))
    (wrong / "tokenizer_config.json").write_text(json.dumps({"fix_mistral_regex": True}))
    (wrong / "config.json").write_text(json.dumps({"model_type": "mistral", "transformers_version": "4.57.0"}))
    stock = PreTrainedTokenizerFast.from_pretrained(wrong)
    assert stock("aB").input_ids != backend.encode("aB").ids, "the setting changes ids"
    with pytest.raises(
        ValueError, match="says fix_mistral_regex: true, but the tokenizer next to it splits words diff"
    ):
        load_tokenizer(wrong)
    stock.save_pretrained(right)
    assert json.loads((right / "tokenizer_config.json").read_text())["fix_mistral_regex"] is True
    (ids,) = load_tokenizer(right).encode_batch(["aB 12, x\n"])
    assert ids.tolist() == stock("aB 12, x\n").input_ids
