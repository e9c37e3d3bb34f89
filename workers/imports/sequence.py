"""One sequence of tokens with the routes that an engine returned for it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from store.layout import MISSING_ROLE, PHASES

PROMPT, GENERATED = range(len(PHASES))


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A sequence as an engine returned it.

    Engines have no routes of a last token that they sampled and never fed, and may leave out a prompt's first tokens.
    """

    name: str
    """What it is called: a request's id, or its place in the file."""
    token: NDArray[np.integer] | None = None
    """Token ids (S); None where there is only `text`."""
    text: str | None = None
    """What the tokens are made from, where the ids are not known."""
    expert: NDArray[np.integer]
    """Expert ids (tokens, layers, k) of the tokens from `start` on; -1 in all layers where they are not known."""
    weight: NDArray[np.floating] | None = None
    """Like `expert`; None where the engine gives none."""
    start: int = 0
    """Tokens before the first one that has routes."""
    prompt: int | None = None
    """Tokens of the prompt; None where that is not known."""
    phase: NDArray[np.integer] | None = None
    """Of each token (S), in place of `prompt`: 0 prompt, 1 generated, 255 not known."""
    size_bytes: int = 0
    """Of the file, for progress."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a format must be told because files do not say it."""

    experts_per_token: int | None = None
    """k, where files hold what routers gave all experts."""
    weights: str = "none"
    """How weights are made of router logits: "none", "softmax" or "renormalized"."""


def whole(routed: Routed) -> Routed:
    """The same sequence, if its tokens, routes and phases fit.

    Raises
    ------
    ValueError
        When they do not; it names the sequence and both numbers.
    """
    token, expert = routed.token, routed.expert
    assert token is not None, "text is tokenized before"
    where = f"sequence {routed.name}"
    if token.ndim != 1 or expert.ndim != 3 or 0 in expert.shape[1:]:
        raise ValueError(
            f"{where}: tokens of the shape {token.shape} and experts of {expert.shape}; (tokens) and (tokens, layers,"
            " k) are wanted"
        )
    if token.dtype.kind not in "iu" or expert.dtype.kind not in "iu":
        raise ValueError(f"{where}: tokens are {token.dtype} and experts {expert.dtype}; integers are wanted")
    if not 0 <= len(token) - routed.start - len(expert) <= 1:
        raise ValueError(
            f"{where} has {len(token)} tokens, and routes of {len(expert)} from token {routed.start} on: all but the"
            " last may be wanted, or all. If the engine was asked to leave out the prompt's first tokens, give their"
            " number as `start` beside the routes; if tokens were made from text, give the ids"
        )
    if routed.weight is not None and routed.weight.shape != expert.shape:
        raise ValueError(f"{where} has weights of the shape {routed.weight.shape} for experts of {expert.shape}")
    if routed.phase is not None and routed.phase.shape != token.shape:
        raise ValueError(f"{where} has phases of the shape {routed.phase.shape} for {len(token)} tokens")
    if routed.prompt is not None and not 0 <= routed.prompt <= len(token):
        raise ValueError(f"{where} has a prompt of {routed.prompt} tokens, and {len(token)} tokens in all")
    return routed


def phases(routed: Routed) -> NDArray[np.uint8] | None:
    """The phase of each token; None where it is not known."""
    if routed.phase is not None:
        return routed.phase.astype(np.uint8)
    if routed.prompt is None or routed.token is None:
        return None
    return np.where(np.arange(len(routed.token)) < routed.prompt, PROMPT, GENERATED).astype(np.uint8)


def unknown_phases(tokens: int) -> NDArray[np.uint8]:
    """Phases of tokens of which none is known."""
    return np.full(tokens, MISSING_ROLE, np.uint8)
