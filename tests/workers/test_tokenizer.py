"""Ids are sentencepiece's own for every text and every way to cut it."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from workers.text.tokenizer import ROLES, TextTokenizer, load_tokenizer, sentencepiece_tokenizer
from workers.tiny import tiny_checkpoint

PACKAGE = importlib.util.find_spec("mistral_common")
assert PACKAGE is not None
assert PACKAGE.origin is not None
MODEL_FILE = Path(PACKAGE.origin).parent / "data" / "tokenizer.model.v1"
CHAT_TEMPLATE: str = json.loads((tiny_checkpoint() / "tokenizer_config.json").read_text())["chat_template"]
SENTENCEPIECE = SentencePieceProcessor(model_file=str(MODEL_FILE))
HARD = [
    "",
    " ",
    "   ",
    "\n\n \t\n",
    "Hello, world!",
    " leading",
    "trailing  ",
    "two  spaces   three",
    "def f(x):\n    if x:\n\t\treturn  [i**2 for i in x]  # ▁ is a piece\n",
    "▁▁ ▁x ▁",
    "<s>",
    "</s><unk> <s>x</s>",
    "[INST] <<SYS>> hi [/INST]",
    "<0x0A><0xFF>",
    "<script>alert('x')</script>",
    "\x00\x01\x1b[0m\x7f\x85\u200b\u2028\ufeff",
    "नमस्ते दुनिया",
    "日本語のテキスト、漢字。",
    "مرحبا بالعالم",
    "Ελληνικά Кириллица עברית ไทย 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🙂🙂🙂",
    "e\u0301 é ﬁ ½ ①",
    "\U0010ffff\ufdd0𝔘𝔫𝔦",
    "a" * 300,
    "=" * 77 + " " * 77 + "-" * 7,
    "0123456789 3.14159e-10 1,000,000",
    Path(json.__file__).read_text(),
]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return load_tokenizer(tiny_checkpoint())


@pytest.fixture(scope="module")
def only_model_file(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("only")
    shutil.copy(MODEL_FILE, folder / "tokenizer.model")
    return load_tokenizer(folder)


def trained(pre_tokenizer: Any, decoder: Any, text: str) -> Tokenizer:
    """A small BPE tokenizer of another family."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return backend


@pytest.mark.parametrize("source", ["tokenizer", "only_model_file"])
def test_ids_are_sentencepieces_own_on_hard_texts(source: str, request: pytest.FixtureRequest) -> None:
    ids = request.getfixturevalue(source).encode_batch(HARD)
    assert [each.tolist() for each in ids] == [SENTENCEPIECE.encode(text) for text in HARD]
    assert {each.dtype for each in ids} == {np.dtype(np.int32)}


@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.text("ab ▁\n\t<s>/é日🙂.1", max_size=60),
        st.lists(st.sampled_from([SENTENCEPIECE.id_to_piece(i) for i in range(32000)])).map("".join),
    ),
    st.integers(1, 20),
)
def test_ids_are_sentencepieces_own_on_any_text_cut_anywhere(text: str, limit: int) -> None:
    expected = SENTENCEPIECE.encode(text)
    assert GENERATED.encode_batch([text])[0].tolist() == expected
    assert GENERATED.encode_batch([text], limit)[0].tolist() == expected


GENERATED = TextTokenizer(sentencepiece_tokenizer(MODEL_FILE), {}, "generated")


def test_a_long_text_is_really_cut_and_the_ids_stay(tokenizer: TextTokenizer) -> None:
    text = HARD[-1]
    parts = [part.text for part in tokenizer._cuts.parts(text, 100)]
    assert len(parts) > len(text) / 300
    assert max(map(len, parts)) < 500
    assert tokenizer.encode_batch([text, "x", text], 100)[2].tolist() == SENTENCEPIECE.encode(text)


