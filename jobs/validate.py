"""Compare the choices of a Mixtral 8x7B with the counts published by the authors of OLMoE.

usage: python jobs/validate.py MODEL --c4 TEXT --github TEXT [options]

Examples:
  python jobs/validate.py mistralai/Mixtral-8x7B-v0.1 --c4 c4_texts.txt --github github_texts.txt
  python jobs/validate.py mixtral-nf4 --c4 c4_texts.txt --store validate.zarr
  python jobs/validate.py mistralai/Mixtral-8x7B-v0.1 --github code/ --quantization none

What to capture, one text or both:
  --c4 TEXT                 text of the domain C4, as for --dataset of jobs/capture.py
  --github TEXT             text of the domain GitHub, in the same form
  --store STORE             where the captures go (validate.zarr)

Model and precision:
  --model_revision COMMIT   commit, tag or branch of a hub model
  --quantization KIND       nf4, fp4, int8 or none (nf4)

Where to run:
  --device DEVICE           auto, cuda or cpu (auto)
  --batch_tokens N          most padded tokens in a micro-batch

So far it was only run with an artificial model, because the weights and texts were not available.
Run the same command again to resume. docs/options.md lists the texts and explains every option.
Exit status: 0 each domain is nearest to its own published shares, 1 not so, 2 undecided.
"""

import hashlib
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import command_line, start

start(__name__, __doc__)

import tyro
from rich.console import Console
from rich.table import Table

from jobs.capturing.options import CaptureConfig
from jobs.console.arguments import parse
from jobs.console.terminal import log, reporting, run_job, say_next
from jobs.sources.documents import Document, Source
from jobs.sources.resolve import resolve_source

if TYPE_CHECKING:
    import xarray as xr

