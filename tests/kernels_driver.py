"""Triton kernels against their plain forms, on a GPU or, with TRITON_INTERPRET=1, interpreted on a CPU.

Prints as JSON for each case the largest difference, relative to the largest value, of a result and of what was changed
in place. A process of its own: Triton reads the variable when it is imported.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import bitsandbytes
import torch

from workers.models import kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where shapes or dtypes differ."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return float("inf")
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def both(kernel: Callable[..., Any], plain: Callable[..., Any], changed: torch.Tensor, *rest: Any) -> list[float]:
    """Differences of results, where there are any, and of the first argument, which may be changed in place."""
    ours, theirs = changed.clone(), changed.clone()
    found, wanted = kernel(ours, *rest), plain(theirs, *rest)
    return [*([] if wanted is None else [apart(found, wanted)]), apart(ours, theirs)]


def cases(dtype: torch.dtype) -> dict[str, list[float]]:
    """Every kernel, at widths that are no powers of two too."""
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=DEVICE)

    found = {}
    for inner in (96, 1500):
        found[f"swiglu {inner}"] = both(kernels.swiglu, kernels.plain_swiglu, random(5, 2 * inner))
    cos, sin = random(7, 32), random(7, 32)
    found["rotate"] = both(kernels.rotate, kernels.plain_rotate, random(3 * 7, 8 * 32), cos, sin, 6)
    slots = torch.randperm(12, device=DEVICE).view(6, 2)
    weights = torch.rand(6, 2, device=DEVICE)
    for width in (64, 100):
        for name, added in {
            "": (),
            " of a row": (random(6, width),),
            " of slots": (random(12, width), slots, weights),
        }.items():
            arguments = (random(6, width), random(width), 1e-5, *added)
            found[f"add_norm{name} {width}"] = both(kernels.add_norm, kernels.plain_add_norm, *arguments)
    for kind in ("nf4", "fp4"):
        matrix = random(96, 352)  # 528 blocks of 64, more than two of 256 scales
        weight = bitsandbytes.nn.Params4bit(
            matrix, requires_grad=False, quant_type=kind, compress_statistics=True
        ).to(DEVICE)  # fmt: skip
        ours, theirs = torch.empty_like(matrix), torch.empty_like(matrix)
        kernels.dequantize(weight, ours)
        kernels.plain_dequantize(weight, theirs)
        found[f"dequantize {kind}"] = [apart(ours, theirs)]
    return found


if __name__ == "__main__":
    if INTERPRETED:
        kernels._fused = lambda tensor: True
        kernels._launch = lambda kernel, grid, *arguments, **constants: kernel[grid](*arguments, **constants)
    dtypes = (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16)  # Triton interprets no bfloat16
    print(json.dumps({str(dtype): cases(dtype) for dtype in dtypes}))