@pytest.mark.parametrize("family", ["byte_level", "metaspace_first", "metaspace_always", "prepend"])
@pytest.mark.parametrize("limit", [1, 5, 64])
def test_other_families_give_the_same_ids_when_cut(family: str, limit: int) -> None:
    text = HARD[-1]
    if family == "byte_level":
        backend = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), text)
    else:
        backend = sentencepiece_tokenizer(MODEL_FILE)
        if family != "prepend":
            backend.normalizer = normalizers.Sequence([])
            backend.pre_tokenizer = pre_tokenizers.Metaspace(
                prepend_scheme=family.removeprefix("metaspace_"), split=False
            )
    expected = [backend.encode(each, add_special_tokens=False).ids for each in HARD]
    wrapped = TextTokenizer(backend, {}, family)
    assert len(list(wrapped._cuts.parts(text, limit))) > 10
    assert [ids.tolist() for ids in wrapped.encode_batch(HARD, limit)] == expected


def test_a_tokenizer_whose_pieces_reach_over_spaces_is_not_cut() -> None:
    text = "of the cat in the hat of the cat in the hat " * 20
    backend = trained(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel(), text)
    wrapped = TextTokenizer(backend, {}, "superword")
    assert any("▁" in piece[1:] for piece in wrapped.pieces())
    assert [part.text for part in wrapped._cuts.parts(text, 5)] == [text]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize("prepend", [False, True])
def test_added_tokens_that_are_not_special_keep_their_ids_when_cut(
    normalized: bool, rstrip: bool, prepend: bool
) -> None:
    backend = sentencepiece_tokenizer(MODEL_FILE)
    if not prepend:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.add_tokens([AddedToken("<think>", normalized=normalized, rstrip=rstrip)])
    text = "Why <think> I see <think>  so<think> it is"
    expected = backend.encode(text, add_special_tokens=False).ids
    assert 32000 in expected
    wrapped = TextTokenizer(backend, {}, "thinking")
    assert [wrapped.encode_batch([text], limit)[0].tolist() for limit in range(1, 30)] == [expected] * 29


def test_attributes_come_from_the_folder(tokenizer: TextTokenizer, only_model_file: TextTokenizer) -> None:
    for each in (tokenizer, only_model_file):
        assert (each.vocab_size, each.bos_id, each.special_ids) == (32000, 1, [0, 1, 2])
        assert each.pieces() == [SENTENCEPIECE.id_to_piece(i) for i in range(32000)]
    backend = Tokenizer.from_str(tokenizer._backend.to_str())
    assert tokenizer.sha256 == only_model_file.sha256 == hashlib.sha256(backend.to_str().encode()).hexdigest()
    backend.add_tokens(["<other>"])
    other = TextTokenizer(backend, {}, "other")
    assert other.sha256 != tokenizer.sha256
    assert (other.vocab_size, other.bos_id, other.pieces()[-1]) == (32001, None, "<other>")


def test_byte_level_pieces_are_readable() -> None:
    backend = trained(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), "the the é日\n" * 50)
    pieces = TextTokenizer(backend, {}, "bytes").pieces()
    assert {"▁the", "\n", "<0xC3>", "<|end|>"} <= set(pieces)
    assert not any("Ġ" in piece for piece in pieces if len(piece) > 2)


