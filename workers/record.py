"""What a capture records besides its choices, built from the options. Imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from store.layout import FLOAT16_BITS, FLOAT32_BITS

Recordable = Literal["logits", "output_norm", "logprob"]
WeightPrecision = Literal["float16", "float32", "compact"]

ALL_LOGITS = 64  # largest number of experts of which all logits are kept
TOP_LOGITS = 32  # number of logits kept if there are more experts
MANTISSA_BITS = {"bfloat16": 7, "float16": 10, "float32": 23}
LOGIT_BITS = 2  # a logit of 4 to 8 has a step this many bits above its last mantissa bit, and so has its weight


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """The fields of `store.Layout` that say what is recorded."""

    record: tuple[str, ...] = ()
    """Names of optional arrays."""
    top_logits: int = 0
    weight_bits: int = FLOAT16_BITS

    @property
    def whole(self) -> bool:
        """Whether the experts of the last layer are needed."""
        return not {"output_norm", "logprob"}.isdisjoint(self.record)


CHOICES_ALONE = Recorded()


def what_to_record(
    names: Sequence[str],
    num_experts: int,
    router_dtype: str | None,
    *,
    top_logits: int | None = None,
    weight_precision: str = "float16",
) -> Recorded:
    """The requested arrays and precisions.

    Parameters
    ----------
    names
        Any of `Recordable`.
    num_experts
        E.
    router_dtype
        float32, bfloat16 or float16: the dtype in which routers compute. Only "compact" needs it; otherwise it may be
        None.
    top_logits
        Number of largest logits to keep. None: all if there are at most `ALL_LOGITS` experts, otherwise `TOP_LOGITS`.
    weight_precision
        One of `WeightPrecision`. A weight is the exponential of a logit: its relative error is the logit's absolute
        one. So "compact" keeps `LOGIT_BITS` fewer bits than the routers' dtype has, and at most those of float16.

    Raises
    ------
    ValueError
        When a name is unknown, or a number is out of range.
    """
    for name in names:
        if name not in get_args(Recordable):
            raise ValueError(f"{name!r:.80} cannot be recorded; choose from {', '.join(get_args(Recordable))}")
    if weight_precision not in get_args(WeightPrecision):
        raise ValueError(f"weight_precision {weight_precision!r:.80} is none of {', '.join(get_args(WeightPrecision))}")
    if top_logits is not None and "logits" not in names:
        raise ValueError(f"--top_logits is {top_logits}, but no logits are recorded: add --record logits")
    if top_logits is not None and not 1 <= top_logits <= num_experts:
        raise ValueError(f"--top_logits is {top_logits}, but must be 1 to {num_experts}, the number of experts")
    kept = top_logits or (num_experts if num_experts <= ALL_LOGITS else TOP_LOGITS)
    some = "logits" in names and kept < num_experts
    of_logits = ("logit", "logit_expert") if some else ("logit",)
    if weight_precision == "compact":
        assert router_dtype is not None, "it decides how many bits a weight has"
        bits = min(FLOAT16_BITS, MANTISSA_BITS[router_dtype] - LOGIT_BITS)
    else:
        bits = {"float16": FLOAT16_BITS, "float32": FLOAT32_BITS}[weight_precision]
    return Recorded(
        record=(
            *(of_logits if "logits" in names else ()),
            *(name for name in ("output_norm", "logprob") if name in names),
        ),
        top_logits=kept if some else 0,
        weight_bits=bits,
    )
