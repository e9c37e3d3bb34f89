"""Captures built from numpy arrays, in the store's schema, with structure to find, for tests of the analysis.

Tokens prefer experts, first choices follow from those of the layer below, documents are cut into windows. The shape
(layers, experts, choices, windows, shards) is the caller's; nothing is written to disk.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from hypothesis import strategies as st

from store import Coverage
from store.plan import Plan

EXPERTS = st.sampled_from([2, 3, 4, 8, 15, 16, 64])
HOSTILE = (
    "<script>alert(1)</script>",
    "</script>",
    "<!--",
    "-->",
    "{{x}}",
    "{% raw %}",
    "\u2028",
    "\u202eevil",
    "&lt;b&gt;",
    "<img src=x onerror=alert(2)>",
    "javascript:alert(3)",
    "\"'`${alert(4)}",
    "שלום",
    "</textarea></style></title>",
)


def make_capture(
    *,
    seed: int = 0,
    documents: int = 9,
    layers: Sequence[int] = (0, 1, 2),
    num_experts: int = 8,
    experts_per_token: int = 2,
    sequence_length: int = 16,
    rows_per_shard: int = 4,
    vocabulary: int = 40,
    special_token_ids: Sequence[int] = (1,),
    missing: Sequence[int] = (),
    pieces: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    dataset: str = "synthetic",
    strength: float = 1.5,
    record: Sequence[str] = (),
    top_logits: int = 0,
    scores: str = "renormalized",
    chunked: bool = True,
) -> xr.Dataset:
    """A capture with random documents. Shards in `missing` hold fill values, like unwritten shards.

    `strength` scales the structure: 0 makes all routing uniform and independent. `record` names arrays of `RECORD`.
    """
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 3 * sequence_length, documents)
    windows = [(d, p) for d, size in enumerate(lengths) for p in range(0, size, sequence_length)]
    rows, num_layers, positions = len(windows), len(layers), sequence_length
    document_id = np.array([d for d, _ in windows], dtype=np.int64)
    start = np.array([p for _, p in windows], dtype=np.int64)
    length = np.minimum(lengths[document_id] - start, positions).astype(np.int32)
    inside = np.arange(positions) < length[:, None]
    frequency = 1 / np.arange(1, vocabulary + 1)
    token = random.choice(vocabulary, (rows, positions), p=frequency / frequency.sum()).astype(np.int32)
    special = np.isin(token, special_token_ids)

    # Gumbel-max: the k largest of (preference + noise) are k draws without replacement.
    taste = random.normal(size=(num_layers, vocabulary, num_experts)) * strength
    follow = random.normal(size=(num_layers, num_experts, num_experts)) * strength
    bias = random.normal(size=(num_layers, num_experts)) * strength / 3
    noise = random.gumbel(size=(rows, positions, num_layers, num_experts))
    fill = np.iinfo(np.uint8 if num_experts <= 255 else np.uint16).max
    shape = (rows, positions, num_layers, experts_per_token)
    expert, weight = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    logit = np.zeros((*shape[:3], num_experts))
    for layer in range(num_layers):
        score = taste[layer][token] + bias[layer] + noise[:, :, layer]
        if layer:
            score = score + follow[layer][expert[:, :, layer - 1, 0]]
        chosen = np.argsort(-score, axis=-1)[..., :experts_per_token]
        gate = np.exp(np.take_along_axis(score, chosen, -1))
        expert[:, :, layer], weight[:, :, layer] = chosen, gate / gate.sum(-1, keepdims=True)
        logit[:, :, layer] = score

    shard = np.arange(rows) // rows_per_shard
    captured = inside & ~np.isin(shard, missing)[:, None]
    expert = np.where(captured[..., None, None], expert, fill).astype(np.uint8 if fill == 255 else np.uint16)
    weight = np.where(captured[..., None, None], weight, 0).astype(np.float16)
    # Offsets count only document tokens: special tokens have no place in the text.
    text_tokens = (inside & ~special).sum(1)
    offset = [text_tokens[(document_id == d) & (start < p)].sum() for d, p in windows]
    if pieces is None:
        pieces = [f"▁w{number}" for number in range(vocabulary)]
    if names is None:
        names = [f"document {number}" for number in range(documents)]
    routes = ("doc", "position", "layer", "k")
    capture = xr.Dataset(
        {
            "expert": (routes, expert),
            "weight": (routes, weight),
            "token": (("doc", "position"), np.where(inside, token, -1).astype(np.int32)),
            "length": ("doc", length),
            "document_id": ("doc", document_id),
            "offset": ("doc", np.array(offset, dtype=np.int32)),
            "name": ("document", np.array(names, dtype=object)),
            "piece": ("token_id", np.array(pieces, dtype=object)),
        },
        coords={"layer": np.array(layers)},
        attrs={
            "num_experts": num_experts,
            "experts_per_token": experts_per_token,
            "rows_per_shard": rows_per_shard,
            "sequence_length": sequence_length,
            "special_token_ids": list(special_token_ids),
            "dataset": dataset,
            **({"router_transformation": scores} if "logit" in record else {}),
        },
    )
    more = recorded(capture, logit, captured, seed=seed, top_logits=top_logits)
    capture = capture.assign({name: more[name] for name in record})
    return capture.chunk({"doc": rows_per_shard}) if chunked else capture


RECORD = ("logit", "output_norm", "logprob", "effect")


def recorded(
    capture: xr.Dataset, logit: np.ndarray, captured: np.ndarray, *, seed: int, top_logits: int
) -> dict[str, Any]:
    """What `--record` adds: these logits, norms that depend on the expert, log-probabilities that depend on the token;
    and what `jobs/importance.py` does: effects that depend on layer and expert.

    If only some logits are recorded, in descending order, their experts are recorded with them.
    """
    random = np.random.default_rng([seed, 1])
    expert, token = capture["expert"].values, capture["token"].values
    fill, place = np.iinfo(expert.dtype).max, ("doc", "position")
    order = np.argsort(-logit, axis=-1, kind="stable")[..., :top_logits]
    kept = np.take_along_axis(logit, order, -1) if top_logits else logit
    logits = np.where(captured[..., None, None], kept, np.nan).astype(np.float32)
    norm = random.lognormal(0, 0.3, expert.shape) * (1 + np.where(expert == fill, 0, expert) % 5)
    norms = np.where(captured[..., None, None], norm, np.nan).astype(np.float32)
    predicted = captured & (np.arange(captured.shape[1]) < capture["length"].values[:, None] - 1)
    surprise = random.gamma(2, 1.0, token.shape) * (1 + token % 3)
    logprob = np.where(predicted, -surprise, np.nan).astype(np.float32)
    ids = np.where(captured[..., None, None], order, fill).astype(expert.dtype)
    last = "candidate" if top_logits else "expert_id"
    helps = random.normal(-0.1, 0.1, logit.shape[2:]) + random.normal(0, 0.1, logit.shape)
    effect = np.where(predicted[..., None, None], np.rint(helps * 2**16) / 2**16, np.nan).astype(np.float32)
    return {
        "logit": ((*place, "layer", last), logits),
        "logit_expert": ((*place, "layer", "candidate"), ids),
        "output_norm": ((*place, "layer", "k"), norms),
        "logprob": (place, logprob),
        "effect": ((*place, "layer", "expert_id"), effect),
    }


def bursty(
    by: str,
    *,
    seed: int = 0,
    world: int = 0,
    documents: int = 40,
    burst: float = 0.05,
    **shape: Any,
) -> xr.Dataset:
    """A capture whose documents have their own words, and whose routes depend only on `by`: document or token.

    `world` is the seed of the preferences of tokens, so that captures of other texts may share them; `burst` is the
    parameter of the Dirichlet distribution from which each document's words are drawn.
    """
    capture = make_capture(seed=seed, documents=documents, strength=0, special_token_ids=(), **shape).compute()
    random, tastes = np.random.default_rng(seed + 1), np.random.default_rng(world)
    vocabulary, experts = capture.sizes["token_id"], capture.attrs["num_experts"]
    layers, choices = capture.sizes["layer"], capture.sizes["k"]
    words = random.dirichlet(np.full(vocabulary, burst), documents)
    of_token = tastes.normal(size=(vocabulary, layers, experts)) * 2
    of_document = random.normal(size=(documents, layers, experts)) * 2
    for row, document in enumerate(capture["document_id"].values):
        n = int(capture["length"][row])
        token = random.choice(vocabulary, n, p=words[document])
        preferred = of_document[[document] * n] if by == "document" else of_token[token]
        score = preferred + random.gumbel(size=preferred.shape)
        capture["token"].values[row, :n] = token
        capture["expert"].values[row, :n] = np.argsort(-score, axis=-1)[..., :choices]
    return capture


@st.composite
def captures(
    draw: st.DrawFn,
    experts: st.SearchStrategy[int] = EXPERTS,
    most_choices: int = 8,
    most_documents: int = 5,
) -> xr.Dataset:
    """Captures with k from 1 to 8 and E from 2 to 64, in any chunking."""
    num_experts = draw(experts)
    capture = make_capture(
        seed=draw(st.integers(0, 2**31)),
        documents=draw(st.integers(1, most_documents)),
        layers=draw(st.sampled_from([(0,), (0, 1), (1, 3, 4), (0, 7, 15, 16)])),
        num_experts=num_experts,
        experts_per_token=draw(st.integers(1, min(most_choices, num_experts))),
        sequence_length=8,
        rows_per_shard=draw(st.integers(1, 4)),
        vocabulary=12,
        special_token_ids=draw(st.sampled_from([(), (1,), (0, 2)])),
        missing=draw(st.lists(st.integers(0, 5), max_size=3)),
        chunked=False,
    )
    chunk = draw(st.none() | st.integers(1, 9))
    return capture if chunk is None else capture.chunk({"doc": chunk, "position": 3, "layer": 1})


def state_of(data: xr.Dataset, missing: Sequence[int] = ()) -> Coverage:
    """A coverage for a synthetic capture."""
    tokens = int(data["length"].sum())
    shards = -(-data.sizes["doc"] // data.attrs["rows_per_shard"])
    return Coverage(
        dataset=data.attrs["dataset"],
        plan=Plan(complete=True, rows=data.sizes["doc"], tokens=tokens, documents=data.sizes["document"]),
        shards_total=shards,
        missing=list(missing),
        wrong={},
        quarantined={},
        lost=[],
        tokens_done=tokens,
        bytes_done=0,
        seconds=0.0,
        sums={},
        digest="synthetic",
    )
