"""Model families for which this project has its own forward pass, faster than transformers', up to the last router.

A family is one module in this folder and one line in `FORWARDS`. The module is imported only for a model of its class.
Every other model is run by transformers.
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
"""Maps the name of transformers' model class to the forward pass, as ``module:class``."""


class LastHidden(NamedTuple):
    """The result of a forward pass that ran to the end."""

    before_TH: Any
    """The hidden states before the final norm, shape (tokens, hidden)."""
    normed_TH: Any
    """The hidden states after the final norm."""


class Forward(Protocol):
    """A model's layers, ready to be applied.

    Parameters
    ----------
    model
        A loaded model for which `applies` is true.
    matmul
        One of its `matmuls`.
    """

    expert_backend: ClassVar[str]
    """The value of `expert_backend` in the identity of captures made with it."""
    matmuls: ClassVar[tuple[str, ...]]
    """Precisions in which it can multiply: bf16, fp8."""

    whole: bool
    """Whether all layers are run; otherwise the run ends at the last router. False by default."""
    seen: Callable[[Any, Any, Any], None] | None
    """Called in each layer with the router, the outputs of its experts before they are weighted, shape (slots, hidden),
    and the slot of each choice, shape (tokens, k). None by default."""
    used: Callable[[Any, Any, Any], None] | None
    """Called in each layer with the router, the choices with which its experts are computed, and the weights with which
    they are mixed, shape (tokens, k). None by default."""
    attended: Callable[[int, Any], None] | None
    """Called after the attention of each layer with the layer's index, from 0, and the hidden states that include its
    output, shape (tokens, hidden), which are overwritten later. None by default."""

    def __init__(self, model: Any, matmul: str) -> None: ...

    @classmethod
    def applies(cls, model: Any, quantization: str) -> bool:
        """Whether it can run this model; called with the model before its weights are loaded.

        Parameters
        ----------
        model
            transformers' model, possibly on the meta device.
        quantization
            nf4, fp4, fp8, int8 or none.
        """
        ...

    def __call__(self, input_ids: Any, **ignored: Any) -> LastHidden | None:
        """Run the layers up to the last router, or all of them. Each router is called as a module, so hooks on it fire.

        Parameters
        ----------
        input_ids : int64 tensor, shape (rows, positions)
        ignored
            Other arguments of transformers' models: no mask, no cache.
        """
        ...

    def resumed(self, index: int, residual_TH: Any, positions: int) -> LastHidden:
        """Run the layers to the end, starting after the attention of one, from the hidden states that `attended`
        received."""
        ...


def own_forward(model: Any, quantization: str) -> type[Forward] | None:
    """The forward pass of a model's family; None if transformers' own is used."""
    where = FORWARDS.get(type(model).__name__)
    if where is None:
        return None
    forward: type[Forward] = resolve_name(where)
    return forward if forward.applies(model, quantization) else None


def forward_of(model: Any, quantization: str, expert_backend: str, matmul: str) -> Callable[..., Any]:
    """What runs a loaded model: its family's forward pass if that is its `expert_backend`, otherwise the model
    itself."""
    forward = own_forward(model, quantization)
    return forward(model, matmul) if forward is not None and forward.expert_backend == expert_backend else model
