"""The fake model with the values that `--record` adds, by formulas, and captures of it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fake_model import FakeEngine, FakeRun, fake_layout, text_source

from jobs.capturing.captures import capture_datasets
from jobs.capturing.local import capture_here
from workers.shard import Routes

RECORD = ("logit", "output_norm", "logprob")


class RecordingEngine(FakeEngine):
    """Also returns logits, norms and log-probabilities, by formulas of the token's id.

    Parameters
    ----------
    top
        Number of largest logits to return, with their experts; 0: all.
    worse
        Nats by which each token id modulo 7 is predicted worse.
    """

    def __init__(self, *shape: Any, top: int = 0, worse: float = 0.0) -> None:
        super().__init__(*shape)
        self.top, self.worse = top, worse

    def route(self, token: np.ndarray, length: np.ndarray) -> Routes:
        """See `FakeEngine`."""
        routes = super().route(token, length)
        layer, expert = np.arange(len(self.layers))[:, None], np.arange(self.num_experts)
        logit = np.sin(token[..., None, None] * 0.7 + 2 * layer + expert).astype(np.float32)
        np.put_along_axis(logit, routes["expert"].astype(int), np.array([3.0, 2.0], np.float32), -1)
        order = np.argsort(-logit, -1, kind="stable")[..., : self.top]
        last = np.arange(token.shape[1]) >= length[:, None] - 1
        ids = {"logit_expert": order.astype(np.uint8)} if self.top else {}
        return (
            routes
            | ids
            | {
                "logit": np.take_along_axis(logit, order, -1) if self.top else logit,
                "output_norm": 1 + routes["expert"].astype(np.float32) % 5 + token[..., None, None] % 3,
                "logprob": np.where(last, np.nan, -(token % 7) * (1 + self.worse) - 0.5).astype(np.float32),
            }
        )


def recorded_capture(
    path: Path, name: str, texts: list[str], *, top: int = 0, worse: float = 0.0, **layout: Any
) -> None:
    """A capture with all three, as by `jobs/capture.py`, and the transformation from logits to weights."""
    record = ("logit", *(("logit_expert",) if top else ()), "output_norm", "logprob")
    grid = fake_layout(record=record, top_logits=top, **layout)
    run: Any = FakeRun(path, grid, identity={"record": list(record)})
    run.make_engine = partial(
        RecordingEngine, grid.layers, grid.num_experts, grid.experts_per_token, top=top, worse=worse
    )
    capture_datasets(run, [(name, text_source(texts))], capture_here)
    about = path / name / "zarr.json"
    metadata = json.loads(about.read_text())
    metadata["attributes"]["router_transformation"] = "renormalized"
    about.write_text(json.dumps(metadata))
