"""Every mixture-of-experts family that transformers has, captured or rejected: `make families`, by hand, CPU only.

Of each family a tiny checkpoint is made in its published layout (`tiny_families.py`) and captured unquantized and in
NF4. The choices and weights are compared with what the family's own experts get from their router, or, where they are
not called with choices, with what the router returns, in transformers' own forward, of each row alone. For NF4 its
matrices are quantized and dequantized one by one. Each family runs in a process of its own, with a time limit.

The outcome is `results/families-survey.json`, and the table between the two markers of `docs/models.md`.
"""

import re
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = (REPOSITORY, REPOSITORY / "tests", REPOSITORY / "tests" / "workers", Path(__file__).parent)
sys.path[:0] = map(str, HERE)

from families_runs import on_every_family  # noqa: E402
from families_table import PAGE, RESULT, found, page  # noqa: E402
from test_loading import dequantized_reference  # noqa: E402
from tiny_families import make_checkpoint  # noqa: E402

from workers.engine import load_engine  # noqa: E402
from workers.models.family import unquantized  # noqa: E402
from workers.shard import RoutingError  # noqa: E402

PRECISIONS = ("none", "nf4")
LENGTHS = (131, 1, 97, 71)  # 300 tokens, in one batch
FLOAT16_STEP = 2.0**-10  # relative
NEAR_TIES = 0.01  # the share of tokens and layers whose choice may be another one, by rounding
FAULTS = ("crashed", "differs", "not made")
"""Outcomes that the survey must rule out."""


def wanted_routes(model: nn.Module, engine: Any, row: np.ndarray) -> np.ndarray:
    """The weights (T, L, E) that experts are given for one row, 0 where an expert is not chosen."""
    found: dict[int, np.ndarray] = {}
    handles = []
    for layer, router in zip(engine.layers, routers_of(model, engine), strict=True):
        block = model.get_submodule(router.rpartition(".")[0])

        def given(_: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
            parts = [part for part in (*args, *kwargs.values()) if torch.is_tensor(part)]
            if (routes := _dense(parts[1:], engine)) is not None:
                found[layer] = routes

        def returned(_: Any, args: Any, output: Any, layer: int = layer) -> None:
            routes = _dense(list(output) if isinstance(output, tuple) else [output], engine)
            if routes is not None:
                found.setdefault(layer, routes)

        handles.append(model.get_submodule(router).register_forward_hook(returned))
        if isinstance(experts := getattr(block, "experts", None), nn.Module):
            handles.append(experts.register_forward_pre_hook(given, with_kwargs=True))
    model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return np.stack([found[layer] for layer in engine.layers], axis=1)


def routers_of(model: nn.Module, engine: Any) -> list[str]:
    """The names of the engine's routers, which the reference calls the same."""
    names = {module: name for name, module in engine.model.named_modules()}
    return [names[router] for router in engine.recorder.routers.values()]


def _dense(parts: list[Any], engine: Any) -> np.ndarray | None:
    """Weights (T, E) from indices (T, k) and weights (T, k), or as they are where they have E - k zeros a token."""
    k, experts = engine.experts_per_token, engine.num_experts
    every = [part for part in parts if torch.is_tensor(part) and part.shape[-1] == experts > k]
    for part in every:
        if ((part != 0).sum(dim=-1) == k).all():
            return part.reshape(-1, experts).double().numpy()
    index = [part for part in parts if torch.is_tensor(part) and not part.is_floating_point() and part.shape[-1] == k]
    weight = [part for part in parts if torch.is_tensor(part) and part.is_floating_point() and part.shape[-1] == k]
    if len(index) != 1 or not weight:
        return None
    index_TK, weight_TK = index[0].reshape(-1, k).long(), weight[-1].reshape(-1, k).double()
    return torch.zeros(len(index_TK), experts, dtype=torch.double).scatter_(-1, index_TK, weight_TK).numpy()


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Random token ids, right-padded, and the rows' lengths."""
    length = np.array(LENGTHS)
    token = np.random.default_rng(1).integers(3, 100, (len(length), max(LENGTHS))).astype(np.int32)
    token[np.arange(max(LENGTHS)) >= length[:, None]] = -1
    return token, length


@torch.inference_mode()
def compare(folder: Path, quantization: str) -> dict[str, Any]:
    """Capture a few rows in one precision; the outcome, and what to know of it."""
    try:
        engine = load_engine(folder, device="cpu", quantization=quantization)
        token, length = rows()
        expert, weight = engine.route(token, length).values()
    except (ValueError, RoutingError) as error:
        return {"outcome": "rejected", "reason": one_line(error, folder)}
    if quantization == "none":
        stock = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    else:
        stock = dequantized_reference(folder, quantization)
        for name in unquantized(stock):  # some have a Linear; the engine has let its last experts go
            stock.get_submodule(name).load_state_dict(engine.model.get_submodule(name).state_dict())
    other = 0
    for row, size in enumerate(length):
        wanted = wanted_routes(stock, engine, token[row, :size])
        got = np.zeros_like(wanted)
        np.put_along_axis(got, expert[row, :size].astype(int), weight[row, :size], axis=-1)
        other += (~np.isclose(got, wanted, rtol=FLOAT16_STEP, atol=1e-6)).any(axis=-1).sum()
    facts = {"layers": len(engine.layers), "experts": engine.num_experts, "k": engine.experts_per_token}
    many = length.sum() * len(engine.layers)
    if other > NEAR_TIES * many:
        return {"outcome": "differs", "reason": f"{other} of {many} choices", **facts}
    return {"outcome": "captured", "kinds": len(set(expert[expert < engine.num_experts])), **facts}


def one_line(error: BaseException, folder: Path) -> str:
    """What an error says, without the temporary folder."""
    return re.sub(r"\s+", " ", str(error).replace(str(folder), "the checkpoint"))


def survey(model_type: str) -> dict[str, Any]:
    """What becomes of a family, in each precision; never raises."""
    outcomes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        step, path = "not made", Path(folder)
        try:
            if not make_checkpoint(model_type, path):
                return {}
            step = "crashed"
            for quantization in PRECISIONS:
                outcomes[quantization] = compare(path, quantization)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {one_line(error, path)}"
            outcomes.setdefault(PRECISIONS[len(outcomes)], {"outcome": step, "reason": reason})
    return outcomes


def _crash(reason: str) -> dict[str, Any]:
    return {"outcome": "crashed", "reason": reason}


def main() -> None:
    """Survey all families, or those that are named, and write the outcome."""
    for _ in on_every_family(RESULT, __doc__, survey, crashed=lambda reason: {"none": _crash(reason)}):
        pass
    PAGE.write_text(page())
    surveyed = found()["families"].items()
    faults = [name for name, each in surveyed if any(one["outcome"] in FAULTS for one in each.values())]
    if faults:
        sys.exit(f"{len(faults)} families end in what must not be: {', '.join(faults)}")


if __name__ == "__main__":
    main()
