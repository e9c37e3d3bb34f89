"""Two data sets of a model with planted experts, one for prose and one for digits, and one data set with an expert
masked.

The other choices are those of the fake model, by a hash. So the explorer's expected results are known.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fake_model import FakeEngine, FakeRun, FakeTokenizer, fake_layout, text_source

from jobs.capturing.captures import capture_datasets
from jobs.capturing.local import capture_here
from store import CaptureGroup
from workers.shard import Routes

LAYERS, EXPERTS = tuple(range(8)), 8
PROSE = ("the", "of", "and", "congress", "people", "nation", "year", "law")
CODE = ("self", "return", "def", "(", ")", "=", "import", "None")
DIGITS = tuple("0123456789")
PIECES = ("<unk>", "<s>", *(f"▁{word}" for word in (*PROSE, *CODE)), *DIGITS)
NAMED = {piece.removeprefix("▁"): number for number, piece in enumerate(PIECES)}
DIGIT_EXPERT, PROSE_EXPERT = (6, 0), (7, 1)
"""The layer and expert of all digits, and of 9 in 10 words of prose."""


class PlantedTokenizer(FakeTokenizer):
    """Each word is the token of its piece."""

    vocab_size = len(PIECES)

    def encode_batch(self, texts: Any) -> list[np.ndarray]:
        """The ids of each text."""
        return [np.array([NAMED[word] for word in text.split()], dtype=np.int32) for text in texts]


class PlantedEngine(FakeEngine):
    """The first choice at two layers is that of the planted experts; predictions are a formula of the token."""

    def __init__(self, *shape: Any, without: bool = False) -> None:
        super().__init__(*shape)
        self.without = without

    def route(self, token: np.ndarray, length: np.ndarray) -> Routes:
        """See `FakeEngine`. `without` the prose expert, its tokens are predicted worse by half a nat or more."""
        routes = super().route(token, length)
        for (layer, expert), chosen in ((DIGIT_EXPERT, token >= NAMED["0"]), (PROSE_EXPERT, _prose(token))):
            if (layer, expert) != PROSE_EXPERT or not self.without:
                own = routes["expert"][:, :, layer]
                other = np.where(own[..., 1] == expert, (own[..., 1] + 1) % EXPERTS, own[..., 1])
                own[chosen] = np.stack([np.full(other.shape, expert), other], -1)[chosen]
        last = np.arange(token.shape[1]) >= length[:, None] - 1
        following = np.roll(token, -1, axis=1)
        loss = (0.5 + following % 3 / 8) * _prose(following) * self.without
        logprob = np.where(last, np.nan, -1 - following % 5 / 4 - loss).astype(np.float32)
        return {**routes, "logprob": logprob}


def _prose(token: np.ndarray) -> np.ndarray:
    """Which tokens go to the prose expert: 9 in 10 positions of its words, selected by a hash of the position."""
    words = (token >= NAMED["the"]) & (token < NAMED["self"])
    place = np.arange(token.shape[1]) * 7 + np.arange(token.shape[0])[:, None] * 3
    chosen: np.ndarray = words & (place % 10 != 0)
    return chosen


def planted_store(path: Path) -> Path:
    """Captures `prose` and `code` of twelve documents each, and `prose-without`, with the prose expert masked."""
    random = np.random.default_rng(0)
    draw = lambda words, digits: " ".join(random.choice([*words * 3, *digits], 40))
    prose = [draw(PROSE * 4, DIGITS) for _ in range(12)]
    code = [draw(CODE, (*DIGITS, *PROSE[:2])) for _ in range(12)]
    grid = {"layers": LAYERS, "num_experts": EXPERTS, "sequence_length": 16, "rows_per_shard": 16}
    layout = fake_layout(**grid, vocab_size=len(PIECES), record=("logprob",))
    for name, texts, without in (("prose", prose, False), ("code", code, False), ("prose-without", prose, True)):
        run: Any = PlantedRun(path, layout, identity={"record": ["logprob"]} | ({"mask": ["7:1"]} if without else {}))
        run.make_engine = partial(PlantedEngine, LAYERS, EXPERTS, 2, without=without)
        capture_datasets(run, [(name, text_source(texts))], capture_here)
    return path


class PlantedRun(FakeRun):
    """Captures with pieces that read as words and digits."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.tokenizer = PlantedTokenizer()

    def open_group(self, prepared: str) -> CaptureGroup:
        """Create the group."""
        attrs = {"model": "fake", "special_token_ids": [0, 1]}
        return CaptureGroup.create(
            self.store, prepared, layout=self.layout, identity=self.identity, attrs=attrs, pieces=list(PIECES)
        )
