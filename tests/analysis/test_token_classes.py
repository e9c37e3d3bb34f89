"""Classes of tokens: compared with Python's own classification of characters, and errors."""

import json
import keyword
import unicodedata
from collections.abc import Callable

import numpy as np
import pytest

from analysis import token_classes
from analysis.token_classes import CLASSES, members_of, text_of
from workers.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    """A quarter of the pieces of Mixtral's tokenizer."""
    pieces: dict[str, int] = json.loads((tiny_checkpoint() / "tokenizer.json").read_text())["model"]["vocab"]
    return list(pieces)[::4]


def all_of(*kinds: str) -> Callable[[str], bool]:
    """Whether all of a text's characters, and at least one, are of these categories."""
    return lambda text: bool(text) and all(unicodedata.category(each).startswith(kinds) for each in text)


def named(prefix: str) -> Callable[[str], bool]:
    """Whether a text starts with a letter, and all its letters have such a name."""

    def fits(text: str) -> bool:
        return text[:1].isalpha() and all(unicodedata.name(each, "").startswith(prefix) for each in text)

    return fits


REFERENCES: dict[str, Callable[[str], bool]] = {
    "digits": str.isdecimal,
    "lowercase": lambda text: text[:1].isalpha() and all_of("Ll", "M")(text),
    "uppercase": lambda text: text[:1].isalpha() and all_of("Lu", "M")(text),
    "capitalized": lambda text: len(text) > 1 and text[0].isupper() and all_of("Ll", "M")(text[1:]),
    "punctuation": all_of("P", "S"),
    "symbols": all_of("S"),
    "cyrillic": named("CYRILLIC"),
    "hangul": named("HANGUL"),
    "han": named("CJK"),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_class_is_what_python_says_of_its_characters(name: str, vocabulary: list[str]) -> None:
    texts = [text_of(piece).strip() for piece in vocabulary]
    wanted = np.array([REFERENCES[name](text) for text in texts])
    found = members_of(name, vocabulary)
    assert [vocabulary[at] for at in np.flatnonzero(found != wanted)] == []
    assert 2 < wanted.sum() < len(wanted)


@pytest.mark.parametrize(
    ("piece", "classes"),
    [
        ("▁the", {"letters", "lowercase", "latin", "word-initial"}),
        ("▁return", {"letters", "lowercase", "latin", "word-initial", "keywords"}),
        ("getName", {"letters", "mixed-case", "latin", "continuation"}),
        ("HTTPServer", {"letters", "mixed-case", "latin", "continuation"}),
        ("<0x0A>", {"whitespace", "newlines"}),
        (");\n\n", {"punctuation"}),
        ("▁▁▁▁", {"whitespace"}),
        ("▁2026", {"digits"}),
        ("<0xE2>", {"bytes"}),
        ("▁<0xF0><0x9F>", {"bytes"}),
        ("▁+=", {"punctuation", "symbols"}),
        ("の", {"letters", "hiragana", "continuation"}),
        ("3rd", set()),
        ("", set()),
    ],
)
def test_a_piece_is_in_its_classes_and_in_no_other(piece: str, classes: set[str]) -> None:
    assert {name for name in CLASSES if members_of(name, [piece])[0]} == classes


def test_every_keyword_of_python_is_one() -> None:
    assert members_of("keywords", [f"▁{word}" for word in keyword.kwlist]).all()
    assert not members_of("keywords", ["Return", "returned", "▁▁"]).any()


def test_a_regular_expression_is_looked_for_in_the_text_of_a_piece() -> None:
    pieces = ["▁the", "the", "bathe", "<0x0A>", "▁1/2"]
    for expression, wanted in (
        ("/the/", [1, 1, 1, 0, 0]),
        ("/^ the$/", [1, 0, 0, 0, 0]),
        (r"/\n/", [0, 0, 0, 1, 0]),
        (r"/\d\/\d/", [0, 0, 0, 0, 1]),
        ("//", [1, 1, 1, 1, 1]),
    ):
        assert members_of(expression, pieces).tolist() == [bool(each) for each in wanted]
    assert members_of("/x/", []).tolist() == []


def test_what_is_no_class_is_an_error_that_names_those_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown token class 'digit': choose from digits, letters, .*han.*/"):
        members_of("digit", [])
    with pytest.raises(ValueError, match=r"/\(/ is not a regular expression: missing \)"):
        members_of("/(/", [])
    with pytest.raises(ValueError, match="its counts in braces multiply to 1,000,000; the limit is 10,000"):
        members_of("/(?:a{1000}){1000,}/", [])
    assert members_of("/^(?:a{2}){3}$/", ["aaaaaa", "aaaa"]).tolist() == [True, False]
    monkeypatch.setattr(token_classes, "PATIENCE_S", 0.05)
    with pytest.raises(ValueError, match=r"takes more than 0\.05 s; simplify the expression"):
        members_of("/^(a|a|aa)+$/", ["a" * 60 + "b"])
