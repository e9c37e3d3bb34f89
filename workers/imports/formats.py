"""The formats from which routes are read, one line each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from workers.imports import olmoe, plain, replay, router_logits, sglang, vllm
from workers.imports.sequence import Asked, Routed


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format."""

    read: Callable[[Path, Asked], Iterator[Routed]]
    """The sequences of a file, one after the other."""
    suffixes: tuple[str, ...]
    """Suffixes of its files."""
    by_weight: bool = False
    """Whether a token's choices are known to have the largest weight first; engines do not promise it."""


FORMATS = {
    "plain": Format(read=plain.read, suffixes=plain.SUFFIXES),
    "vllm": Format(read=vllm.read, suffixes=vllm.SUFFIXES),
    "sglang": Format(read=sglang.read, suffixes=sglang.SUFFIXES),
    "transformers": Format(read=router_logits.read, suffixes=router_logits.SUFFIXES, by_weight=True),
    "olmoe": Format(read=olmoe.read, suffixes=olmoe.SUFFIXES, by_weight=True),
    "replay": Format(read=replay.read, suffixes=replay.SUFFIXES),
}
