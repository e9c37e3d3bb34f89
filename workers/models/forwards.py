"""Which model families have a forward of their own, faster than transformers', up to the last router.

A family is one module in this folder, and one line in `FORWARDS`. The module is imported only for a model of its
class. Every other model is applied as transformers does it.
"""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, ClassVar, NamedTuple, Protocol

FORWARDS: dict[str, str] = {
    "MixtralModel": "workers.models.decoder:MixtralForward",
    "Qwen3MoeModel": "workers.models.decoder:DecoderForward",
    "OlmoeModel": "workers.models.decoder:DecoderForward",
    "Qwen2MoeModel": "workers.models.decoder:DecoderForward",
    "GptOssModel": "workers.models.sinks:GptOssForward",
    "DeepseekV2Model": "workers.models.latent:LatentForward",
    "DeepseekV3Model": "workers.models.latent:LatentForward",
}
"""Name of transformers' model class to the forward, as ``module:class``."""


class LastHidden(NamedTuple):
    """What a forward that ran to its end returns."""

    before_TH: Any
    """The hidden states before the final norm, shape (tokens, hidden)."""
    normed_TH: Any
    """And after it."""


class Forward(Protocol):
    """A model's layers, ready to be applied.

    Parameters
    ----------
    model
        A loaded model, for which `applies` was true.
    matmul
        One of its `matmuls`.
    """

    expert_backend: ClassVar[str]
    """The value of `expert_backend` in the identity of captures made with it."""
    matmuls: ClassVar[tuple[str, ...]]
    """In what it can multiply: bf16, fp8."""

    whole: bool
    """Whether the layers are run to their end; else up to the last router. False unless it is set."""
    seen: Callable[[Any, Any, Any], None] | None
    """Called in each layer with the router, the outputs of its experts before they are weighed, shape (slots, hidden),
    and which slot each choice has, shape (tokens, k). None unless it is set."""
    used: Callable[[Any, Any, Any], None] | None
    """Called in each layer with the router, the choices with which its experts are computed, and the weights with which
    they are mixed, shape (tokens, k). None unless it is set."""
    attended: Callable[[int, Any], None] | None
    """Called behind the attention of each layer, by its place from 0, with the hidden states that have it added, shape
    (tokens, hidden); they are overwritten later. None unless it is set."""

    def __init__(self, model: Any, matmul: str) -> None: ...

    @classmethod
    def applies(cls, model: Any, quantization: str) -> bool:
        """Whether it can apply this model; asked of the model without its weights.

        Parameters
        ----------
        model
            transformers' model, perhaps on the meta device.
        quantization
            nf4, fp4, fp8, int8 or none.
        """
        ...

    def __call__(self, input_ids: Any, **ignored: Any) -> LastHidden | None:
        """Run the layers up to the last router, or to their end; each router is called as a module: hooks on it fire.

        Parameters
        ----------
        input_ids : int64 tensor, shape (rows, positions)
        ignored
            What transformers' models take beside it: no mask, no cache.
        """
        ...

    def resumed(self, index: int, residual_TH: Any, positions: int) -> LastHidden:
        """Run the layers to their end from behind the attention of one on, with what `attended` was shown of it."""
        ...


def own_forward(model: Any, quantization: str) -> type[Forward] | None:
    """The forward that a model's family has for it; None where transformers' own is used."""
    where = FORWARDS.get(type(model).__name__)
    if where is None:
        return None
    forward: type[Forward] = resolve_name(where)
    return forward if forward.applies(model, quantization) else None


def forward_of(model: Any, quantization: str, expert_backend: str, matmul: str) -> Callable[..., Any]:
    """What applies a loaded model: its family's forward where that is its `expert_backend`, else the model itself."""
    forward = own_forward(model, quantization)
    return forward(model, matmul) if forward is not None and forward.expert_backend == expert_backend else model
