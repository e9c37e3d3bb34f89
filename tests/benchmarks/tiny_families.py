"""A tiny checkpoint with random weights of every mixture-of-experts family in transformers, in its published layout.

The families are found in transformers' own list of models, by their code. Each family's default configuration is made
small by a rule based on the names of its fields; `EXCEPTIONS` has what the rule cannot know.
"""

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

LAYERS, EXPERTS, VOCABULARY = 4, 16, 128

SMALL: tuple[tuple[str, int], ...] = (
    (r"(num|n)(_hidden|_decoder|_encoder)?_layers?$|depth$|^(encoder|decoder)_layers$", LAYERS),
    (r"vocab_size$", VOCABULARY),
    (r"experts_per_tok(en)?$|moe_k$|moe_top_?k$|top_k_experts$|num_selected_experts$", 4),
    (r"(num|n)_(local_|routed_|moe_)?experts$|^moe_num_experts$", EXPERTS),
    (r"(num_|n_)shared_experts?$", 1),
    (r"^n_groups?$|^num_expert_groups?$", 4),
    (r"^topk_group$|^num_limited_groups$", 2),
    (r"first_k_dense_replace$|num_dense_layers$|first_k_dense$", 1),
    (r"lora_rank$|(query|kv)_rank$", 64),
    (r"head_dim$|head_size$", 16),
    (r"(key_value|kv)_heads$", 2),
    (r"^index_n_heads$", 32),  # with few, many keys score exactly 0, and which of those are seen is chance
    (r"heads$", 4),
    (r"(hidden_size|d_model|embed_dim|hidden_dim|n_embd|output_dim|out_hidden_size)$", 64),
    (r"(intermediate_size|intermediate_dim|d_ff|ffn_dim|ffn_hidden_size|mlp_dim|mlp_size)$", 64),
    (r"(sliding_window|chunk_size|index_topk)$", 8),
)
"""The first pattern that a field's name matches decides; only larger numbers are changed, and experts that are None."""

SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
MIXTURE = {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 64}
INDEXED = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
           "indexer_compress_ratio": 2}  # fmt: skip

PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk2": {"gated_norm_rank": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0}},
    "deepseek_ocr2": SPARSE,
    "diffusion_gemma": MIXTURE,
    "ernie4_5_vl_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
    "gemma4": MIXTURE,
    "gemma4_text": MIXTURE,
    "glm4v_moe": {"rope_parameters": PARTIAL},
    "glm4v_moe_text": {"rope_parameters": PARTIAL},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": EXPERTS, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "glm5_next": {"index_topk": 32, "linear_head_dim": 64},
    "glm5_next_text": {"index_topk": 32, "linear_head_dim": 64},
    "jamba": {"mamba_dt_rank": 64},
    "kimi_linear": {"linear_head_dim": 64},
    "longcat_flash": {"zero_expert_num": 4},
    "minimax": {"block_size": 16},
    "qwen4_exp": INDEXED,
    "qwen4_exp_text": INDEXED,
    "step3p7": {"sliding_window": 8},
}
"""By model type: fields of the configuration (of its text part, if it has one) that the rule gets wrong."""

OTHER_PARTS: dict[tuple[str, str], dict[str, Any]] = {
    ("dots3_note", "vision_config"): {
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "num_experts_per_tok": 2,
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    ("dots3_note", "audio_config"): {"adapter_input_size": 64, "adapter_out_dim": 64},
}
"""By model type and part: the same."""

HEADS = (
    transformers.AutoModelForCausalLM,
    transformers.AutoModelForImageTextToText,
    transformers.AutoModelForSeq2SeqLM,
    transformers.AutoModelForTokenClassification,
    transformers.AutoModel,
)
"""The published form of a family: the first of these that it has."""


def families() -> Iterator[str]:
    """The model types whose code mentions router logits or experts, in transformers' order."""
    models = Path(transformers.__file__).parent / "models"
    for model_type in MODEL_MAPPING_NAMES:
        folder = models / model_type_to_module_name(model_type)
        code = "".join(file.read_text() for file in folder.glob("modeling_*.py"))
        if re.search(r"router_logits|self\.experts\b", code):
            yield model_type


def tiny_config(model_type: str) -> Any:
    """A family's default configuration, made small."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_small(kind, EXCEPTIONS.get(model_type, {})))


def _small(kind: Any, exceptions: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a configuration, without the fields that it derives from others."""
    default = kind()
    layers, heads = (vars(default).get(f"num_{what}") for what in ("hidden_layers", "attention_heads"))
    made: dict[str, Any] = {}
    for field in fields(kind):
        value = vars(default).get(field.name, field.default)
        if isinstance(value, transformers.PretrainedConfig):
            others = OTHER_PARTS.get((default.model_type, field.name), {})
            part = _small(type(value), exceptions if field.name == "text_config" else others)
            made[field.name] = part | {"model_type": value.model_type}
        elif field.default is not None or value is None:
            every = field.name.endswith("key_value_heads") and value == heads
            small = 4 if every else _made_small(field.name, value, layers or 0)
            made |= {field.name: small} if small != value else {}
    return made if hasattr(default, "text_config") else made | exceptions


def _made_small(name: str, value: Any, layers: int) -> Any:
    if isinstance(value, list) and len(value) == layers > LAYERS:
        return _varied(value)
    if isinstance(value, dict):
        return {key: _made_small(key, each, layers) for key, each in value.items()}
    if name == "mrope_section":
        return [3, 3, 2]
    if name in ("pad_token_id", "eos_token_id"):
        return 2 if value is not None else None
    for pattern, small in SMALL:
        if re.search(pattern, name):
            known = value is None and "experts" in name
            return small if known else min(value, small) if type(value) is int else value
    return value


def _varied(values: list[Any]) -> list[Any]:
    """As many as there are layers, with each kind among them where there is room."""
    kinds = [value for at, value in enumerate(values) if value not in values[:at]][:LAYERS]
    return [*values[: LAYERS - len(kinds)], *kinds] if len(kinds) > 1 else values[:LAYERS]


def has_experts(model: nn.Module) -> bool:
    """Whether a module of the model is called experts, or a router."""
    return any(re.search(r"(^|\.)(experts|router)$", name) for name, _ in model.named_modules())


def tiny_model(model_type: str) -> Any | None:
    """A family's model with random weights, under its published head; None if it has no experts."""
    config = tiny_config(model_type)
    head = next(head for head in HEADS if type(config) in head._model_mapping)
    with torch.device("meta"):
        if not has_experts(head.from_config(config)):
            return None
    torch.manual_seed(7)
    model = head.from_config(config, dtype=torch.float32)
    computed = {name for name, buffer in model.named_buffers() if buffer.any()}  # of the configuration, as decays are
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name not in computed:
            around = 1.0 if "norm" in name and tensor.ndim == 1 else 0.0
            tensor.normal_(around, 0.15)
    return model


def make_checkpoint(model_type: str, folder: Path) -> bool:
    """Write a family's checkpoint, in shapes as published; False where the model has no experts."""
    model = tiny_model(model_type)
    if model is not None:
        model.save_pretrained(folder, state_dict=_published(model.state_dict()))
    return model is not None


def _published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the rows of experts that compute nothing, which transformers has in one of two parameters."""
    for name, down in list(state.items()):
        both = name.replace("experts.down_proj", "experts.gate_up_proj")
        if name.endswith("experts.down_proj") and both in state:
            state[both] = state[both][: len(down)]
    return state
