"""Phrases are found for any tokenization, like in a search through the rows' bytes."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.explorer import phrases
from analysis.explorer.parts import Occurrences, Part
from analysis.explorer.phrases import Phrases, spelled
from analysis.token_classes import text_of

PIECES = ["", "<s>", "a", "b", "ab", "ba", "▁a", "▁", "aab", "A", "é", "<0xC3>", "<0xA9>", "<0x0A>", "É"]
SPECIAL = [1]


def part_of(rows: list[list[int]], folder: Path, first_row: int) -> Part:
    """A part of these rows, of one layer and two experts."""
    width = max(map(len, rows))
    token = np.array([[*row, *[-1] * (width - len(row))] for row in rows], np.int32)
    block = {
        "row": first_row + np.arange(len(rows)),
        "token": token,
        "length": np.array([len(row) for row in rows]),
        "counted": (token >= 0) & ~np.isin(token, SPECIAL),
        "expert": np.zeros((*token.shape, 1, 1), np.uint8),
    }
    state = {"vocabulary": np.array(len(PIECES)), "experts": np.array(2)}
    Occurrences(folder, {first_row: str(first_row)}).update(state, block)
    return Part(folder / str(first_row), first_row)


def places(rows: list[list[int]], phrase: str, first_row: int) -> list[tuple[int, int, int]]:
    """The row, first token and tokens of each place, from the bytes of whole rows."""
    found = []
    for number, row in enumerate(rows, first_row):
        texts = [b"\xff" if token in SPECIAL else spelled(text_of(PIECES[token])) for token in row]
        of_byte = [at for at, text in enumerate(texts) for _ in text]
        for match in re.finditer(b"(?=" + re.escape(spelled(phrase)) + b")", b"".join(texts)):
            first, last = of_byte[match.start()], of_byte[match.start() + len(spelled(phrase)) - 1]
            found.append((number, first, last - first + 1))
    return found


ROWS = st.lists(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=12), min_size=1, max_size=4)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(ROWS, min_size=1, max_size=3), phrase=st.text("aAbéÉ \n", min_size=1, max_size=5))
def test_a_phrase_is_found_as_in_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[list[int]]], phrase: str
) -> None:
    folder, made, wanted, first = tmp_path_factory.mktemp("parts"), [], list[tuple[int, int, int]](), 0
    for rows in parts:
        made.append(part_of(rows, folder, first))
        wanted += sorted(places(rows, phrase, first))
        first += len(rows)
    count = np.bincount([token for rows in parts for row in rows for token in row], minlength=len(PIECES))
    count[SPECIAL] = 0
    known = Phrases(PIECES, SPECIAL)
    found = known.find(phrase, made, count, skip=0, limit=10_000)
    assert found.complete
    assert found.number == len(wanted)
    assert sorted((each.row, each.position, each.tokens) for each in found.places) == sorted(wanted)
    paged = [known.find(phrase, made, count, skip=skip, limit=3).places for skip in range(0, len(wanted), 3)]
    assert [each for page in paged for each in page] == found.places


def test_more_than_can_be_compared_is_said_to_be_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [[2, 3, 4, 2]]
    parts = [part_of(rows, tmp_path, number) for number in range(3)]
    count = 3 * np.bincount(rows[0], minlength=len(PIECES))
    monkeypatch.setattr(phrases, "COMPARED", 3)
    found = Phrases(PIECES, SPECIAL).find("a", parts, count, skip=0, limit=100)
    assert (found.number, found.complete) == (3, False), "the first part is looked through, and no other"
