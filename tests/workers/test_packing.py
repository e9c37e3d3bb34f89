"""Experts go into the tensors of their layer while a checkpoint is read, whichever way it holds them."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from test_families import checkpoint_of
from torch import nn

from workers.models.loading import load_model

IDS = torch.arange(96).view(3, 32)
SPECIAL = {"gpt_oss": (3 * 16 * 2, False), "granitemoe": (3 * 16 * 3, True)}
"""Families whose checkpoints keep experts in one tensor: matrices, and whether gate lies above up."""


@torch.inference_mode()
def states(model: Any) -> torch.Tensor:
    return model(IDS, use_cache=False).last_hidden_state


def in_nf4(matrix: torch.Tensor) -> torch.Tensor:
    packed = bitsandbytes.functional.quantize_4bit(
        matrix.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return bitsandbytes.functional.dequantize_4bit(*packed)


def in_e4m3(matrix: torch.Tensor) -> torch.Tensor:
    scale = matrix.abs().amax(1, keepdim=True) / 448
    return (matrix / scale).to(torch.float8_e4m3fn).float() * scale


@torch.inference_mode()
def reference(folder: Path, rounded: Any, *, halves: bool) -> nn.Module:
    """transformers' own model in float32; each matrix is rounded as (outputs, inputs), whichever way it lies."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    for module in model.modules():
        if type(module) is nn.Linear:
            module.weight.copy_(rounded(module.weight))
        if hasattr(module, "gate_up_proj"):
            for expert in (*module.gate_up_proj, *module.down_proj):
                matrix = expert.T if module.is_transposed else expert
                parts = matrix.chunk(2) if halves and len(matrix) > len(matrix.T) else [matrix]
                for part in parts:
                    part.copy_(rounded(part))
    return model


@pytest.mark.parametrize(("quantization", "rounded"), [("nf4", in_nf4), ("fp8", in_e4m3)])
@pytest.mark.parametrize("name", SPECIAL)
def test_experts_with_biases_or_a_gate_of_their_own_compute_what_their_dequantized_matrices_compute(
    name: str, quantization: str, rounded: Any, tmp_path: Path
) -> None:
    folder, (matrices, halves) = checkpoint_of(name, tmp_path), SPECIAL[name]
    loaded = load_model(folder, quantization=quantization, device="cpu")
    assert loaded.provenance["quantized_expert_matrices"] == matrices
    got = states(loaded.model)
    torch.testing.assert_close(got, states(reference(folder, rounded, halves=halves)), rtol=1e-4, atol=1e-4)
    plain = states(load_model(folder, quantization="none", device="cpu").model)
    assert not torch.allclose(got, plain, atol=1e-2), "the matrices were not quantized at all"
