"""Routes drawn like those of trained routers of three families, and faults planted in them.

A token's logits are the sum of its id's preferences, its document's topic, the previous tokens, and noise; experts
differ in popularity. Small enough for a thousand draws.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from store.attributes import flat

VOCABULARY = 60
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"experts": 8, "choices": 2, "layers": (0, 1, 2, 3), "model": "mistralai/Mixtral-8x7B-v0.1"},
    "olmoe": {"experts": 64, "choices": 8, "layers": (0, 1, 2), "model": "allenai/OLMoE-1B-7B-0924"},
    "sigmoid": {"experts": 32, "choices": 4, "layers": (1, 2, 3), "model": "a sigmoid model"},
}

Arrays = dict[str, Any]


def drawn(family: str, seed: int, *, documents: int = 24) -> Arrays:
    """Documents of a prompt and generated tokens, a row each, with their routes and weights."""
    random, form = np.random.default_rng(seed), FAMILIES[family]
    experts, choices, layers = form["experts"], form["choices"], form["layers"]
    length = random.integers(30, 65, documents)
    positions = 64
    filled = np.arange(positions) < length[:, None]
    frequency = 1 / np.arange(1, VOCABULARY + 1)
    token = random.choice(VOCABULARY, (documents, positions), p=frequency / frequency.sum())
    taste = random.normal(size=(len(layers), VOCABULARY, experts)) * 1.2
    topic = random.normal(size=(documents, len(layers), experts)) * 0.5
    liked = random.normal(size=(len(layers), experts)) * 0.6
    context = random.normal(size=(documents, positions, len(layers), experts)) * 0.9
    for position in range(1, positions):  # adjacent tokens are similar
        context[:, position] = 0.5 * context[:, position - 1] + 0.87 * context[:, position]
    logit = taste[:, token].transpose(1, 2, 0, 3) + topic[:, None] + liked + context
    expert = np.argsort(-logit, axis=-1, kind="stable")[..., :choices]
    chosen = np.take_along_axis(logit, expert, -1)
    if family == "sigmoid":
        weight = 1 / (1 + np.exp(-chosen))
        weight = 2.5 * weight / weight.sum(-1, keepdims=True)
    else:
        weight = np.exp(chosen) / (1 if family == "mixtral" else np.exp(logit).sum(-1, keepdims=True))
        weight = weight / weight.sum(-1, keepdims=True) if family == "mixtral" else weight
    prompt = random.integers(8, 25, documents)
    return {
        "expert": expert, "weight": weight.astype(np.float16), "token": token, "length": length, "prompt": prompt,
        "family": family, "random": random, "filled": filled, "special": [], "pieces": None,
    }  # fmt: skip


def capture_of(arrays: Arrays) -> xr.Dataset:
    """The arrays as a capture in memory."""
    form, filled = FAMILIES[arrays["family"]], np.arange(arrays["token"].shape[1]) < arrays["length"][:, None]
    expert = np.where(filled[..., None, None], arrays["expert"], 255).astype(np.uint8)
    phase = np.where(np.arange(filled.shape[1]) < arrays["prompt"][:, None], 0, 1)
    variables: dict[str, Any] = {
        "expert": (("doc", "position", "layer", "k"), expert),
        "token": (("doc", "position"), np.where(filled, arrays["token"], -1).astype(np.int32)),
        "phase": (("doc", "position"), np.where(filled, phase, 255).astype(np.uint8)),
        "length": ("doc", arrays["length"].astype(np.int32)),
        "document_id": ("doc", np.arange(len(filled))),
        "piece": ("token_id", np.array(arrays["pieces"] or list(map(str, range(VOCABULARY))), dtype=object)),
    }
    if arrays["weight"] is not None:
        variables["weight"] = (variables["expert"][0], np.where(filled[..., None, None], arrays["weight"], 0))
    facts = {"num_experts": form["experts"], "rows_per_shard": 8, "special_token_ids": arrays["special"]}
    return xr.Dataset(
        variables,
        coords={"layer": np.array(form["layers"])},
        attrs=flat({**facts, "model": form["model"], "dataset": "drawn"}),
    )


def _zero_layer(arrays: Arrays) -> None:
    arrays["expert"][:, :, arrays["random"].integers(1, arrays["expert"].shape[2])] = 0


def _all_zero(arrays: Arrays) -> None:
    arrays["expert"][:] = 0


def _dense(arrays: Arrays) -> None:
    arrays["expert"][:, :, 0] = 0


def _constant(arrays: Arrays) -> None:
    arrays["expert"][:, :, arrays["random"].integers(0, arrays["expert"].shape[2])] = np.arange(
        1, 1 + arrays["expert"].shape[3]
    )


def _illegal(arrays: Arrays) -> None:
    expert, random = arrays["expert"], arrays["random"]
    row = random.integers(0, len(expert))
    expert[row, random.integers(0, arrays["length"][row]), -1, 0] = FAMILIES[arrays["family"]]["experts"] + 3


def _twice(arrays: Arrays) -> None:
    expert, random = arrays["expert"], arrays["random"]
    row = random.integers(0, len(expert))
    own = expert[row, random.integers(0, arrays["length"][row]), 1]
    own[:] = np.arange(1, 1 + len(own))
    own[1] = own[0]


def _equal(arrays: Arrays) -> None:
    arrays["expert"][:, :, 2] = arrays["expert"][:, :, arrays["random"].integers(0, 2)]


def _shifted(arrays: Arrays) -> None:
    arrays["expert"][:, 1:, 2] = arrays["expert"][:, :-1, 1]


def _stale(arrays: Arrays) -> None:
    rows = len(arrays["expert"])
    some = arrays["random"].choice(np.arange(rows // 2, rows), 3, replace=False)
    arrays["expert"][some] = arrays["expert"][some - rows // 2]
    arrays["length"][some] = arrays["length"][some - rows // 2]


def _padding(arrays: Arrays) -> None:
    short = arrays["random"].integers(1, 20, len(arrays["length"]))
    padded = np.arange(arrays["token"].shape[1]) >= (64 - short)[:, None]
    arrays["token"][padded], arrays["length"][:] = 59, 64
    arrays["expert"][padded] = arrays["expert"][0, 0]


def _special(arrays: Arrays) -> None:
    arrays["pieces"] = ["<s>", *map(str, range(1, VOCABULARY))]


def _last(arrays: Arrays, make: Callable[[np.ndarray, np.ndarray, int], Any]) -> None:
    arrays["token"][np.arange(len(arrays["token"])), arrays["length"] - 1] = arrays["random"].integers(
        0, VOCABULARY, len(arrays["token"])
    )
    for row, length in enumerate(arrays["length"]):
        if arrays["token"][row, length - 1] == arrays["token"][row, length - 2]:
            arrays["token"][row, length - 1] = (arrays["token"][row, length - 1] + 1) % VOCABULARY
        arrays["expert"][row, length - 1] = make(arrays["expert"], arrays["expert"][row], length)


def _top_k(arrays: Arrays) -> None:
    arrays["expert"][..., arrays["expert"].shape[3] // 2 :] = 0


def _logits(arrays: Arrays) -> None:
    arrays["weight"] = (arrays["weight"].astype(np.float32) * 3 + 0.2).astype(np.float16)
    arrays["weight"][:, ::2] *= np.float16(1.5)


def _order(arrays: Arrays) -> None:
    arrays["weight"] = arrays["weight"][..., ::-1]


def _even(arrays: Arrays) -> None:
    shape, experts = arrays["expert"].shape, FAMILIES[arrays["family"]]["experts"]
    arrays["expert"] = arrays["random"].random((*shape[:3], experts)).argsort(-1)[..., : shape[3]]


def _collapsed(arrays: Arrays) -> None:
    expert = arrays["expert"]
    usual = np.arange(1, 1 + expert.shape[3])
    kept = arrays["random"].random(expert.shape[:2]) < 0.03
    expert[:, :, 1] = np.where(kept[..., None], expert[:, :, 1], usual)


def _one_rank(arrays: Arrays) -> None:
    experts, choices = FAMILIES[arrays["family"]]["experts"], arrays["expert"].shape[3]
    score = np.full((*arrays["expert"].shape[:3], experts), 0.0)
    np.put_along_axis(score, arrays["expert"], np.arange(choices, 0, -1, dtype=float), -1)
    half = score[..., : experts // 2] + score[..., experts // 2 :]
    half += arrays["random"].random((arrays["token"].max() + 1, half.shape[2], experts // 2))[arrays["token"]] / 2
    arrays["expert"] = half.argsort(-1)[..., ::-1][..., :choices]


def _restart(arrays: Arrays) -> None:
    for row, prompt in enumerate(arrays["prompt"]):
        size = min(prompt, arrays["length"][row] - prompt)
        arrays["expert"][row, prompt : prompt + size] = arrays["expert"][row, :size]


PLANTED: dict[str, tuple[str, Callable[[Arrays], None]]] = {
    "a zero layer": ("zero layers", _zero_layer),
    "all layers zero": ("zero layers", _all_zero),
    "a dense layer counted": ("dense layers counted", _dense),
    "a constant layer": ("constant layers", _constant),
    "an expert out of range": ("experts out of range", _illegal),
    "an expert twice": ("expert twice in a token", _twice),
    "a layer equal to another": ("equal layers", _equal),
    "a layer shifted by a token": ("layer shifted by a token", _shifted),
    "rows of an earlier batch": ("rows repeat an earlier batch", _stale),
    "padding": ("padding counted", _padding),
    "special tokens": ("special tokens counted", _special),
    "last tokens of zeros": ("dummy last tokens", lambda arrays: _last(arrays, lambda all_, own, n: 0)),
    "last tokens of those before": ("dummy last tokens", lambda a: _last(a, lambda all_, own, n: own[n - 2])),
    "last tokens all alike": ("dummy last tokens", lambda a: _last(a, lambda all_, own, n: all_[0, 3])),
    "another top-k": ("another top-k", _top_k),
    "logits as weights": ("weights of another sum", _logits),
    "weights in another order": ("weights out of order", _order),
    "ids at random": ("load too even", _even),
    "a collapsed layer": ("load too uneven", _collapsed),
    "ids of one rank": ("load too uneven", _one_rank),
    "generated tokens that restart": ("generated tokens restart", _restart),
}
"""The planted faults: the fault's name and the function that creates it."""
