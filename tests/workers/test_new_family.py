"""A family that no generic rule supports is added as described in CONTRIBUTING.md; until then the errors refer to
it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from router_faults import FAULTS, batch, outcome
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from workers.engine import load_engine
from workers.models import family, routers
from workers.models.description import describe_model
from workers.models.family import HOW_TO_ADD
from workers.recordings import used
from workers.shard import RoutingError

ROOT = Path(__file__).parents[2]
LAYERS, EXPERTS, K, HIDDEN = 3, 8, 2, 32


class InventedConfig(transformers.PretrainedConfig):
    model_type = "invented"
    vocab_size: int = 100
    hidden_size: int = HIDDEN
    num_hidden_layers: int = LAYERS
    num_experts: int = EXPERTS
    experts_for_a_token: int = K
    max_position_embeddings: int = 64
    experts_left_out: int = 0
    """The faults are in the last layer."""


class InventedRouter(nn.Module):
    """Returns weights and indices in one tensor, the weights first: a softmax of the square roots of positive
    logits."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, HIDDEN))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        best, index = nn.functional.linear(hidden, self.weight).topk(K, dim=-1)
        return torch.cat([best.relu().sqrt().softmax(dim=-1), index.to(best.dtype)], dim=-1)


class InventedExperts(nn.Module):
    """Each scales the hidden states by one number per dimension."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(experts, HIDDEN))

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.einsum("th,tkh,tk->th", hidden, self.scale[index], weight)


class InventedLayer(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate, self.experts = InventedRouter(experts), InventedExperts(experts)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, 1)
        weight, index = self.gate(flat).chunk(2, dim=-1)
        return hidden + self.experts(flat, index.long(), weight).view_as(hidden)


class InventedModel(transformers.PreTrainedModel):
    config_class = InventedConfig
    base_model_prefix = "model"

    def __init__(self, config: InventedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, HIDDEN)
        sizes = [EXPERTS] * (LAYERS - 1) + [EXPERTS - config.experts_left_out]
        self.layers = nn.ModuleList(InventedLayer(size) for size in sizes)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As they are drawn."""

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        hidden: torch.Tensor = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def read(output: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The reader that the family needs."""
    weight_TK, index_TK = output.reshape(-1, 2 * k).chunk(2, dim=-1)
    return index_TK.long(), weight_TK.float()


def checkpoint(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(3)
    InventedModel(InventedConfig(**changes)).save_pretrained(folder)
    return folder


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The family is known to transformers but not to this project."""
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "invented", InventedConfig)
    monkeypatch.setitem(transformers.AutoModel._model_mapping._extra_content, InventedConfig, InventedModel)
    return monkeypatch


def rejected(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"[iI]nvented") as error:
        describe_model(folder, quantization="none", device_type="cpu")
    return str(error.value)


def test_the_errors_for_an_unknown_family_link_to_a_section_that_names_what_adds_it(
    known: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "invented")
    message = rejected(folder)
    assert "has none of num_experts_per_tok" in message
    assert message.endswith(HOW_TO_ADD)
    known.setattr(family, "_EXPERTS_PER_TOKEN_NAMES", ("experts_for_a_token",))
    message = rejected(folder)
    assert "(InventedRouter) cannot be recorded, at layer 0: no choices of 2 experts per token" in message
    assert message.endswith(HOW_TO_ADD)
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [section] = [part for part in page.split("\n\n") if part.startswith("**Add a model family**")]
    for name in ("_NUM_EXPERTS_NAMES", "_EXPERTS_PER_TOKEN_NAMES", "find_routers"):
        assert f"`{name}`" in section
        assert hasattr(family, name)
    assert "`READERS`" in section


def test_with_its_names_and_its_reader_it_is_captured_as_its_own_modules_choose_and_every_fault_is_found(
    known: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "invented")
    known.setattr(family, "_EXPERTS_PER_TOKEN_NAMES", ("experts_for_a_token",))
    known.setitem(routers.READERS, "InventedRouter", read)
    engine = load_engine(folder, quantization="none", device="cpu")
    token, length = batch(2)
    found = engine.route(token, length)
    model, given = transformers.AutoModel.from_pretrained(folder), []
    for layer in model.layers:
        layer.experts.register_forward_pre_hook(lambda _, args: given.append(args[1:]))
    with torch.inference_mode():
        model(torch.from_numpy(token.astype(np.int64)))
    for at, (index, weight) in enumerate(given):
        np.testing.assert_array_equal(found["expert"][:, :, at].reshape(-1, K), index.numpy())
        np.testing.assert_array_equal(found["weight"][:, :, at].reshape(-1, K), weight.numpy().astype(np.float16))
    for fault, plant in FAULTS.items():
        if fault != "probabilities for weights":
            assert outcome(engine, plant, found).startswith("layer "), fault
    known.setitem(routers.READERS, "InventedRouter", lambda output, k: (read(output, k)[0], read(output, k)[1] ** 2))
    with pytest.raises(RoutingError, match=used.OTHERS):
        engine.route(token, length)


def test_a_model_whose_layers_have_different_numbers_of_experts_is_rejected_by_name(
    known: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known.setattr(family, "_EXPERTS_PER_TOKEN_NAMES", ("experts_for_a_token",))
    known.setattr(InventedRouter, "forward", with_logits)
    assert "2" in str(describe_model(checkpoint(tmp_path / "alike"), quantization="none", device_type="cpu"))
    message = rejected(checkpoint(tmp_path / "invented", experts_left_out=3))
    assert (
        "(InventedRouter) cannot be recorded, at layer 2: it chooses among 5 experts, but num_experts is 8" in message
    )


def with_logits(router: InventedRouter, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    logits = nn.functional.linear(hidden, router.weight)
    return logits, *logits.softmax(dim=-1).topk(K, dim=-1)


def test_a_number_of_choices_for_each_layer_is_read_where_all_are_equal_and_rejected_by_name_where_they_differ() -> (
    None
):
    config = InventedConfig()
    config.moe_topk = [2, 2, 2]
    assert family.experts_per_token(config) == 2
    config.moe_topk = [2, 2, 1]
    with pytest.raises(ValueError, match=r"'invented' has layers that differ in moe_topk \(\[2, 2, 1\]\)"):
        family.experts_per_token(config)
