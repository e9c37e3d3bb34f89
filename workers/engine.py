"""A loaded model as an engine: rows in, choices out, as host arrays.

On a CPU one thread computes. With other numbers of threads matrix products round differently (measured with three
threads), and the same shard must have the same bytes on every machine.
"""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from traceback import clear_frames
from typing import Any

import numpy as np
import torch

from workers.interventions import Interventions
from workers.models.forwards import forward_of
from workers.models.intervening import Steering
from workers.models.loading import LoadedModel, load_model
from workers.record import CHOICES_ALONE, Recorded
from workers.recorder import Micro, RouteRecorder, on_device
from workers.recordings.chosen import recordings_of
from workers.shard import DeviceLost, OutOfMemory, Routes, RoutingError
from workers.tiny import model_path


class ModelEngine:
    """Routes rows through a model.

    Parameters
    ----------
    loaded
        From `workers.models.loading.load_model`.
    recorded
        What is recorded beside the choices, and in what precision weights are.
    interventions
        What is changed about the choices.

    Raises
    ------
    ValueError, RoutingError
        When the model cannot be recorded in this way.
    """

    def __init__(
        self, loaded: LoadedModel, recorded: Recorded = CHOICES_ALONE, interventions: Interventions | None = None
    ) -> None:
        self.model = loaded.model
        self.layers = tuple(loaded.routers)
        self.num_experts = loaded.num_experts
        interventions = interventions or Interventions()
        self.experts_per_token = interventions.top_k or loaded.experts_per_token
        self.steering = Steering(loaded.routers, loaded.num_experts, self.experts_per_token, interventions)
        self.device = next(loaded.model.parameters()).device
        how = (loaded.provenance[name] for name in ("quantization", "expert_backend", "matmul"))
        self.forward = forward_of(loaded.model, *how)
        self.recorder = RouteRecorder(
            loaded.routers,
            loaded.num_experts,
            self.experts_per_token,
            recordings_of(loaded, self.forward, recorded, self.experts_per_token),
            recorded.weight_bits,
            self.steering.of,
        )
        described = loaded.provenance | {"experts_per_token": self.experts_per_token}
        self.description: Mapping[str, Any] = described | asdict(recorded) | interventions.fields()

    @torch.inference_mode()
    def start(self, token: np.ndarray, length: np.ndarray, given: Routes | None = None) -> Callable[[], Routes]:
        """See `workers.shard.Engine.start`.

        Raises
        ------
        OutOfMemory
            When the micro-batch does not fit on the device.
        DeviceLost
            When no later call on the device can succeed; also from what is returned.
        RoutingError
            When what was recorded cannot be what the model did, also from what is returned; the message names the
            layer.
        """
        positions = token.shape[1]
        padded = np.where(np.arange(positions) < length[:, None], token, 0)
        with self._device_errors():
            self._give(given, length)
        with self._device_errors(), self.steering.attached(), self.recorder.attached(), one_thread(self.device):
            recorded = self.recorder.record(self.forward, on_device(padded.astype(np.int64), self.device), length)
            copies = Micro(*({what: _to_host(part) for what, part in parts.items()} for parts in recorded))
            copied = torch.cuda.Event() if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
            if copied is not None:
                copied.record(torch.cuda.current_stream(self.device))

        def finish() -> Routes:
            with self._device_errors():
                if copied is not None:
                    copied.synchronize()  # not the stream: the next micro-batch may be on it
            return self._routes(positions, copies)

        return finish

    def route(self, token: np.ndarray, length: np.ndarray) -> Routes:
        """Call `start` and wait for the result."""
        return self.start(token, length)()

    def _give(self, given: Routes | None, length: np.ndarray) -> None:
        """Give the routers their choices, with legal choices where there is no token."""
        asked = self.steering.asked
        assert (given is None) == (asked.routes_from is None), "routes are given only to an engine that takes them"
        if given is None:
            return
        empty = np.arange(given["expert"].shape[1]) >= length[:, None]
        legal: dict[str, Any] = {"expert": np.arange(self.experts_per_token)}
        if asked.routes_weights:
            legal["weight"] = 1 / self.experts_per_token
        layers = []
        for name, fill in legal.items():
            values = given[name].astype(np.int64 if name == "expert" else np.float32)
            values[empty] = fill
            layers.append(np.ascontiguousarray(values.reshape(-1, *values.shape[2:]).swapaxes(0, 1)))
        self.steering.begin(*(on_device(each, self.device) for each in layers))

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            clear_frames(error.__traceback__)  # they hold the allocated memory and may be in a cycle (seen: 4 GiB)
            torch.cuda.empty_cache()
            raise OutOfMemory(str(error).split(". ")[0]) from error
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error).split("\n")[0]) from error

    def _routes(self, positions: int, micro: Micro) -> Routes:
        """What the recorder returned, as arrays; an error is raised if it shows a fault."""
        layers = zip(*(firsts.tolist() for firsts in micro.faults.values()), strict=True)
        for layer, firsts in zip(self.layers, layers, strict=True):
            for fault, first in zip(micro.faults, firsts, strict=True):
                if first >= 0:
                    row, position = divmod(first, positions)
                    reason = fault.format(experts=self.num_experts)
                    raise RoutingError(f"layer {layer}: {reason}, first seen at position {position}", row)
        narrow = np.uint8 if self.num_experts <= 255 else np.uint16
        routes = {name: part.numpy().reshape(-1, positions, *part.shape[1:]) for name, part in micro.arrays.items()}
        ids = {name: routes[name].astype(narrow, copy=False) for name in ("expert", "logit_expert") if name in routes}
        return routes | ids


def _to_host(part: torch.Tensor) -> torch.Tensor:
    """A copy in pinned memory that may not be finished yet. A non-contiguous tensor would be copied again on the
    host."""
    return part.contiguous().to("cpu", non_blocking=True)


def load_engine(
    model: str | Path,
    *,
    device: str,
    recorded: Recorded = CHOICES_ALONE,
    interventions: Interventions | None = None,
    kind: Callable[..., ModelEngine] = ModelEngine,
    **options: Any,
) -> ModelEngine:
    """Load a model as an engine. The arguments are those of `load_model`; the model may also be "tiny".

    Parts that no recording needs are dropped: the experts of the last layer, 0.7 GiB of Mixtral 8x7B in NF4.
    """
    if device != "cpu" and not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        # An H200 showed 31.1 GiB instead of 47.4 for Mixtral 8x7B with fp8 products. An environment variable would be
        # set too late: torch reads it when it is first asked about the GPU's capabilities.
        _set_allocator("expandable_segments:True")
    loaded = load_model(model_path(model), device=device, **options)
    if not recorded.whole and len(loaded.routers) > 1:
        drop_last_experts(loaded)
    if device != "cpu":
        torch.cuda.empty_cache()  # transformers takes more while it loads than the weights need
    return kind(loaded, recorded, interventions)


def _set_allocator(settings: str) -> None:
    """The setting under its name in this version of torch: 2.11 warns about the older name."""
    named = getattr(torch._C, "_accelerator_setAllocatorSettings", torch.cuda.memory._set_allocator_settings)
    named(settings)


def drop_last_experts(loaded: LoadedModel) -> None:
    """Drop the experts of the last layer: no router follows them."""
    last = list(loaded.routers.values())[-1]
    for block in [module for module in loaded.model.modules() if last in module.children()]:
        if hasattr(block, "experts"):
            del block.experts
    gc.collect()  # a 4-bit matrix and its module hold each other


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute with one thread while the block runs, if the device is a CPU."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
