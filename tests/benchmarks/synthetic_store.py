"""Stores of synthetic routes, of any size and as compressible as real ones, for benchmarks of the analysis.

Of Mixtral 8x7B's shape: 32 layers, two of eight experts. A token's pair at a layer is, by chance, one that its token id
prefers, one that follows from the pair below, or any; token ids follow Zipf's law. The shares are set so that experts
take 25 bytes a token on disk, as real Mixtral's do.
"""

import json
import shutil
from pathlib import Path

import numba
import numpy as np

from store import CaptureGroup, Layout
from store.plan import Plan, Rows

LAYERS, EXPERTS, CHOICES, VOCABULARY = 32, 8, 2, 32_000
DISTINCT = 16  # generated shards; later ones are copies, because generating one takes 2.5 s
PREFERRED, FOLLOWED = 0.30, 0.15  # shares of pairs by token id and by the layer below


@numba.njit(nogil=True, cache=True)
def _routes(token: np.ndarray, preferred: np.ndarray, follows: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Pairs (rows, positions, layers, 2), uint8."""
    rows, positions = token.shape
    layers = preferred.shape[1]
    expert = np.zeros((rows, positions, layers, 2), dtype=np.uint8)
    for row in range(rows):
        for position in range(positions):
            pair = 0
            for layer in range(layers):
                chance = random.random()
                if chance < PREFERRED:
                    pair = preferred[token[row, position], layer]
                elif chance < PREFERRED + FOLLOWED:
                    pair = follows[layer, pair]
                else:
                    pair = int(random.random() * 56)
                first, second = pair // 7, pair % 7
                expert[row, position, layer, 0] = first
                expert[row, position, layer, 1] = second + (second >= first)
    return expert


def make_store(path: Path, tokens: int, *, positions: int = 2048, filled: float = 1.0, name: str = "synthetic") -> None:
    """Write a complete capture.

    Parameters
    ----------
    tokens
        Minimum number of tokens; rounded up to whole shards.
    positions
        P.
    filled
        Mean share of a row's positions that hold a token; lengths are spread evenly around it.
    """
    random = np.random.default_rng(0)
    layout = Layout(
        sequence_length=positions,
        rows_per_shard=262_144 // positions,
        layers=tuple(range(LAYERS)),
        num_experts=EXPERTS,
        experts_per_token=CHOICES,
        vocab_size=VOCABULARY,
    )
    shards = -(-tokens // int(layout.rows_per_shard * positions * filled))
    rows = shards * layout.rows_per_shard
    length = np.full(rows, positions, np.int32)
    if filled < 1:
        length = random.integers(1, int(2 * filled * positions), rows, dtype=np.int32)
    ids = (1 / np.arange(1, VOCABULARY + 1)).cumsum()
    own = min(rows, DISTINCT * layout.rows_per_shard)
    token = np.searchsorted(ids / ids[-1], random.random((own, positions), dtype=np.float32)).astype(np.int32)
    repeated = np.arange(rows) % own
    token, length = token[repeated], length[repeated]
    token[np.arange(positions) >= length[:, None]] = -1
    attrs = {"special_token_ids": [], "model": "synthetic", "quantization": "none"}
    pieces = [str(number) for number in range(VOCABULARY)]
    group = CaptureGroup.create(path, name, layout=layout, identity={"synthetic": 0}, attrs=attrs, pieces=pieces)
    planned = Rows(token=token, length=length, document_id=np.arange(rows) // 3, offset=np.zeros(rows, np.int32))
    documents = int(planned.document_id[-1]) + 1
    plan = Plan(complete=True, rows=rows, documents=documents, tokens=int(length.sum()))
    group.publish(planned, [f"document {number}" for number in range(documents)], plan)
    preferred = random.integers(0, 56, (VOCABULARY, LAYERS))
    follows = random.integers(0, 56, (LAYERS, 56))
    for shard in range(shards):
        if shard >= DISTINCT:
            _copy(path / name, shard % DISTINCT, shard)
            continue
        read = group.read_rows(shard)
        expert = _routes(read.token, preferred, follows, random)
        share = random.beta(4, 2, expert.shape[:3]).clip(0.5, 1).astype(np.float16)
        weight = np.stack([share, np.float16(1) - share], axis=-1)
        beyond = np.arange(positions) >= read.length[:, None]
        expert[beyond], weight[beyond] = layout.missing_expert, 0
        group.commit(shard, {"expert": expert, "weight": weight}, rows=read, facts={})


def _copy(group: Path, shard: int, to: int) -> None:
    """Commit a shard with the choices of another one, whose tokens it has."""
    for array in ("expert", "weight"):
        target = group / array / "c" / str(to) / "0" / "0" / "0"
        target.parent.mkdir(parents=True)
        shutil.copyfile(group / array / "c" / str(shard) / "0" / "0" / "0", target)
    record = json.loads((group / "expert" / "commits" / f"{shard}.json").read_text())
    (group / "expert" / "commits" / f"{to}.json").write_text(json.dumps(record | {"shard": to}))
