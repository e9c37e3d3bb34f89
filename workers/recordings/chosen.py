"""The recordings of a capture: those that compute the arrays that it records."""

from typing import Any

from workers.models.head import Head
from workers.models.loading import LoadedModel
from workers.record import Recorded
from workers.recordings.logits import RouterLogits
from workers.recordings.logprobs import NextToken
from workers.recordings.norms import OutputNorms, experts_of
from workers.recordings.recording import Recording
from workers.recordings.used import Used


def recordings_of(loaded: LoadedModel, forward: Any, recorded: Recorded, k: int) -> list[Recording]:
    """The recordings of a model.

    Parameters
    ----------
    forward
        What runs its layers. This project's own forward pass is set to run all layers and to pass on its experts'
        outputs.
    k
        Number of choices per token.

    Raises
    ------
    ValueError
        When the model cannot be recorded in this way.
    """
    found: list[Recording] = []
    own = forward is not loaded.model
    if "logit" in recorded.record:
        found.append(RouterLogits(loaded.routers, loaded.num_experts, k, recorded.top_logits))
    if "output_norm" in recorded.record:
        norms = OutputNorms(loaded.routers, () if own else experts_of(loaded.model, loaded.routers))
        if own:
            forward.seen = norms.seen
        found.append(norms)
    if "logprob" in recorded.record:
        model: Any = loaded.model
        if not hasattr(model, "norm"):
            raise ValueError(f"{type(model).__name__} has no final norm named norm: capture without logprob")
        found.append(NextToken(Head(loaded.folder, model), model.norm))
    found.append(Used(loaded.routers, loaded.num_experts, k, model=loaded.model, forward=forward))
    if own:
        forward.whole = any(recording.whole for recording in found)
    return found
