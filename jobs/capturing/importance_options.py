"""The options of `jobs/importance.py`: the applicable ones of a capture, and its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jobs.capturing.options import CaptureConfig, from_environment
from jobs.console.arguments import parse
from jobs.console.places import refuse_no_file

HIDDEN = (
    *("preset", "record", "top_logits", "weight_precision", "mask", "mask_file", "force", "force_file"),
    *("top_k", "routes_from", "routes_weights", "limit_documents", "config", "print_config"),
)
"""Options of a capture that do not apply."""
TELLING = ("output", "figures", "write_mask", "least", "json")
"""Options for the output of the measured effects."""


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig(CaptureConfig):
    """Measure the effect of every expert on predictions: mask it at its layer, and measure the change of the next
    token's log-probability, on a random sample of the documents of each data set.

    The layers below are computed once. The effects of each data set, with its routes, become a group of the store, and
    the same command resumes a stopped job. Then the effects are reported, with intervals and p-values over documents,
    together with load and saliency. Exit status: 0 measured, 1 something is missing, 2 the command is wrong, 3 only
    quarantined shards are missing (--retry_quarantined), 130 or 143 interrupted.
    """

    preset: tyro.conf.Suppress[None] = None
    record: tyro.conf.Suppress[tuple[()]] = ()
    top_logits: tyro.conf.Suppress[None] = None
    mask: tyro.conf.Suppress[tuple[()]] = ()
    mask_file: tyro.conf.Suppress[None] = None
    force: tyro.conf.Suppress[tuple[()]] = ()
    force_file: tyro.conf.Suppress[None] = None
    top_k: tyro.conf.Suppress[None] = None
    routes_from: tyro.conf.Suppress[None] = None
    routes_weights: tyro.conf.Suppress[bool] = False
    weight_precision: tyro.conf.Suppress[Literal["float16"]] = "float16"
    limit_documents: tyro.conf.Suppress[None] = None
    config: tyro.conf.Suppress[None] = None
    print_config: tyro.conf.Suppress[bool] = False
    layers: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Layers whose experts are measured, by the model's own numbers: 3, or 3-5. May be repeated. Default: all that have
    experts."""
    sample_tokens: int = 65_536
    """Approximate number of tokens in each data set's sample; documents are drawn at random until they have so many."""
    seed: int = 0
    """Seed of the draw."""
    limit_tokens: int | None = 2048
    """The most tokens of each document, its first ones: intervals need many documents."""
    rows_per_shard: int | None = None
    """Rows in a shard. One worker measures a shard, and starts it again if the job was stopped. Default: as many as
    fill a micro-batch; fewer on a CPU."""
    batch_tokens: int | None = None
    """The most padded tokens in a micro-batch; the hidden states before each layer are kept on the device. Default:
    65536 on a GPU, 8192 on a CPU."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("importance.zarr")
    """The output: the effects by data set, layer and expert, as a small store for xarray.open_zarr, with intervals, p,
    q, loads, saliencies and rank correlations. An existing one is replaced."""
    figures: Path | None = None
    """A folder, created if missing, for one chart per data set as SVG, PDF and PNG."""
    write_mask: Path | None = None
    """Write the least important experts of each layer as a JSON file for --mask_file of jobs/capture.py: those whose
    removal costs predictions least, on average over the data sets."""
    least: int = 1
    """With --write_mask: the number of experts per layer."""
    json: bool = False
    """One JSON document on standard output, for scripts: docs/json.md names its keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sample_tokens", "least"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}, but must be at least 1")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}, but must be 0 or more")
        for name in ("output", "figures"):
            if ":/" in str(place := getattr(self, name)):
                raise ValueError(f"--{name} {place}: must be a folder on this machine")
        if self.write_mask is not None:
            refuse_no_file("write_mask", self.write_mask)

    def as_options(self) -> dict[str, Any]:
        """See `CaptureConfig`; without the options for the output."""
        options = super().as_options()
        return {name: value for name, value in options.items() if name not in (*HIDDEN, *TELLING)}


def parse_importance(arguments: Sequence[str]) -> ImportanceConfig:
    """Read a command line, with defaults from the environment.

    Raises
    ------
    ValueError
        When an option is invalid.
    SystemExit
        From `--help` and from unknown or malformed options.
    """
    default = from_environment(ImportanceConfig(), "importance")
    return parse(ImportanceConfig, "importance", arguments, default=default)
