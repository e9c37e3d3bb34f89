"""The proof of recordings finds four faults, for all outputs and rules of a family's routers.

Every family and every fault: `make families` (`tests/benchmarks/families_faults.py`).
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fake_model import store_files
from router_faults import FAULTS, NO_HARM, batch, outcome, probabilities_for_weights

from store import coverage
from workers.engine import ModelEngine
from workers.models.family import experts_per_token, find_routers, num_experts
from workers.models.loading import LoadedModel
from workers.recordings import used

ROOT = Path(__file__).parents[2]


class Kind(NamedTuple):
    model_type: str
    """A family whose routers are of this kind."""
    weighed: bool = True
    """Whether its weights differ from the probabilities of the chosen experts."""
    softened: bool = False
    """Whether its routers return probabilities in place of logits, as Gemma 4's, whose code takes long to import."""


KINDS = {
    "softmax, renormalized": Kind("mixtral"),
    "softmax, and a shared expert with a gate": Kind("qwen2_moe", weighed=False),
    "softmax in groups, scaled": Kind("deepseek_v2", weighed=False),
    "sigmoid with a correction bias, in groups, behind a dense layer": Kind("deepseek_v3"),
    "sigmoid with a correction bias, in one group": Kind("glm4_moe"),
    "top k before the softmax, with a bias": Kind("gpt_oss"),
    "top k before the softmax, in a module of the router": Kind("granitemoe"),
    "sparsemixer": Kind("phimoe"),
    "probabilities first": Kind("mixtral", softened=True),
    "top 1 without indices, whose experts are given scaled rows": Kind("llama4_text"),
    "a correction bias of its block": Kind("minimax_m2"),
    "linear attention between": Kind("qwen3_next"),
    "Mamba between": Kind("jamba", weighed=False),
}
BESIDE = r"its recorded choices are not those of its router for these tokens"
MESSAGES = {
    "a layer off by one": BESIDE,
    "an earlier batch": BESIDE,
    "an earlier batch, by shape": BESIDE,
    "swapped routers": r"the router recorded as that of layer \d fired|its router fired 0 times",
    "swapped answers": BESIDE,
    "probabilities for weights": used.OTHERS,
}


@pytest.fixture(scope="module")
def tiny_model_of() -> Iterator[Callable[[str], Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tests" / "benchmarks")
        from tiny_families import tiny_model

        yield tiny_model


def engine_of(model: Any) -> ModelEngine:
    """An engine of a model that runs with transformers' own forward pass."""
    base = model.base_model.eval().requires_grad_(False)
    config = base.config.get_text_config()
    return ModelEngine(
        LoadedModel(
            folder=Path(),
            model=base,
            routers=find_routers(base),
            num_experts=num_experts(config),
            experts_per_token=experts_per_token(config),
            provenance={"quantization": "none", "expert_backend": "eager", "matmul": "bf16"},
        )
    )


def softened(own: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Any]:
    """A router's forward that gives probabilities first."""

    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, *others = own(hidden)
        return logits.softmax(dim=-1), *others

    return forward


@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_stops_the_capture_of_every_kind_of_router_and_names_the_layer(
    kind: str, tiny_model_of: Callable[[str], Any]
) -> None:
    engine = engine_of(tiny_model_of(KINDS[kind].model_type))
    for router in engine.recorder.routers.values() if KINDS[kind].softened else ():
        router.forward = softened(router.forward)
    wanted = engine.route(*batch(2))
    for fault, plant in FAULTS.items():
        found = outcome(engine, plant, wanted)
        if plant is probabilities_for_weights and not KINDS[kind].weighed:
            assert found == NO_HARM, fault
        else:
            assert re.match(rf"layer \d: ({MESSAGES[fault]})", found), f"{fault}: {found}"
    again = engine.route(*batch(2))
    assert all(np.array_equal(again[name], wanted[name]) for name in wanted), "a fault was left behind"


def test_a_capture_with_a_fault_writes_no_routes_and_says_which_layer(
    command: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The expert that a token meets depends on the token. " * 8)
    options = ("--local", "--model", "tiny", "--device", "cpu", "--quantization", "none", "--sequence_length", "32")
    with probabilities_for_weights(SimpleNamespace(num_experts=8)):
        ran = command(*options, "--dataset", tmp_path / "text.txt", "--store", tmp_path / "s.zarr")
    state = coverage(tmp_path / "s.zarr", "text")
    assert (ran.status, state.shards_done) == (3, 0)
    assert not [name for name in store_files(tmp_path / "s.zarr") if re.match(r"text/(expert|weight)/c/", name)]
    assert state.quarantined
    for record in state.quarantined.values():
        assert all(f"layer 0: {used.OTHERS}, first seen at position" in error for error in record["errors"])
    assert f"layer 0: {used.OTHERS}" in ran.err
