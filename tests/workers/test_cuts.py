"""A text that is cut has the ids of the whole text for every kind of tokenizer, with bounded memory."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import HARD, MODEL_FILE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from workers.text.tokenizer import TextTokenizer, sentencepiece_tokenizer

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
GPT_4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("prepend", "metaspace first", "metaspace split", "gpt-2", "qwen", "llama 3", "gpt-4o", "no bytes", "unigram")
WORDS = ["word", "a", "B's", "日本。", "é", "ꙮ", "7", "x.", "(y)", "🙂", "<think>", "  x", "</s>", "", "don't", "_"]
GAPS = [
    " ",
    "\n",
    "\t",
    "\r\n",
    "\n\n",
    "  ",
    " \n ",
    "\n\n\n",
    "\u3000",
    "\xa0",
    "\n \n",
    "\x0b",
    "\u2028",
    "\x1c",
    ". \n",
]
TEXTS = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(GAPS)).map("".join), max_size=40).map("".join)


@cache
def tokenizer(kind: str) -> TextTokenizer:
    corpus = ["".join(f"{word}{gap}" for word in WORDS for gap in GAPS), "\n".join(HARD)]
    if kind in ("prepend", "metaspace first", "metaspace split"):
        backend = sentencepiece_tokenizer(MODEL_FILE)
        if kind != "prepend":
            backend.normalizer = normalizers.Sequence([])
            scheme, split = ("first", False) if kind == "metaspace first" else ("always", True)
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    else:
        unigram = kind == "unigram"
        backend = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer: Any = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
        options: dict[str, Any] = {"vocab_size": 700, "special_tokens": ["<unk>"], "show_progress": False}
        if unigram or kind == "no bytes":
            backend.pre_tokenizer = pre_tokenizers.Metaspace()
            corpus = [text.replace("ꙮ", "").replace("日", "") for text in corpus]
            options |= {"unk_token": "<unk>"} if unigram else {}
        else:
            patterns = {"qwen": QWEN, "llama 3": LLAMA_3, "gpt-4o": GPT_4O}
            parts: list[Any] = [pre_tokenizers.Split(Regex(patterns[kind]), "isolated")] if kind in patterns else []
            last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not parts)
            backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, last])
            backend.decoder = decoders.ByteLevel()
            options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(corpus, trainer(**options))
    backend.add_tokens([AddedToken("<think>", normalized=False, rstrip=kind == "qwen", lstrip=kind == "llama 3")])
    return TextTokenizer(backend, {}, kind)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(text=TEXTS | st.text(" \n\tab.日é1'\r", max_size=60), limit=st.integers(1, 30))
def test_ids_of_a_cut_text_are_those_of_the_whole(kind: str, text: str, limit: int) -> None:
    cut = tokenizer(kind)
    whole = cut._backend.encode(text, add_special_tokens=False).ids
    assert cut.encode_batch([text], limit)[0].tolist() == whole


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_cut_and_lines_of_one_word_too(kind: str) -> None:
    cut = tokenizer(kind)
    for gap in " " if kind in ("no bytes", "unigram") else " \n\t":  # in these, pieces span line feeds
        text = gap.join(["word"] * 200)
        parts = list(cut._cuts.parts(text, 5))
        assert len(parts) >= 90, gap
        assert "".join(part.text for part in parts) == text
        assert cut.encode_batch([text], 5)[0].tolist() == cut._backend.encode(text, add_special_tokens=False).ids


PEAK = """
import sys
from pathlib import Path
from workers.text.tokenizer import load_tokenizer
from workers.tiny import tiny_checkpoint
def peak():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
tokenizer = load_tokenizer(tiny_checkpoint())
tokenizer.encode_batch(["a b\\nc d " * 50_000])
before, text = peak(), eval(sys.argv[1])
ids = tokenizer.encode_batch([text])[0]
print(len(text), len(ids), peak() - before)
"""


def measured(text: str) -> tuple[int, int, int]:
    """The numbers of characters and ids, and the bytes that encoding took, measured in a separate process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAYON_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", PEAK, text], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    characters, ids, taken = map(int, done.stdout.split())
    return characters, ids, taken


def test_lines_of_one_word_take_no_more_memory_than_their_ids() -> None:
    characters, ids, taken = measured("'word\\n' * 400_000")
    assert (characters, ids) == (2_000_000, 800_000)
    assert taken < 2 * characters + 12 * ids + 60e6, taken


def test_a_text_without_white_space_takes_so_many_bytes_a_character() -> None:
    characters, _, taken = measured("'abcdefghij' * 200_000")
    assert characters == 2_000_000
    assert taken < 250 * characters, taken
