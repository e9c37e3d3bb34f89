"""The arrays that `--record` adds, and weights in another precision, as entries of the layout."""

from typing import Any

import numpy as np
import pytest
from fake_model import fake_layout

from store import Layout
from store.layout import SHARD_BYTES

RECORD = ("logit", "output_norm", "logprob")


def dims(layout: Layout, name: str) -> tuple[str, ...]:
    return layout.arrays()[name].dims


def test_recorded_arrays_have_these_dims_dtypes_and_fills() -> None:
    arrays = fake_layout(record=RECORD).arrays()
    wanted = {
        "logit": ("doc", "position", "layer", "expert_id"),
        "output_norm": ("doc", "position", "layer", "k"),
        "logprob": ("doc", "position"),
    }
    assert {name: arrays[name].dims for name in RECORD} == wanted
    assert {arrays[name].dtype for name in RECORD} == {"float32"}
    assert all(np.isnan(arrays[name].fill) and arrays[name].captured for name in RECORD)
    assert arrays["logit"].trailing == (8, 3, 8)


@pytest.mark.parametrize(("experts", "dtype", "fill"), [(64, "uint8", 255), (300, "uint16", 65_535)])
def test_the_largest_logits_stand_beside_their_experts(experts: int, dtype: str, fill: int) -> None:
    layout = fake_layout(num_experts=experts, record=("logit", "logit_expert"), top_logits=5)
    arrays = layout.arrays()
    for name in ("logit", "logit_expert"):
        assert (arrays[name].dims[-1], arrays[name].trailing[-1]) == ("candidate", 5)
    assert (arrays["logit_expert"].dtype, arrays["logit_expert"].fill) == (dtype, fill)
    assert layout.attrs()["top_logits"] == 5
    assert Layout.from_attrs(layout.attrs()) == layout


@pytest.mark.parametrize(
    ("record", "top"), [(("logit",), 4), (("logit_expert",), 4), (("logit", "logit_expert"), 0), (("logit_expert",), 0)]
)
def test_candidates_without_ids_or_ids_without_candidates_are_refused(record: tuple[str, ...], top: int) -> None:
    with pytest.raises(ValueError, match="logit_expert must be recorded with logit if top_logits is 1 or more"):
        fake_layout(record=record, top_logits=top)


@pytest.mark.parametrize("top", [-1, 9, True, "4"])
def test_more_logits_than_experts_are_refused(top: Any) -> None:
    with pytest.raises(ValueError, match=r"top_logits is .*, but must be 0 to 8, the experts"):
        fake_layout(record=("logit", "logit_expert"), top_logits=top)


@pytest.mark.parametrize(("bits", "dtype", "said"), [(10, "float16", None), (23, "float32", None), (5, "float16", 5)])
def test_weights_have_the_dtype_that_holds_their_bits(bits: int, dtype: str, said: int | None) -> None:
    layout = fake_layout(weight_bits=bits)
    weight = layout.arrays()["weight"]
    assert (weight.dtype, weight.attrs.get("mantissa_bits")) == (dtype, said)
    assert Layout.from_attrs(layout.attrs()) == layout
    assert ("weight_bits" in layout.attrs()) == (bits != 10)


@pytest.mark.parametrize("bits", [0, 11, 24, "10"])
def test_other_bits_than_weights_can_have_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"weight_bits is .*, but must be 23, or 1 to 10"):
        fake_layout(weight_bits=bits)


def test_inner_chunks_of_logits_stay_small_and_divide_the_shard() -> None:
    sizes: dict[str, Any] = {"layers": tuple(range(16)), "num_experts": 64, "experts_per_token": 8}
    layout = fake_layout(sequence_length=2048, rows_per_shard=128, record=("logit",), **sizes)
    spec = layout.arrays()["logit"]
    assert spec.shard is not None
    assert np.prod(spec.chunk) * 4 <= 2**23
    assert all(shard % chunk == 0 for shard, chunk in zip(spec.shard, spec.chunk, strict=True))
    assert spec.chunk[1:] == (512, 16, 64)
    assert spec.chunk[0] < layout.arrays()["expert"].chunk[0], "else this tests nothing"


def test_a_shard_whose_logits_are_more_than_a_put_takes_is_refused_naming_them() -> None:
    sizes: dict[str, Any] = {"layers": tuple(range(60)), "num_experts": 256, "sequence_length": 2048}
    fake_layout(rows_per_shard=128, **sizes)
    with pytest.raises(ValueError, match=f"bytes of logit, but the maximum is {SHARD_BYTES:,}"):
        fake_layout(rows_per_shard=128, record=("logit",), **sizes)
