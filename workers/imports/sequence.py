"""One sequence of tokens and the routes that an engine returned for it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.layout import MISSING_ROLE, PHASES

PROMPT, GENERATED = range(len(PHASES))


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A sequence as an engine returned it.

    Engines have no routes for a last token that they sampled but never fed to the model, and may omit a prompt's first
    tokens.
    """

    name: str
    """Name of the sequence: a request's id, or its place in the file."""
    token: NDArray[np.integer] | None = None
    """Token ids (S); None if there is only `text`."""
    text: str | None = None
    """The text of the tokens, if the ids are not known."""
    expert: NDArray[np.integer]
    """Expert ids (tokens, layers, k) of the tokens from `start` on; -1 in all layers if they are not known."""
    weight: NDArray[np.floating] | None = None
    """Like `expert`; None if the engine returns no weights."""
    start: int = 0
    """Number of tokens before the first one that has routes."""
    prompt: int | None = None
    """Number of tokens of the prompt; None if not known."""
    phase: NDArray[np.integer] | None = None
    """The phase of each token (S), instead of `prompt`: 0 prompt, 1 generated, 255 not known."""
    size_bytes: int = 0
    """Bytes of the file, for progress."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a format needs to know but files do not say."""

    experts_per_token: int | None = None
    """k, if files hold the router's output for all experts."""
    weights: str = "none"
    """How weights are computed from router logits: "none", "softmax" or "renormalized"."""


def whole(routed: Routed) -> Routed:
    """The same sequence, if its tokens, routes and phases fit.

    Raises
    ------
    ValueError
        When they do not fit; the message names the sequence and both numbers.
    """
    token, expert = routed.token, routed.expert
    assert token is not None, "text is tokenized earlier"
    where = f"sequence {routed.name}"
    if token.ndim != 1 or expert.ndim != 3 or 0 in expert.shape[1:]:
        raise ValueError(
            f"{where}: tokens have the shape {token.shape} and experts {expert.shape}, but must have (tokens) and"
            " (tokens, layers, k)"
        )
    if token.dtype.kind not in "iu" or expert.dtype.kind not in "iu":
        raise ValueError(f"{where}: tokens are {token.dtype} and experts {expert.dtype}, but must be integers")
    if not 0 <= len(token) - routed.start - len(expert) <= 1:
        raise ValueError(
            f"{where} has {len(token)} tokens, but routes of {len(expert)} from token {routed.start} on: it must have"
            " those of all, or of all but the last. If the engine was asked to omit the prompt's first tokens, give"
            " their number as `start` next to the routes; if tokens were made from text, give the ids"
        )
    if routed.weight is not None and routed.weight.shape != expert.shape:
        raise ValueError(f"{where} has weights of the shape {routed.weight.shape} for experts of {expert.shape}")
    if routed.phase is not None and routed.phase.shape != token.shape:
        raise ValueError(f"{where} has phases of the shape {routed.phase.shape} for {len(token)} tokens")
    if routed.prompt is not None and not 0 <= routed.prompt <= len(token):
        raise ValueError(f"{where} has a prompt of {routed.prompt} tokens, but only {len(token)} tokens in all")
    return routed


def phases(routed: Routed) -> NDArray[np.uint8] | None:
    """The phase of each token; None if not known."""
    if routed.phase is not None:
        return routed.phase.astype(np.uint8)
    if routed.prompt is None or routed.token is None:
        return None
    return np.where(np.arange(len(routed.token)) < routed.prompt, PROMPT, GENERATED).astype(np.uint8)


def unknown_phases(tokens: int) -> NDArray[np.uint8]:
    """Phases of tokens whose phases are all unknown."""
    return np.full(tokens, MISSING_ROLE, np.uint8)
