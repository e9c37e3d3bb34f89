"""A family with its own forward pass is one line in the registry, and the forward pass's attributes are recorded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from test_families import POSITIONS, VOCABULARY, checkpoint_of

from workers import capture_texts, describe_model, load_model, tiny_checkpoint
from workers.engine import ModelEngine
from workers.models.decoder import MixtralForward
from workers.models.forwards import FORWARDS, own_forward

ROOT = Path(__file__).parents[2]


class OlmoeForward:
    """Runs OLMoE like transformers, and counts how often."""

    expert_backend: ClassVar[str] = "counted"
    matmuls: ClassVar[tuple[str, ...]] = ("bf16",)

    def __init__(self, model: Any, matmul: str) -> None:
        self.model, self.calls = model, 0

    @classmethod
    def applies(cls, model: Any, quantization: str) -> bool:
        return quantization == "none" and model.config.num_experts_per_tok == 4

    def __call__(self, input_ids: torch.Tensor, **others: Any) -> None:
        self.calls += 1
        self.model(input_ids=input_ids, **others)


@pytest.fixture
def olmoe(tmp_path: Path) -> Path:
    return checkpoint_of("olmoe", tmp_path / "olmoe")


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORWARDS, "OlmoeModel", f"{__name__}:OlmoeForward")


def rows() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(3, VOCABULARY, (3, POSITIONS)).astype(np.int32), np.array([POSITIONS, 5, 1])


def test_a_second_family_is_one_line_and_its_routes_are_those_of_the_model(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = ModelEngine(load_model(olmoe, quantization="none", device="cpu"))
    assert stock.forward is stock.model
    assert stock.description["expert_backend"] == "eager"
    monkeypatch.setitem(FORWARDS, "OlmoeModel", f"{__name__}:OlmoeForward")
    assert describe_model(olmoe, quantization="none", device_type="cpu")["expert_backend"] == "counted"
    own = ModelEngine(load_model(olmoe, quantization="none", device="cpu"))
    assert own.description["expert_backend"] == "counted"
    assert isinstance(own.forward, OlmoeForward)
    found, wanted = own.route(*rows()), stock.route(*rows())
    assert own.forward.calls == 1
    filled = np.arange(POSITIONS) < rows()[1][:, None]
    for name in ("expert", "weight"):
        np.testing.assert_array_equal(found[name][filled], wanted[name][filled])


@pytest.mark.usefixtures("_registered")
def test_a_forward_is_used_only_where_it_says_that_it_applies(olmoe: Path) -> None:
    assert describe_model(olmoe, quantization="nf4", device_type="cpu")["expert_backend"] == "grouped"
    loaded = load_model(olmoe, quantization="nf4", device="cpu")
    assert ModelEngine(loaded).forward is loaded.model
    file = olmoe / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_experts_per_tok": 2}))
    assert describe_model(olmoe, quantization="none", device_type="cpu")["expert_backend"] == "eager"


@pytest.mark.parametrize(
    ("quantization", "changes", "used"),
    [
        ("nf4", {}, True),
        ("fp4", {}, True),
        ("fp8", {}, True),
        ("int8", {}, False),
        ("none", {}, False),
        ("nf4", {"sliding_window": 16}, False),
        ("nf4", {"hidden_act": "gelu"}, False),
    ],
)
def test_mixtral_s_own_forward_is_for_plain_ones_in_4_bits(
    quantization: str, changes: dict[str, Any], used: bool
) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny_checkpoint())
    config.update(changes)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    assert own_forward(model, quantization) is (MixtralForward if used else None)


@pytest.mark.parametrize(("quantization", "backend"), [("nf4", "grouped"), ("int8", "unfused"), ("none", "eager")])
def test_another_family_has_none(tmp_path: Path, quantization: str, backend: str) -> None:
    loaded = load_model(checkpoint_of("phimoe", tmp_path), quantization=quantization, device="cpu")
    assert loaded.provenance["expert_backend"] == backend
    assert ModelEngine(loaded).forward is loaded.model


def test_the_forwards_are_not_imported_before_a_model_needs_them() -> None:
    code = "import sys, workers.models.loading\nprint(*[name for name in sys.modules if name.startswith('workers')])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "workers.models.forwards" in done
    assert "workers.models.decoder" not in done


def test_a_notebook_captures_with_it_too(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`capture_texts` uses the forward pass that the loaded model's description names."""
    asked: list[object] = []
    original = MixtralForward.__call__
    monkeypatch.setattr(
        MixtralForward, "__call__", lambda self, *args, **others: asked.append(1) or original(self, *args, **others)
    )
    found = capture_texts(tiny_model, ["one two three"])
    assert bool(asked) == (found.attrs["expert_backend"] == "sorted") == (found.attrs["quantization"] == "nf4")


def test_a_capture_that_began_with_unfused_experts_is_described_and_loaded_so(olmoe: Path) -> None:
    asked = {"quantization": "nf4", "expert_backend": "unfused"}
    assert describe_model(olmoe, device_type="cpu", **asked)["expert_backend"] == "unfused"
    old, new = (ModelEngine(load_model(olmoe, device="cpu", **given)) for given in (asked, {"quantization": "nf4"}))
    assert old.forward is old.model
    one, other = (engine.route(*rows())["expert"] for engine in (old, new))
    assert (one == other).mean() > 0.98, "near-ties aside they choose alike"
    with pytest.raises(ValueError, match="'sorted' is none of unfused, grouped"):
        load_model(olmoe, quantization="nf4", device="cpu", expert_backend="sorted")


@pytest.mark.parametrize(
    ("name", "own"), [("gpt_oss", "grouped_sinks"), ("deepseek_v3", "grouped_latent"), ("olmoe", "grouped")]
)
def test_a_capture_that_began_before_its_family_s_forward_is_described_and_loaded_so(
    name: str, own: str, tmp_path: Path
) -> None:
    folder = checkpoint_of(name, tmp_path)
    asked = {"quantization": "nf4", "expert_backend": "grouped"}
    assert describe_model(folder, device_type="cpu", **asked)["expert_backend"] == "grouped"
    old, new = (ModelEngine(load_model(folder, device="cpu", **given)) for given in (asked, {"quantization": "nf4"}))
    assert new.description["expert_backend"] == own
    assert (old.forward is old.model) == (own != "grouped"), "the present forward gives what the capture has"
    one, other = (engine.route(*rows())["expert"] for engine in (old, new))
    assert (one == other).mean() > 0.98, "near-ties aside they choose alike"
    if own != "grouped":
        with pytest.raises(ValueError, match="--matmul fp8 needs a forward pass of this project"):
            describe_model(folder, device_type="cpu", matmul="fp8", **asked)
