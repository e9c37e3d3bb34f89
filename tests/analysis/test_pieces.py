"""Pieces as they read in a text."""

import json

import pytest

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


def test_the_tiny_mixtral_s_vocabulary_reads_as_text() -> None:
    vocabulary = json.loads((tiny_checkpoint() / "tokenizer.json").read_text())["model"]["vocab"]
    texts = readable(list(vocabulary))
    assert len(texts) == len(vocabulary)
    assert all(character.isprintable() or character == "\n" for text in texts for character in text)


def test_the_letters_of_gpt_2_s_byte_alphabet_stand_for_themselves() -> None:
    assert readable(["Ġ", "▁the", "<0x0A>", "és"]) == ["Ġ", " the", "\n", "és"], "the store's pieces are text"
