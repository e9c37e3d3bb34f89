"""The published configuration of models, by name: experts, choices per token, and the sum of their weights."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """One model or family."""

    name: str
    num_experts: int | None
    experts_per_token: int | None
    total: float | None
    """The sum of a token's weights; None if it differs from token to token."""
    largest: float = 1.0
    """The largest sum of a token's weights, if `total` is None."""


_MODELS = {
    r"mixtral": Published(name="Mixtral", num_experts=8, experts_per_token=2, total=1.0),
    r"olmoe": Published(name="OLMoE", num_experts=64, experts_per_token=8, total=None),
    r"qwen3-(30b-a3b|235b-a22b)": Published(name="Qwen3 MoE", num_experts=128, experts_per_token=8, total=1.0),
    r"qwen1\.5-moe": Published(name="Qwen1.5-MoE", num_experts=60, experts_per_token=4, total=None),
    r"deepseek-v3|deepseek-r1": Published(name="DeepSeek-V3", num_experts=256, experts_per_token=8, total=2.5),
    r"gpt-oss-20b": Published(name="gpt-oss-20b", num_experts=32, experts_per_token=4, total=1.0),
    r"gpt-oss-120b": Published(name="gpt-oss-120b", num_experts=128, experts_per_token=4, total=1.0),
    r"phi-3\.5-moe": Published(name="Phi-3.5-MoE", num_experts=16, experts_per_token=2, total=None, largest=2.0),
}
"""From the models' published configurations and the routers of transformers 5.23; `tests/workers/test_families.py`
compares them."""


def published(model: str) -> Published | None:
    """What is published about a model, looked up by name; None if nothing is known here."""
    return next((known for pattern, known in _MODELS.items() if re.search(pattern, model, re.IGNORECASE)), None)