CHARACTERS_PER_TOKEN = 6  # upper limit; Mixtral's tokenizer has 4.7 in the demo's prose, 3.4 in its code (measured)
ROWS_PER_SHARD = 34  # a third of the counted rows, the most that an interrupted validation loses (arbitrary)


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Compare the choices of a Mixtral 8x7B with the counts published by the authors of OLMoE.

    Each text is read as in their experiment: as one text, cut into blocks of 2,048 tokens after one
    beginning-of-sequence token; the first 102 blocks are counted. For each domain and layer (0, 7 and 15), it prints
    the total variation between the captured and the published shares, the distance between the published domains, and
    the expected difference between two samples.

    The published counts are of mistralai/Mixtral-8x7B-v0.1, the base model, unquantized. So far this was only run with
    an artificial model that draws the published shares; you need the weights and the texts. The texts are in the
    repository github.com/allenai/OLMoE, in scripts/routing_output/text: c4_texts.txt and
    github_oss_with_stack_texts.txt. Another text of the same kind also works, but differs by sampling.

    Exit status: 0 every domain is, at each layer, nearer to its own published shares than to the other's, and nearer
    than the two are to each other; 1 one is not; 2 undecided.
    """

    model: Annotated[str, tyro.conf.Positional]
    """Checkpoint: a hub id or a folder."""
    c4: str | None = None
    """Text of the domain C4: a path, as for --dataset of jobs/capture.py. One of the two domains is sufficient."""
    github: str | None = None
    """Text of the domain GitHub, in the same form."""
    store: str = "validate.zarr"
    """Folder for the captures. Running the same command again resumes where it stopped."""
    model_revision: str | None = None
    """Commit, tag or branch of a hub model."""
    quantization: Literal["nf4", "fp4", "int8", "none"] = "nf4"
    """Precision of the weights."""
    batch_tokens: int | None = None
    """The most padded tokens in a micro-batch. Default: 32768 on a GPU, 8192 on a CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the model. auto: a GPU if this machine has one."""


def main(arguments: list[str]) -> int:
    """Capture, and print the table."""
    config = parse(ValidateConfig, "validate", arguments)
    given = {name: spec for name in ("c4", "github") if (spec := getattr(config, name)) is not None}
    if not given:
        raise ValueError("give the text of a published domain with --c4 PATH or --github PATH")
    if "://" in config.store:
        raise ValueError(f"--store {config.store}: a validation runs on this machine, so it must be a folder")

    from analysis.metrics.published import BLOCK_TOKENS, published_counts, refuse_other_model, validation
    from jobs.capturing.captures import capture_datasets  # torch takes seconds: --help must not wait for it
    from jobs.capturing.local import capture_here
    from jobs.capturing.run import Run
    from store import open_capture

    asked = CaptureConfig(
        local=True,
        dataset=tuple(given.values()),
        name=tuple(given),
        model=config.model,
        model_revision=config.model_revision,
        quantization=config.quantization,
        store=config.store,
        sequence_length=BLOCK_TOKENS,
        rows_per_shard=ROWS_PER_SHARD,
        batch_tokens=config.batch_tokens,
        bos="document",
        device=config.device,
    )
    run = Run(asked)
    model = run.described
    refuse_other_model(model["layers"], model["num_experts"], model["experts_per_token"])  # before any slow step
    characters = published_counts().attrs["n"] * CHARACTERS_PER_TOKEN
    sources = [(name, one_text(name, spec, characters)) for name, spec in given.items()]
    try:
        capture_datasets(run, sources, capture_here)
    except RuntimeError as error:
        log(f"error: {error}")
        return 2  # not 1, which is a verdict
    captures = {name: open_capture(asked.store_path, name) for name in given}
    with reporting("compare", unit="shards") as report:
        found = validation(captures, progress=lambda done, total: report.to(done))
    print_result(found)
    print(f"published: {published_counts().attrs['model']}")
    print(f"captured: {model['model']}, {model['quantization']}")
    say_next(command_line("report", asked.store_path))
    return 0 if bool(found["confirmed"].all()) else 1


def one_text(domain: str, spec: str, characters: int) -> Source:
    """A data set as one document of at most so many characters: its documents joined, one per line.

    Raises
    ------
    ValueError
        When it is not found, holds conversations, or no text.
    """
    source = resolve_source(spec)
    if source.conversations:
        raise ValueError(f"--{domain} {spec} contains conversations, but must contain texts")
    parts, size = [], 0
    for document in source.documents():
        # In Python's text mode, as the published texts were read.
        parts.append(document.text.replace("\r\n", "\n").replace("\r", "\n"))
        size += len(parts[-1]) + 1
        if size > characters:
            break
    text = "\n".join(parts)[:characters]
    if not text.strip():
        raise ValueError(f"--{domain} {spec} contains no text")
    known = {"data": "text", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    documents = [Document(name=domain, text=text)]
    return Source(name=domain, read=lambda start: islice(documents, start, None), identify=lambda: known)


def print_result(found: "xr.Dataset") -> None:
    """Print the table, and the number of tokens behind it."""
    table = Table(
        "domain", "layer", "choice", "to its own", "to the nearest other", "the two apart", "sampling", "nearest"
    )
    published = found["published"].values.tolist()
    for name in found["domain"].values.tolist():
        table.add_section()
        for layer in found["layer"].values.tolist():
            for choice in found["choice"].values.tolist():
                cell = found.sel(domain=name, layer=layer, choice=choice)
                other = float(cell["distance"].sel(published=[one for one in published if one != name]).min())
                values = (float(cell["own"]), other, float(cell["scale"]), float(cell["sampling"]))
                table.add_row(
                    name, str(layer), choice, *(f"{value:.4f}" for value in values), str(cell["verdict"].item())
                )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for name in found["domain"].values.tolist():
        tokens, published_tokens = int(found["tokens"].sel(domain=name)), found.attrs["published_tokens"]
        print(f"{name}: {tokens:,} tokens; {published_tokens:,} were published")
    cells = found["confirmed"]
    print(
        f"{int(cells.sum())} of {cells.size} shares are nearer to their own domain's than the domains are to each other"
    )


if __name__ == "__main__":
    run_job(main)
