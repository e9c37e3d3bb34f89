"""The identity of a capture: a flat mapping that is hashed before any text is tokenized.

Byte-identity is promised for equal identity, halvings, device type and package versions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Identity = Mapping[str, Any]
"""Field name to a JSON value: model and revision, quantization, tokenizer and text hashes, P, S, ..."""


LATER: dict[str, Any] = {
    "routing_version": 1,
    "template_date": None,
    "skip_unrenderable": False,
    "matmul": "bf16",
    "weight_scales": "row",
    "record": [],
    "top_logits": 0,
    "weight_bits": 10,
    "mask": [],
    "force": [],
    "top_k": None,
    "routes_from": None,
    "routes_weights": False,
    "effect_layers": [],
}
"""Fields that were added after the first captures, with the value that describes the behavior before they existed. A
field with that value is left out of an identity, so that older captures resume and compare as before."""


MODEL = (
    *(
        "model",
        "model_revision",
        "quantization",
        "weight_scales",
        "matmul",
        "compute_dtype",
        "gate_precision",
        "expert_backend",
    ),
    *("attention", "routing_version", "tokenizer", "layers", "num_experts", "experts_per_token"),
    *("mask", "force", "top_k", "routes_from", "routes_weights"),
)
"""Fields that decide which experts a token gets, independent of the text."""

TEXT = (
    *("bos", "bos_id", "chat_template", "template_date", "sequence_length", "skip_unrenderable"),
    *("limit_documents", "limit_tokens", "rows_per_shard", "batch_tokens", "schema_version"),
    *("record", "top_logits", "weight_bits", "effect_layers"),
)
"""Fields that decide which tokens are routed, in which rows and batches, what is recorded besides their experts, and
how it is stored; the fields `text_...` do so too."""


def model_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Differences between the models of two captures, without those that concern only their texts.

    If this is empty, differences between their routes are due to their texts.

    Parameters
    ----------
    one, other
        Attributes of the captures, from `store.attributes`. For a capture without `identity` the attributes of the same
        names are compared.

    Returns
    -------
    dict
        The fields of `MODEL` that differ, in that order, with both values; None if a capture does not have the field.
    """
    here, there = ({**LATER, **side.get("identity", side)} for side in (one, other))
    values = {name: json.loads(json.dumps([here.get(name), there.get(name)])) for name in MODEL}  # tuples equal lists
    return {name: (first, second) for name, (first, second) in values.items() if first != second}


TOLD = 6  # number of experts that are named (arbitrary)


def changes_in_words(fields: Mapping[str, Any]) -> str:
    """What was changed about a model's choices; empty if nothing was changed.

    Parameters
    ----------
    fields
        An identity, or attributes.

    Examples
    --------
    >>> changes_in_words({"mask": ["7:1"], "top_k": 3})
    'mask 7:1; top_k 3'
    """
    words = [_named(name, fields[name]) for name in ("mask", "force") if fields.get(name)]
    if fields.get("top_k"):
        words.append(f"top_k {fields['top_k']}")
    if source := fields.get("routes_from"):
        words.append(f"routes{' and weights' if fields.get('routes_weights') else ''} from capture {source[:8]}")
    return "; ".join(words)


def _named(name: str, experts: str | Sequence[str]) -> str:
    experts = [experts] if isinstance(experts, str) else list(experts)  # netCDF keeps a list of one as a text
    more = f" and {len(experts) - TOLD:,} more" if len(experts) > TOLD else ""
    return f"{name} {', '.join(experts[:TOLD])}{more}"


def identity_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An identity from all its fields, without those of `LATER` that have their first value."""
    return {name: value for name, value in fields.items() if name not in LATER or value != LATER[name]}


def identity_hash(identity: Identity) -> str:
    """SHA-256 of the canonical JSON of an identity."""
    text = json.dumps(identity, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line for every field in which two mappings differ, with both values; a field of `LATER` may be missing."""
    stored, wanted = (LATER | json.loads(json.dumps(side)) for side in (stored, wanted))  # tuples equal lists
    fields = sorted(stored.keys() | wanted.keys())
    return [
        f"{name}: the store has {stored.get(name)!r}, this run has {wanted.get(name)!r}"
        for name in fields
        if stored.get(name) != wanted.get(name)
    ]


def refuse_other_identity(where: str, stored: Identity, wanted: Identity) -> None:
    """Raise a ValueError that names every field in which the capture in the store differs from the requested one."""
    lines = differences(stored, wanted)
    if not lines:
        return
    advice = "give this run another name with --name, or use another --store"
    if any(line.startswith("limit_documents:") for line in lines):
        advice += " (a capture cannot grow: another --limit_documents is another capture)"
    raise ValueError(f"{where} holds another capture:\n  " + "\n  ".join(lines) + f"\n{advice}")
