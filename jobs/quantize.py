"""Write a 4-bit checkpoint once, so that later starts read 25 GB instead of 93.

usage: python jobs/quantize.py MODEL OUT [options]

Examples:
  python jobs/quantize.py mistralai/Mixtral-8x7B-Instruct-v0.1 mixtral-nf4
  python jobs/quantize.py my/checkpoint my/checkpoint-fp4 --quantization fp4
  python jobs/quantize.py tiny tiny-nf4 --device cpu

Options:
  --quantization KIND       nf4 or fp4 (nf4)
  --model_revision COMMIT   commit, tag or branch of a hub model
  --device DEVICE           auto, cuda or cpu (auto)

A capture with --model OUT makes the same choices as one with --model MODEL, bit for bit on the same
type of device. docs/options.md explains every option. Exit status: 0 written, 2 cannot be written.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import command_line, start

start(__name__, __doc__)

import tyro

from jobs.console.arguments import parse
from jobs.console.terminal import log, reporting, run_job, say_next
from workers.tiny import model_path

MEGABYTE = 10**6


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Write a checkpoint with 4-bit matrices in the format of bitsandbytes and transformers; everything else is
    unchanged.

    With more than 16 experts per layer, the experts of a layer are stored in common tensors for fast loading; only this
    project reads such a checkpoint.

    A capture with --model OUT makes the same choices as one with --model MODEL, bit for bit on the same type of device,
    but the store treats them as different captures. Only one matrix is on the device at a time. Prints the folder's
    path. Exit status: 0 written, 2 cannot be written.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Checkpoint: a hub id, a folder, or "tiny" for the small Mixtral that comes with this package."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not exist. It appears when it is complete."""
    quantization: Literal["nf4", "fp4"] = "nf4"
    """Both use blocks of 64 and double quantization. Routers and head are never quantized."""
    model_revision: str | None = None
    """Commit, tag or branch of a hub model."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where matrices are quantized. auto: a GPU if this machine has one."""


def main(arguments: list[str]) -> int:
    """Write the checkpoint and print its path."""
    config = parse(QuantizeConfig, "quantize", arguments)

    model = model_path(config.model)

    import torch  # takes seconds, and --help must not wait for it

    from workers.models.checkpoint import find_checkpoint, weight_files
    from workers.models.saving import quantize_checkpoint, refuse_existing

    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = here if config.device == "auto" else config.device
    refuse_existing(config.out)  # before a hub model is fetched
    checkpoint = find_checkpoint(model, config.model_revision, weights=True)
    read_bytes = sum(file.stat().st_size for file in weight_files(checkpoint.folder))
    done_bytes = 0
    with reporting(f"quantize on {device}", total=read_bytes // MEGABYTE, unit="MB") as report:

        def count(tensor_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += tensor_bytes
            report.to(done_bytes // MEGABYTE)

        quantize_checkpoint(
            model,
            config.out,
            revision=config.model_revision,
            quantization=config.quantization,
            device=device,
            progress=count,
        )
    written_bytes = sum(file.stat().st_size for file in weight_files(config.out))
    log(f"{read_bytes:,} bytes of weights became {written_bytes:,}")
    print(config.out)
    say_next(command_line("capture", "--model", config.out, "--dataset", "wikitext-103"))
    return 0


if __name__ == "__main__":
    run_job(main, after="nothing is kept: the same command starts from the beginning")
