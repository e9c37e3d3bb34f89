"""Triton kernels against their plain forms, on a GPU or, with TRITON_INTERPRET=1, interpreted on a CPU.

Prints as JSON, for each case, the largest difference, relative to the largest value, of the result and of data changed
in place. Numbers in e4m3 count as equal if the kernel and the plain form, which sum in different orders, rounded a few
of them to adjacent values. It runs in its own process because Triton reads the variable on import.
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
from expert_matrices import by_bitsandbytes

from workers.models import biased, fp8, kernels, published
from workers.models.four_bits import FourBits
from workers.models.packed import Stack4bit

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def three_of(matrices: torch.Tensor, kind: str) -> FourBits:
    """Matrices (3, rows, columns), each quantized by itself."""
    stack = Stack4bit((3, 1, *matrices.shape[1:]))
    for number, matrix in enumerate(matrices):
        weight = bitsandbytes.nn.Params4bit(matrix, requires_grad=False, quant_type=kind, compress_statistics=True)
        stack.take(number, FourBits.of(weight.to(DEVICE)))
    return stack.part(0, 3)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest value; infinite if shapes or dtypes differ."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return float("inf")
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def rounded_apart(one: fp8.RowScaled, other: fp8.RowScaled) -> list[float]:
    """For scales as above. For values 0, or infinite if more than one in 200 differ, or one differs by more than a
    step."""
    bits = torch.stack([part.values.view(torch.uint8).int() for part in (one, other)])
    ours, theirs = torch.where(bits < 128, bits, 128 - bits)  # as steps from 0, which has two signs
    step = (ours - theirs).abs()
    near = bool(step.max() <= 1) and float((step > 0).double().mean()) <= 1 / 200
    return [apart(one.scale, other.scale), 0.0 if near else float("inf")]


def both(kernel: Callable[..., Any], plain: Callable[..., Any], changed: torch.Tensor, *rest: Any) -> list[float]:
    """Differences of results, if any, and of the first argument, which may be changed in place."""
    ours, theirs = changed.clone(), changed.clone()
    found, wanted = kernel(ours, *rest), plain(theirs, *rest)
    return [*([] if wanted is None else [apart(found, wanted)]), apart(ours, theirs)]


def cases(dtype: torch.dtype) -> dict[str, list[float]]:
    """Every kernel, also at widths that are not powers of two."""
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device=DEVICE)

    found = {}
    for inner in (96, 1500):
        found[f"swiglu {inner}"] = both(kernels.swiglu, kernels.plain_swiglu, random(5, 2 * inner))
    cos, sin = random(7, 32), random(7, 32)
    found["rotate"] = both(kernels.rotate, kernels.plain_rotate, random(3 * 7, 8 * 32), cos, sin, 6)
    for head in (32, 24):  # as for six heads, not a power of two
        for name, whole in {"each head": False, "all heads": True}.items():
            norm = kernels.HeadNorm(random(6, head), 1e-5, 5, whole)
            arguments = (random(3 * 7, 8 * head), random(7, head), random(7, head), 6, norm)
            found[f"rotate {head}, norms of {name}"] = both(kernels.rotate, kernels.plain_rotate, *arguments)
    for pairs in (False, True):  # the last 24 of heads of 40 values, from column 16 on
        place = kernels.Place(16, 40, pairs=pairs)
        arguments = (random(3 * 7, 16 + 5 * 40 + 8), random(7, 24), random(7, 24), 5, None, place)
        found[f"rotate a part of heads, pairs {pairs}"] = both(kernels.rotate, kernels.plain_rotate, *arguments)
    found["rotate 24"] = both(kernels.rotate, kernels.plain_rotate, random(7, 8 * 24), cos[:, :24], sin[:, :24], 6)
    for width in (96, 1500):
        expert = torch.randint(0, 3, (5,), device=DEVICE).to(torch.uint8)
        arguments = (random(5, width), random(3, width), expert)
        found[f"add_biases {width}"] = both(biased.add_biases, biased.plain_add_biases, *arguments)
        arguments = (3 * random(5, 2 * width), 1.702, 2.0)
        found[f"clamped_swiglu {width}"] = both(biased.clamped_swiglu, biased.plain_clamped_swiglu, *arguments)
    rows = random(5, 2 * 96)
    rows[1, 0] = rows[2, 3] = rows[3, 4] = float("nan")  # two gates, and a factor of one
    lost = [form(rows, 1.702, 2.0).isnan() for form in (biased.clamped_swiglu, biased.plain_clamped_swiglu)]
    same = bool((lost[0] == lost[1]).all()) and int(lost[0].sum()) == 3
    found["clamped_swiglu of what is not a number"] = [0.0 if same else float("inf")]
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
        ours, theirs = torch.empty_like(matrix), by_bitsandbytes(FourBits.of(weight), 0, 96, dtype)
        kernels.dequantize(FourBits.of(weight), ours)
        plain = torch.empty_like(matrix)
        kernels.plain_dequantize(FourBits.of(weight), plain)
        found[f"dequantize {kind}"] = [apart(ours, theirs), apart(plain, theirs)]
        matrices = three_of(random(3, 96, 352), kind)
        ours = torch.empty(3, 96, 352, dtype=dtype, device=DEVICE)
        kernels.dequantize(matrices, ours)
        wanted = torch.stack([by_bitsandbytes(matrices, number, 96, dtype) for number in range(3)])
        found[f"dequantize {kind}, three matrices"] = [apart(ours, wanted)]
        if INTERPRETED:
            continue  # the following cases use instructions of the GPU
        matrices = three_of(random(3, 96, 320), kind)
        scale = fp8.row_scales(matrices, 3 * 96)
        ours, theirs = (torch.empty((3, 96, 320), dtype=fp8.E4M3, device=DEVICE) for _ in range(2))
        fp8.dequantize_rounded(matrices, scale, ours)
        fp8.plain_dequantize_rounded(matrices, scale, theirs)
        numbers = [fp8.RowScaled(one.view(-1, 320), scale) for one in (ours, theirs)]
        found[f"dequantize {kind} to e4m3, three matrices"] = rounded_apart(*numbers)
        matrix = random(96, 320)  # 480 blocks, five per row
        weight = bitsandbytes.nn.Params4bit(
            matrix, requires_grad=False, quant_type=kind, compress_statistics=True
        ).to(DEVICE)  # fmt: skip
        scale = fp8.row_scales(FourBits.of(weight), 96)
        ours, theirs = (torch.empty(matrix.shape, dtype=fp8.E4M3, device=DEVICE) for _ in range(2))
        fp8.dequantize_rounded(FourBits.of(weight), scale, ours)
        fp8.plain_dequantize_rounded(FourBits.of(weight), scale, theirs)
        found[f"dequantize {kind} to e4m3"] = rounded_apart(*(fp8.RowScaled(one, scale) for one in (ours, theirs)))
    for width in (64, 1500):
        rows = random(6, width)
        rows[2] = 0
        found[f"rounded {width}"] = rounded_apart(fp8.rounded(rows), fp8.plain_rounded(rows))
    rows = random(5, 2 * 1500)
    found["rounded_swiglu"] = rounded_apart(fp8.rounded_swiglu(rows), fp8.plain_rounded_swiglu(rows))
    arguments = (random(6, 100), random(100), 1e-5, random(12, 100), slots, weights)
    results = []
    for form in (fp8.rounded_add_norm, fp8.plain_rounded_add_norm):
        residual = arguments[0].clone()
        results.append((residual, *form(residual, *arguments[1:])))
    (ours, normed, numbers), (theirs, wanted, wanted_numbers) = results
    different = rounded_apart(numbers, wanted_numbers)
    found["rounded_add_norm"] = [apart(ours, theirs), apart(normed, wanted), *different]
    residual = arguments[0].clone()
    nothing, numbers = fp8.rounded_add_norm(residual, *arguments[1:3], kept=False)
    assert nothing is None
    different = rounded_apart(numbers, fp8.plain_rounded_add_norm(*arguments[:3])[1])
    found["rounded_add_norm, nothing added, not kept"] = [apart(residual, arguments[0]), *different]
    ours, theirs = torch.empty_like(arguments[0]), torch.empty_like(arguments[0])
    fp8.restored(fp8.rounded(arguments[0]), ours)
    fp8.plain_restored(fp8.rounded(arguments[0]), theirs)
    found["restored"] = [apart(ours, theirs)]
    codes = torch.randint(0, 256, (2, 33, 48), dtype=torch.uint8, device=DEVICE)
    powers = torch.randint(1, 254, (2, 33, 3), dtype=torch.uint8, device=DEVICE)
    blocks = torch.randn(2, 2, 2, device=DEVICE).exp()
    given = {
        "mxfp4": published.Mxfp4(codes, powers),
        "fp8 in blocks": published.BlockScaled(torch.randn(2, 130, 200, device=DEVICE).to(fp8.E4M3), blocks),
    }
    for name, matrices in given.items():
        shape = (2, 33, 96) if name == "mxfp4" else (2, 130, 200)
        ours, theirs = (torch.empty(shape, dtype=dtype, device=DEVICE) for _ in range(2))
        restore, plain = (
            (published.restore_mxfp4, published.plain_restore_mxfp4)
            if name == "mxfp4"
            else (published.restore_blocks, published.plain_restore_blocks)
        )
        restore(matrices, ours)
        plain(matrices, theirs)
        found[name] = [0.0 if torch.equal(ours, theirs) else float("inf")]
    return found


def round_as_torch_does() -> None:
    """Make Triton's interpreter round to e4m3 correctly: it drops the carry into the next power of two (3.9)."""
    from triton import language
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values: Any, given: Any, wanted: Any, mode: Any) -> Any:
        if wanted != language.float8e4nv:
            return original(values, given, wanted, mode)
        return torch.from_numpy(values).to(fp8.E4M3).view(torch.uint8).numpy()

    interpreter._convert_float = convert


if __name__ == "__main__":
    if INTERPRETED:
        round_as_torch_does()
        for module in (kernels, biased, fp8, published):
            module._fused = lambda tensor: True
            module._launch = lambda kernel, grid, *arguments, **constants: kernel[grid](*arguments, **constants)
    dtypes = (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16)  # Triton interprets no bfloat16
    print(json.dumps({str(dtype): cases(dtype) for dtype in dtypes}))
