"""What transformers returns with `output_router_logits=True`, saved as safetensors or npz: experts and weights.

Read from transformers 5.23, `models/mixtral/modeling_mixtral.py` and its siblings: `outputs.router_logits` is a tuple
of the layers that have experts, each (rows x tokens, experts). A file holds `input_ids` (rows, tokens);
`attention_mask` (rows, tokens) if rows are padded; and `router_logits.0`, `router_logits.1` and so on, in the tuple's
order; these may be (rows, tokens, experts) too.

The k largest logits are the choice only if a router is a softmax over logits, without correction bias and groups
(Mixtral, OLMoE, Qwen MoE, Granite MoE, gpt-oss). Some versions returned probabilities under this name
(huggingface/transformers#45120): rows that are probabilities are read as such.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.imports.files import rows_of, shapes_of, size_bytes
from workers.imports.sequence import Asked, Routed

SUFFIXES = (".safetensors", ".npz")
ROWS_AT_ONCE = 8  # so that the logits of a batch of any size need little memory (arbitrary)
WEIGHTS = ("none", "softmax", "renormalized")

Slices = Callable[[str], Iterator[NDArray[Any]]]
"""An array by its name, `ROWS_AT_ONCE` of the batch's rows at a time."""


def read(path: Path, asked: Asked) -> Iterator[Routed]:
    """The sequences of a file, one for each row of the batch, without its padding."""
    if asked.experts_per_token is None:
        raise ValueError("logits do not say k: give --experts_per_token, or a --model with a configuration")
    with ExitStack() as stack:
        names, shape, slices = (_safetensors if path.suffix == ".safetensors" else _npz)(path, stack)
        layers = sum(name.startswith("router_logits.") for name in names)
        if layers == 0 or len(shape) != 2 or {f"router_logits.{index}" for index in range(layers)} - names:
            raise ValueError(
                f"{path} holds {', '.join(sorted(names))}, but must hold input_ids (rows, tokens) and"
                " router_logits.0, .1, ... of all layers"
            )
        masks = slices("attention_mask") if "attention_mask" in names else None
        logits = [slices(f"router_logits.{index}") for index in range(layers)]
        number, size = 0, size_bytes(path) // max(1, shape[0])
        for ids in slices("input_ids"):
            some = np.stack([next(layer).reshape(*ids.shape, -1) for layer in logits], axis=2)
            mask = np.ones(ids.shape, bool) if masks is None else next(masks).astype(bool)
            for token, row, kept in zip(ids, some, mask, strict=True):
                expert, weight = _chosen(row[kept], asked, f"{path}, row {number}")
                yield Routed(
                    name=f"{path.stem} {number}", token=token[kept], expert=expert, weight=weight, size_bytes=size
                )
                number += 1


def _chosen(logits: NDArray[Any], asked: Asked, where: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The k largest of logits (tokens, layers, experts), ties by the lower id, and their weights."""
    logits = logits.astype(np.float32)
    k = asked.experts_per_token or 0
    if not np.isfinite(logits).all():
        raise ValueError(f"{where}: a router logit is not a finite number")
    if k > logits.shape[-1]:
        raise ValueError(f"{where}: {logits.shape[-1]} experts, but --experts_per_token is {k}")
    expert = np.argsort(-logits, axis=-1, kind="stable")[..., :k]
    if asked.weights == "none":
        return expert, None
    if not _are_probabilities(logits):
        logits = np.exp(logits - logits.max(axis=-1, keepdims=True))
        logits /= logits.sum(axis=-1, keepdims=True)
    weight = np.take_along_axis(logits, expert, -1)
    return expert, weight / weight.sum(axis=-1, keepdims=True) if asked.weights == "renormalized" else weight


def _are_probabilities(values: NDArray[Any]) -> bool:
    return bool((values >= 0).all() and np.allclose(values.sum(axis=-1), 1, atol=1e-2))  # bfloat16 rounds by 0.4 %


def _safetensors(path: Path, stack: ExitStack) -> tuple[set[str], tuple[int, ...], Slices]:
    from safetensors import SafetensorError, safe_open

    try:
        file = stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
    names = set(file.keys())
    shape = tuple(file.get_slice("input_ids").get_shape()) if "input_ids" in names else ()

    def slices(name: str) -> Iterator[NDArray[Any]]:
        own = file.get_slice(name)
        a_row = own.get_shape()[0] // shape[0]  # logits hold the batch's rows one after the other
        for start in range(0, shape[0], ROWS_AT_ONCE):
            yield own[start * a_row : min(start + ROWS_AT_ONCE, shape[0]) * a_row]

    return names, shape, slices


def _npz(path: Path, stack: ExitStack) -> tuple[set[str], tuple[int, ...], Slices]:
    shapes = shapes_of(path)
    shape = shapes.get("input_ids", ())

    def slices(name: str) -> Iterator[NDArray[Any]]:
        return rows_of(path, name, ROWS_AT_ONCE * (shapes[name][0] // shape[0]))

    return set(shapes), shape, slices