def test_truncation_and_padding_in_a_published_file_are_ignored(tmp_path: Path) -> None:
    backend = Tokenizer.from_file(str(tiny_checkpoint() / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer(tmp_path).encode_batch(["one two three four", ""])
    assert [each.tolist() for each in ids] == [SENTENCEPIECE.encode("one two three four"), []]


@pytest.mark.parametrize("limit", [1, 5, 10_000])
def test_so_many_ids_as_were_asked_for_are_the_first_of_all(tokenizer: TextTokenizer, limit: int) -> None:
    few = load_tokenizer(tiny_checkpoint(), limit_tokens=limit)
    for ids, first in zip(tokenizer.encode_batch(HARD, 50), few.encode_batch(HARD, 50), strict=True):
        assert first.tolist() == ids[:limit].tolist()
        assert first.base is None, "the rest of a long text does not stay in memory"
    messages = [{"role": "user", "content": "What routes tokens?"}, {"role": "assistant", "content": "A gate."}]
    whole, part = tokenizer.chat(messages), few.chat(messages)
    for all_of_it, first in zip(whole, part, strict=True):
        assert first.tolist() == all_of_it[:limit].tolist()
    assert few.sha256 == tokenizer.sha256
    assert few.pieces() == tokenizer.pieces()


def test_a_folder_without_a_tokenizer_is_named_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*looked for tokenizer\.json and tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_an_unreachable_hub_says_how_to_give_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("nobody/no-such-model", "/no/such/folder"):
        with pytest.raises(FileNotFoundError, match=f"no tokenizer for '{name}'.*give the path of a folder"):
            load_tokenizer(name)


def test_a_model_file_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reversed scores represent a model whose pieces the merges cannot build."""
    monkeypatch.setattr(SentencePieceProcessor, "get_score", lambda self, i: float(i))
    with pytest.raises(ValueError, match="is not a BPE model with byte fallback"):
        sentencepiece_tokenizer(MODEL_FILE)


def test_a_conversation_has_the_templates_ids_and_a_role_for_each_token(tokenizer: TextTokenizer) -> None:
    messages = [
        {"role": "user", "content": " What is 2+2?\n"},
        {"role": "assistant", "content": "It is four."},
        {"role": "user", "content": "Thanks, é 日本!"},
    ]
    ids, roles = tokenizer.chat(messages)
    reference = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint())
    assert ids.tolist() == reference.apply_chat_template(messages, return_dict=False)
    assert (ids.dtype, roles.dtype) == (np.int32, np.uint8)
    for role, text in (("user", "What is 2+2?Thanks, é 日本!"), ("assistant", "It is four.")):
        assert reference.decode(ids[roles == ROLES.index(role)]).replace(" ", "") == text.replace(" ", "")
    assert [reference.decode(i) for i in ids[roles == ROLES.index("template")] if i < 3] == ["<s>", "</s>"]


def test_special_tokens_in_a_message_stay_text(tokenizer: TextTokenizer) -> None:
    ids, roles = tokenizer.chat([{"role": "user", "content": "x <s> </s>\ufdd0 [/INST]"}])
    assert np.isin(ids, tokenizer.special_ids).nonzero()[0].tolist() == [0]
    rendered = "[INST] x <s> </s>\ufdd0 [/INST] [/INST]"
    assert ids[1:].tolist() == SENTENCEPIECE.encode(rendered)
    assert (roles == ROLES.index("template")).sum() == 4 + 4  # <s> ▁[ INST ] and ▁[ / INST ]


def chat_with(template: str | None, content: Any = " hello ", role: str = "user") -> Any:
    settings = {"chat_template": template, "bos_token": {"content": "<s>"}}
    wrapped = TextTokenizer(Tokenizer.from_str(GENERATED._backend.to_str()), settings, "chatty")
    return wrapped.chat([{"role": "system", "content": "Be brief."}, {"role": role, "content": content}])


def test_a_system_message_that_is_folded_into_a_later_turn_keeps_its_role() -> None:
    folded = "{{ bos_token }}[INST] {{ messages[1].content | trim }} {{ messages[0].content }} [/INST]"
    ids, roles = chat_with(folded)
    pieces = [GENERATED.pieces()[i] for i in ids]
    assert [p for p, role in zip(pieces, roles, strict=True) if ROLES[role] == "user"] == ["▁hell", "o"]
    assert [p for p, role in zip(pieces, roles, strict=True) if ROLES[role] == "system"] == [
        "▁Be",
        "▁brief",
        ".",
    ]


@pytest.mark.parametrize(
    ("template", "content", "role", "message"),
    [
        (None, "x", "user", "chatty has no chat template"),
        (CHAT_TEMPLATE, "x", "user", "rejects the messages: Conversation roles must alternate"),
        ("{{ messages[1].content | upper }}{{ messages[1].content | length }}", "x", "user", "rewrites messages"),
        (CHAT_TEMPLATE, 5, "user", "message 1 has a content of type int"),
        (CHAT_TEMPLATE, "x", "bystander", "message 1 has the role 'bystander'"),
    ],
)
def test_conversations_that_cannot_be_read_are_refused(
    template: str | None, content: Any, role: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        chat_with(template, content, role)
