"""Pieces as they read in a text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.explorer.pieces import readable
from workers.tiny import tiny_checkpoint


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        ("▁the", " the"),
        ("the", "the"),
        ("<0x0A>", "\n"),
        ("<0x41>", "A"),
        ("<0xE2>", "⟨E2⟩"),
        ("<0x07>", "\\x07"),
        ("▁▁", "  "),
        ("\u202eevil", "\\u202eevil"),
        ("<s>", "<s>"),
        ("", ""),
    ],
)
def test_a_sentencepiece_piece_reads_as_its_text(piece: str, text: str) -> None:
    assert readable([piece]) == [text]


def byte_level(text: bytes) -> str:
    """Bytes in GPT-2's alphabet, by its published table: what can be seen stands for itself, the rest from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [value for value in range(256) if value not in seen]
    return "".join(chr(value) if value in seen else chr(256 + moved.index(value)) for value in text)


@given(st.text(st.characters(categories=("L", "N", "P", "Zs"))))
def test_a_byte_level_piece_reads_as_the_text_that_its_bytes_are(text: str) -> None:
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
    assert readable(["Ġ", byte_level(text.encode())])[1] == shown


def test_half_a_character_is_shown_as_its_bytes() -> None:
    assert readable(["Ġ", byte_level("é".encode()[:1])])[1] == "⟨C3⟩"
    assert readable(["Ġ", byte_level(b"\n")])[1] == "\n"
    assert readable(["Ġ", "<|im_start|>"])[1] == "<|im_start|>", "a special token is no bytes"


def test_the_tiny_mixtral_s_vocabulary_reads_as_text() -> None:
    vocabulary = json.loads((tiny_checkpoint() / "tokenizer.json").read_text())["model"]["vocab"]
    texts = readable(list(vocabulary))
    assert len(texts) == len(vocabulary)
    assert all(character.isprintable() or character == "\n" for text in texts for character in text)


def test_a_letter_of_malta_makes_no_vocabulary_byte_level() -> None:
    assert readable(["Ġ", "▁the", "<0x0A>", "és"]) == ["Ġ", " the", "\n", "és"], "Llama's has all of these"
