"""The kernels' results on a GPU for fixed inputs: `python tests/card_golden.py -o tests/stores/card.npz`, run by hand.

Run it again on an H200 when `ROUTING_VERSION` is raised. `tests/workers/test_gpu.py` compares with the file.
"""

import argparse
import sys
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1])]

import bitsandbytes
import numpy as np
import torch

from workers.engine import load_engine
from workers.models import fp8, kernels
from workers.models.four_bits import FourBits
from workers.shard import ROUTING_VERSION

KEPT = Path(__file__).parent / "stores" / "card.npz"
ENGINES = {"nf4": ("nf4", "bf16"), "fp4": ("fp4", "bf16"), "nf4 by fp8": ("nf4", "fp8"), "fp8 by fp8": ("fp8", "fp8")}
POSITIONS = 64


def made_with() -> dict[str, np.ndarray]:
    """The versions and the device that equal bytes need."""
    packages = {name: version(name) for name in ("torch", "triton", "bitsandbytes", "transformers")}
    facts = {"routing_version": str(ROUTING_VERSION), "device": torch.cuda.get_device_name(), **packages}
    return {f"with/{name}": np.array(value) for name, value in facts.items()}


def random(*shape: int, seed: int) -> torch.Tensor:
    """The same numbers on every machine, in bfloat16 on the GPU."""
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values).to("cuda", torch.bfloat16)


def of_kernels() -> dict[str, np.ndarray]:
    """Every kernel's results, in float32, which holds them exactly."""
    found: dict[str, torch.Tensor] = {}
    found["swiglu"] = kernels.swiglu(random(5, 2 * 1500, seed=1))
    found["rotated"] = random(14, 8 * 32, seed=2)
    kernels.rotate(found["rotated"], random(7, 32, seed=3), random(7, 32, seed=4), 6)
    slots = torch.arange(12, device="cuda").flip(0).view(6, 2)
    added = (random(12, 320, seed=5), slots, random(6, 2, seed=6).abs().float())
    residual = random(6, 320, seed=7)
    found["add_norm"] = kernels.add_norm(residual, random(320, seed=8), 1e-5, *added)
    found["residual"] = residual
    numbers = {"rounded": fp8.rounded(random(5, 1500, seed=9))}
    numbers["rounded_swiglu"] = fp8.rounded_swiglu(random(5, 2 * 1500, seed=1))
    kept, numbers["rounded_add_norm"] = fp8.rounded_add_norm(random(6, 320, seed=7), random(320, seed=8), 1e-5, *added)
    assert kept is not None
    found["kept"] = kept
    for kind in ("nf4", "fp4"):
        weight = bitsandbytes.nn.Params4bit(
            random(96, 320, seed=10), requires_grad=False, quant_type=kind, compress_statistics=True
        ).to("cuda")  # fmt: skip
        found[kind] = torch.empty(96, 320, dtype=torch.bfloat16, device="cuda")
        kernels.dequantize(FourBits.of(weight), found[kind])
        scale = fp8.row_scales(FourBits.of(weight), 96)
        numbers[f"{kind} to e4m3"] = fp8.RowScaled(torch.empty(96, 320, dtype=fp8.E4M3, device="cuda"), scale)
        fp8.dequantize_rounded(FourBits.of(weight), *reversed(numbers[f"{kind} to e4m3"]))
    for name, number in numbers.items():
        found |= {f"{name}, values": number.values, f"{name}, scales": number.scale}
    left, right = fp8.rounded(random(48, 320, seed=11)), fp8.rounded(random(96, 320, seed=12))
    found["multiply"] = fp8.multiply(left, right, torch.empty(48, 96, dtype=torch.bfloat16, device="cuda"))
    found["restored"] = torch.empty(48, 320, dtype=torch.bfloat16, device="cuda")
    fp8.restored(left, found["restored"])
    return {f"kernel/{name}": values.float().cpu().numpy() for name, values in found.items()}


def of_engines() -> dict[str, np.ndarray]:
    """The tiny model's routes of fixed tokens."""
    token = np.random.default_rng(13).integers(3, 32_000, (16, POSITIONS)).astype(np.int32)
    length = np.full(len(token), POSITIONS)
    found = {}
    for name, (quantization, matmul) in ENGINES.items():
        engine = load_engine("tiny", device="cuda", quantization=quantization, matmul=matmul)
        found |= {f"route/{name}/{array}": values for array, values in engine.route(token, length).items()}
    return found


def golden() -> dict[str, np.ndarray]:
    """All results."""
    with torch.inference_mode():
        return made_with() | of_kernels() | of_engines()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=KEPT)
    np.savez_compressed(parser.parse_args().output, **golden())
