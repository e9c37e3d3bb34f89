"""Which differences between two captures' identities concern the model, and which the text."""

from typing import Any

import pytest

from store import model_differences
from store.identity import LATER, MODEL, TEXT

CAPTURE: dict[str, Any] = {
    "model": "org/mixtral",
    "model_revision": "a1",
    "quantization": "nf4",
    "compute_dtype": "bfloat16",
    "gate_precision": "compute_dtype",
    "expert_backend": "sorted",
    "attention": "sdpa",
    "tokenizer": "c3",
    "layers": [0, 1],
    "num_experts": 8,
    "experts_per_token": 2,
    "text_sha256": "d4",
    "text_split": "train",
    "text_field": "text",
    "bos": "row",
    "bos_id": 1,
    "sequence_length": 2048,
    "rows_per_shard": 128,
    "batch_tokens": 32_768,
    "limit_documents": None,
    "limit_tokens": None,
    "schema_version": 1,
    "chat_template": None,
}


def attrs(**changes: Any) -> dict[str, Any]:
    """Attributes of a capture; the short name of a local folder is the same for every checkpoint in it."""
    return {"model": "mixtral", "title": "routes", "identity": CAPTURE | changes}


OTHERS = {
    "model": "org/other",
    "model_revision": "b2",
    "quantization": "none",
    "matmul": "fp8",
    "weight_scales": "128x128",
    "compute_dtype": "float32",
    "gate_precision": "quantization",
    "expert_backend": "eager",
    "attention": "eager",
    "routing_version": 2,
    "tokenizer": "e5",
    "layers": [0, 1, 2],
    "num_experts": 16,
    "experts_per_token": 4,
    "mask": ["1:3"],
    "force": ["0:2"],
    "top_k": 4,
    "routes_from": "f6",
    "routes_weights": True,
}


@pytest.mark.parametrize("field", MODEL)
def test_what_decides_a_token_s_experts_is_named_with_both_values(field: str) -> None:
    first = CAPTURE.get(field, LATER.get(field))
    assert model_differences(attrs(), attrs(**{field: OTHERS[field]})) == {field: (first, OTHERS[field])}
    assert model_differences(attrs(**{field: OTHERS[field]}), attrs()) == {field: (OTHERS[field], first)}


@pytest.mark.parametrize("field", [*TEXT, "text_sha256", "text_split", "text_revision"])
def test_what_decides_the_text_or_how_it_is_stored_is_left_out(field: str) -> None:
    assert model_differences(attrs(), attrs(**{field: "another"})) == {}


def test_they_are_named_in_their_order_and_what_is_not_said_is_none() -> None:
    other = attrs(quantization="none", model_revision="b2", text_sha256="x")
    assert list(model_differences(attrs(), other)) == ["model_revision", "quantization"]
    del other["identity"]["compute_dtype"]
    assert model_differences(attrs(), other)["compute_dtype"] == ("bfloat16", None)
    assert model_differences(attrs(layers=(0, 1)), attrs()) == {}, "a list, as JSON has it"
    assert model_differences(attrs(routing_version=LATER["routing_version"]), attrs()) == {}, "left out means the first"


def test_without_an_identity_the_attributes_are_compared() -> None:
    assert model_differences({"model": "a", "dataset": "x"}, {"model": "a", "dataset": "y"}) == {}
    assert model_differences({"model": "a"}, {"model": "b"}) == {"model": ("a", "b")}


def test_every_field_that_came_later_is_one_or_the_other() -> None:
    assert LATER.keys() <= {*MODEL, *TEXT}
    assert not {*MODEL} & {*TEXT}
