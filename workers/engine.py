"""A loaded model as an engine: rows in, choices out, as host arrays."""

import numpy as np
import torch

from workers.loading import LoadedModel
from workers.routes import ILLEGAL, RouteRecorder
from workers.shard import OutOfMemory, RoutingError

_FAULTS = (
    ILLEGAL,
    "its router's weights are not finite, first in row {row} of the micro-batch",
    "its recorded choices are not those of its router for these tokens: an earlier batch's, or another layer's",
)


class ModelEngine:
    """Routes rows through a model.

    Parameters
    ----------
    loaded
        From `workers.loading.load_model`.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.model = loaded.model
        self.layers = tuple(loaded.routers)
        self.num_experts = loaded.num_experts
        self.experts_per_token = loaded.experts_per_token
        self.recorder = RouteRecorder(loaded.routers, loaded.num_experts, loaded.experts_per_token)
        self.device = next(loaded.model.parameters()).device

    @torch.inference_mode()
    def route(self, token: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `workers.shard.Engine.route`.

        Raises
        ------
        OutOfMemory
            When the micro-batch does not fit on the device.
        RoutingError
            When what was recorded cannot be what the model did; the message names the layer.
        """
        rows, positions = token.shape
        padded = np.where(np.arange(positions) < length[:, None], token, 0)
        try:
            with self.recorder.attached():
                experts, weights, faults = self.recorder.record(
                    self.model, torch.from_numpy(padded.astype(np.int64)).to(self.device), length
                )
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemory(str(error).split(". ")[0]) from error
        shape = (rows, positions, len(self.layers), self.experts_per_token)
        expert, weight = experts.cpu().numpy().reshape(shape), weights.cpu().numpy().reshape(shape)
        for layer, flags in zip(self.layers, faults.tolist(), strict=True):
            for fault, found in zip(_FAULTS, flags, strict=True):
                if found:
                    raise RoutingError(
                        f"layer {layer}: {fault.format(experts=self.num_experts, row=self._row(weight))}"
                    )
        narrow = np.uint8 if self.num_experts <= 255 else np.uint16
        return expert.astype(narrow, copy=False), weight.astype(np.float16)

    @staticmethod
    def _row(weight: np.ndarray) -> int:
        return int(np.argmin(np.isfinite(weight).all(axis=(1, 2, 3))))
