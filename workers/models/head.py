"""The published language-model head, applied to given hidden states a few rows at a time.

N rows, H hidden, V vocabulary. The head is never quantized: it has the published values, in the compute dtype. Steps
after its product (a bias, a scale, a soft cap) are run by the family's own code: only the model under the head is
replaced, by one that returns the given hidden states.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from workers.models.checkpoint import Checkpoint, find_checkpoint, tensor_names, weight_files
from workers.models.description import build_skeleton

CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**29}
"""Bytes of float32 logits at a time: 131 and 4,194 rows of Mixtral. On a CPU twice as fast as 1,024 rows (measured);
arbitrary on a GPU."""


class _Given(nn.Module):
    """Replaces the model under the head."""

    def forward(self, *, inputs_embeds: torch.Tensor, **ignored: Any) -> Any:
        """A model output that holds only the given hidden states, as the last ones."""
        nothing = dict.fromkeys(("past_key_values", "hidden_states", "attentions", "router_logits"))
        return SimpleNamespace(last_hidden_state=inputs_embeds, **nothing)


class Head:
    """Computes log-probabilities of tokens from hidden states after the last norm.

    Parameters
    ----------
    folder
        The checkpoint.
    model
        The loaded model under the head, for its dtype, its device, and its embedding if the head is tied to it.

    Raises
    ------
    ValueError
        When the checkpoint has no head, or a quantized one.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        embedding = model.get_input_embeddings().weight
        causal = causal_skeleton(folder, embedding.dtype)
        vocabulary = causal.config.get_text_config().vocab_size
        self.rows = max(1, CHUNK_BYTES[embedding.device.type] // (4 * vocabulary))
        self.device, self.dtype = embedding.device, embedding.dtype
        wanted = dict(causal.named_parameters())
        tied = causal.config.get_text_config().tie_word_embeddings
        found = {name: embedding for name in wanted if tied and wanted[name].shape == embedding.shape}
        found |= _tensors(folder, {name: part for name, part in wanted.items() if name not in found})
        for name, part in found.items():
            owner, _, leaf = name.rpartition(".")
            given = part.to(embedding.device, embedding.dtype)
            setattr(causal.get_submodule(owner), leaf, nn.Parameter(given, requires_grad=False))
        self.causal = causal.eval()

    def logits(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        """The logits of the published forward pass for these rows; shape (N, V), in the compute dtype."""
        found: torch.Tensor = self.causal(inputs_embeds=hidden_NH[None], use_cache=False).logits[0]
        return found

    def logprobs(self, hidden_TH: torch.Tensor, place_N: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """The log-probability of a token after each of some hidden states.

        Parameters
        ----------
        place_N
            Indices of the hidden states.
        target_N
            The token that follows each.

        Returns
        -------
        tensor, float32, shape (N,)
        """
        parts = [
            self.logits(hidden_TH[place]).log_softmax(-1, dtype=torch.float32).gather(-1, target[:, None])[:, 0]
            for place, target in zip(*(torch.split(part, self.rows) for part in (place_N, target_N)), strict=True)
        ]
        return torch.cat(parts)


def causal_skeleton(folder: Path, dtype: torch.dtype) -> Any:
    """The family's model with its head on the meta device and nothing under the head."""
    checkpoint = Checkpoint(folder=folder, model=folder.name, revision="")
    causal = build_skeleton(checkpoint, dtype, head=True)
    setattr(causal, causal.base_model_prefix, _Given())
    return causal


def head_bytes(model: str | Path, revision: str | None, dtype: torch.dtype) -> int:
    """Bytes of the head's own weights, from the configuration alone; 0 if it is tied to the embedding."""
    causal = causal_skeleton(find_checkpoint(model, revision, weights=False).folder, dtype)
    tied = causal.config.get_text_config().tie_word_embeddings
    return 0 if tied else sum(parameter.nbytes for parameter in causal.parameters())


def _tensors(folder: Path, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The head's weights from the checkpoint's files."""
    names = tensor_names(folder)
    owners = {name.rpartition(".")[0] for name in wanted}
    if missing := sorted(wanted.keys() - {*names}):
        raise ValueError(f"{folder} has no {missing[0]}, which --record logprob needs: give a checkpoint with its head")
    if odd := [name for name in names if name not in wanted and any(name.startswith(f"{one}.") for one in owners)]:
        raise ValueError(
            f"{folder} has a quantized head ({odd[0]}), but --record logprob needs the published one: give the"
            " original checkpoint"
        )
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in wanted.keys() & set(tensors.keys())}
    for name, part in found.items():
        if part.shape != wanted[name].shape or not part.is_floating_point():
            raise ValueError(
                f"{folder} has {name} of {part.dtype} {tuple(part.shape)}, but --record logprob needs floats of"
                f" {tuple(wanted[name].shape)} there"
            )
    return found
