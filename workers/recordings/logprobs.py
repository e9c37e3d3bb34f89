"""The log-probability of the next token of the row, at the position that predicts it.

T tokens in B rows of P positions, S of them sampled, N of them followed by another, H hidden, V vocabulary. The proof:
for the sample, the final norm called as a module, the published head, and the tokens from their rows must give the
same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from workers.models.forwards import LastHidden
from workers.models.head import Head
from workers.recordings.recording import Batch, Chosen, Recording, doubted, near

OTHERS = "the log-probabilities recorded after it are not those of the tokens that follow"


class NextToken(Recording):
    """Log-probabilities at every token that is followed by another in its row; NaN elsewhere.

    Parameters
    ----------
    head The published head. norm
        The model's final norm.
    """

    whole = True

    def __init__(self, head: Head, norm: nn.Module) -> None:
        self.head, self.norm = head, norm
        self.logprob_T = torch.empty(0)
        """The log-probabilities of the last micro-batch."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """See `Recording`."""
        handle = self.norm.register_forward_pre_hook(self._keep_before)
        try:
            yield
        finally:
            handle.remove()

    def _keep_before(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        self._before_SH = self._sampled(_rows(args[0]))

    def _sampled(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        return hidden_TH[self._batch.sample.to(hidden_TH.device)]  # the last layers may be on another GPU

    def begin(self, batch: Batch) -> None:
        """See `Recording`."""
        self._batch = batch

    def ended(self, output: Any) -> None:
        """See `Recording`."""
        token_BP, _, place_N = self._batch
        if isinstance(output, LastHidden):  # from this project's own forward pass, which calls no modules for its norms
            self._before_SH = self._sampled(output.before_TH)
        hidden_TH = output.normed_TH if isinstance(output, LastHidden) else _rows(output.last_hidden_state)
        hidden_TH, before_SH = (part.to(self.head.device) for part in (hidden_TH, self._before_SH))
        self.logprob_T = torch.full((token_BP.numel(),), torch.nan, device=token_BP.device)
        self.logprob_T[place_N] = self.head.logprobs(hidden_TH, place_N, token_BP.flatten()[place_N + 1])
        self._doubts_1S = self._look(self.head.logits(self.norm.forward(before_SH)).float())

    def _look(self, logits_SV: torch.Tensor) -> torch.Tensor:
        """The sampled tokens whose log-probability differs from that of these logits; the last token of a row has
        none."""
        token_BP, sample, place_N = self._batch
        following_BP = token_BP.roll(-1, dims=1)
        target_S = following_BP[sample // token_BP.shape[1], sample % token_BP.shape[1]]
        wanted_S = logits_SV.gather(-1, target_S[:, None])[:, 0] - logits_SV.logsumexp(dim=-1)
        found_S, followed_S = self.logprob_T[sample], torch.isin(sample, place_N)
        close_S = near(found_S, wanted_S, self.head.dtype, logits_SV.abs().amax(dim=-1))
        return doubted(torch.where(followed_S, close_S, found_S.isnan())[None])

    def arrays(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """See `Recording`."""
        return {"logprob": self.logprob_T}

    def doubts(self, chosen: Chosen) -> dict[str, torch.Tensor]:
        """See `Recording`."""
        none = self._doubts_1S.new_zeros(len(chosen.experts_LTK) - 1, len(chosen.sample))
        return {OTHERS: torch.cat([none, self._doubts_1S])}


def _rows(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states, one for each token."""
    return hidden.reshape(-1, hidden.shape[-1])
