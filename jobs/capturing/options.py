"""The options of a capture, and how they are read from a preset, a YAML file and a command line."""

import argparse
import math
import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from dotenv import dotenv_values, find_dotenv

from jobs.console.arguments import parse
from jobs.sources.formats import described
from jobs.sources.resolve import group_name
from jobs.sources.wikitext import CONFIGS, REPOSITORY
from store.secrets import without_secrets
from workers.record import Recordable, WeightPrecision

MIXTRAL = "mistralai/Mixtral-8x7B-Instruct-v0.1"
JOB_COPIES = "working_dir_files"  # the folder in which Ray keeps the code of `ray job submit --working-dir`
VARIABLES = {"store": "EXPERT_ATLAS_STORE", "device": "EXPERT_ATLAS_DEVICE", "workers": "EXPERT_ATLAS_WORKERS"}
DATASET = (
    "Data set to capture; may be repeated: an alias (wikitext-2, wikitext-103, demo:prose, demo:code, demo:legal,"
    f" demo:maths), a file, folder or glob of {described()}, a folder saved by the library datasets, or a hub id"
    " org/name[:config]."
)
NOT_IN_FILES = ("preset", "config", "print_config", "dry_run", "rate")


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Capture which experts a mixture-of-experts model chooses, for every token of one or more data sets.

    Each data set becomes a group of the store. A stopped capture resumes when the same command is run again. Exit
    status: 0 complete, 1 something is missing, 2 the command is wrong, 3 only quarantined shards are missing
    (--retry_quarantined), 130 or 143 interrupted.
    """

    preset: Literal["notebook"] | None = None
    """Start from the options of a known experiment; other options take precedence, and --print_config shows the result.
    notebook: the project's original experiment. Mixtral 8x7B Instruct in FP4, including its routers, computing in
    float16, without special tokens, on the first 128 tokens of each of the first 8 rows of WikiText-2's test split
    (rows as on the hub, one line each, some empty; the alias wikitext-2 gives articles). A different --dataset replaces
    the data set and its split; everything else is kept."""
    dataset: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(help=DATASET)] = ()
    local: bool = False
    """Capture in this process, on one device, without Ray. Default: with Ray, on the cluster at $RAY_ADDRESS or the one
    started on this machine, otherwise on this machine alone."""
    workers: int | None = None
    """Copies of the model on a cluster. Default: $EXPERT_ATLAS_WORKERS, otherwise one on every GPU, including those
    that join later; one if there are no GPUs."""
    gpus_per_worker: float = 1.0
    """GPUs per worker, or for --local: 0.25 puts four workers on one GPU, 2 spreads the model's layers over two."""
    cpus_per_worker: float = 1.0
    """CPUs that a worker reserves."""
    model: str = MIXTRAL
    """Checkpoint: a hub id, a folder, or "tiny" for the small Mixtral that comes with this package."""
    model_revision: str | None = None
    """Commit, tag or branch of a hub model."""
    quantization: Literal["nf4", "fp4", "mxfp4", "fp8", "int8", "none"] | None = None
    """Precision of the weights; nf4 is NF4 with double quantization, fp8 is e4m3 with one scale per row, or with the
    scales of a checkpoint published in fp8; mxfp4 is for models published in it. Routers are not quantized. Default:
    that of the resumed capture, otherwise as the checkpoint is stored, otherwise nf4 on a GPU and none on a CPU, where
    4 bits are slower."""
    matmul: Literal["bf16", "fp8"] = "bf16"
    """Precision of products with weights in nf4, fp4 or fp8. bf16 stands for the value of --dtype. fp8 is faster on
    GPUs that support it (L4, RTX 4090, H100 and newer); docs/models.md says for which families, and what it changes."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the model's computation. Default: bfloat16 on a GPU, float32 on a CPU."""
    quantize_gates: bool = False
    """Also round the routers to 4 bits, the default in transformers 4. For comparison: it changes about as many choices
    as rounding everything else (docs/models.md)."""
    store: str | None = None
    """The output: a folder (on a cluster, one that all nodes can access), or s3://bucket/prefix. Default:
    $EXPERT_ATLAS_STORE, otherwise ~/expert-atlas/routes.zarr."""
    name: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Name of the group, once for each --dataset and in the same order. Default: derived from the data set's name."""
    split: str | None = None
    """Split of a hub data set or a saved one (default: train), or of a folder whose files are named after splits."""
    text_field: str | None = None
    """Column that holds the text or the conversation, or two as PROMPT+COMPLETION. Default: "text", otherwise the only
    column of text or messages that does not name or sort rows, otherwise a prompt and its completion."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    limit_documents: int | None = None
    """Capture only the first so many documents."""
    limit_tokens: int | None = None
    """Capture only the first so many tokens of each document; a BOS is not counted."""
    sequence_length: int | None = None
    """The most tokens in a row; longer documents are split into several rows. Default: the smallest power of two that
    holds the longest of the first 1,000 documents, at most 2048."""
    rows_per_shard: int | None = None
    """Rows in a shard, the unit of work. Default: that of the resumed capture, otherwise 262144 // sequence_length;
    fewer on a CPU, by the model's operations per token, so that a shard takes seconds."""
    record: Annotated[tuple[Recordable, ...], tyro.conf.UseAppendAction] = ()
    """Record more than the choices; may be repeated. logits: the router's logits before the choice. output_norm: the L2
    norm of each chosen expert's output before weighting. logprob: the log-probability of the next token, at the
    position that predicts it. The last two need the last layer's experts, and logprob the model's head, which are not
    loaded otherwise. docs/recording.md lists the cost of each in time and bytes."""
    top_logits: int | None = None
    """With --record logits: record so many of the largest logits of each token at each layer, with their experts.
    Default: all for up to 64 experts, otherwise 32."""
    weight_precision: WeightPrecision = "float16"
    """Precision of the stored weights. float32 is for training that replays routes. compact rounds them to the
    precision of the routers: for routers in bfloat16, to 5 bits of mantissa."""
    mask: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Experts that cannot be chosen, as LAYER:EXPERT: 7:1. May be repeated. Either side may be a range, 3-5:0-2, or *
    for all. The router's own rule chooses among the others; recorded logits are those before masking."""
    mask_file: Path | None = None
    """JSON file with more experts that cannot be chosen: layers with lists of experts, {"7": [1, 3]}."""
    force: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Experts that are always chosen, in the form of --mask, with the weight from their logits."""
    force_file: Path | None = None
    """JSON file with more experts that are always chosen, in the form of --mask_file."""
    top_k: int | None = None
    """Experts chosen for each token. Default: the model's own number."""
    routes_from: str | None = None
    """Take the choices from another capture of the same text by the same model, STORE/DATASET, instead of from the
    routers. Its rows must be the same, and workers must have access to its store."""
    routes_weights: bool = False
    """With --routes_from: also take the weights of the choices. Default: weights from this model's own logits."""
    batch_tokens: int | None = None
    """The most padded tokens in a micro-batch. Default: 32768 on a GPU, 8192 on a CPU."""
    bos: Literal["none", "document", "row"] = "none"
    """Where a beginning-of-sequence token is inserted."""
    skip_unrenderable: bool = False
    """Skip rows without a text, and conversations that have a different form or that the chat template rejects, instead
    of stopping at the first. They are counted, and listed in the log, in status and in the attributes."""
    template_date: str = "2024-07-26"
    """The current date for chat templates that contain it: YYYY-MM-DD. With a fixed date, the tokens are the same every
    day."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the model. auto: $EXPERT_ATLAS_DEVICE, otherwise a GPU if this machine, or the cluster at present, has
    one."""
    retry_quarantined: bool = False
    """Retry the shards that were quarantined after three failures."""
    stall_minutes: float = 10.0
    """A worker on a cluster that routes no token for so long counts as hung: it is killed and replaced, and its shards
    are retried."""
    allow_mixed: bool = False
    """Resume a capture that was started with different package versions or on a different device type."""
    dry_run: bool = False
    """Estimate rows, shards, tokens, bytes and memory; write nothing, load no weights."""
    rate: float | None = None
    """Tokens per second, from which --dry_run computes the time."""
    config: Path | None = None
    """YAML file with any of these options; the command line takes precedence."""
    print_config: bool = False
    """Print the options as a YAML file for --config, and stop."""

    def __post_init__(self) -> None:
        for name in (
            "limit_documents",
            "limit_tokens",
            "sequence_length",
            "rows_per_shard",
            "batch_tokens",
            "top_logits",
            "rate",
            "workers",
            "stall_minutes",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name} is {value}, but must be more than 0")
        try:
            date.fromisoformat(self.template_date)
        except ValueError as error:
            raise ValueError(f"--template_date is {self.template_date!r}, but must be a date: YYYY-MM-DD") from error
        if not all(0 <= value < math.inf for value in (self.gpus_per_worker, self.cpus_per_worker)):
            raise ValueError("--gpus_per_worker and --cpus_per_worker must be 0 or more")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"--gpus_per_worker {self.gpus_per_worker}: a value above 1 must be a whole number")
        if len(set(self.record)) < len(self.record):
            raise ValueError(f"--record is given as {', '.join(self.record)}: each value may only be given once")
        if self.name and len(self.name) != len(self.dataset):
            raise ValueError(
                f"--name is given {len(self.name)} times and --dataset {len(self.dataset)} times: give"
                " one name for each data set, or none"
            )

    @property
    def store_path(self) -> str:
        """The store: an absolute path, or an s3:// URL.

        Raises
        ------
        ValueError
            When it is empty, or inside the copy of the code that a cluster makes for a job and removes afterwards.
        """
        place = "~/expert-atlas/routes.zarr" if self.store is None else self.store
        if Path(place) == Path():
            raise ValueError("--store is empty or the current folder: use a separate folder, such as routes.zarr")
        if "://" in place:
            return place
        if place.startswith("~") and not Path.home().is_dir():
            raise ValueError(f"--store {place}: this user has no home folder; use another --store")
        path = Path(place).expanduser().absolute()
        if JOB_COPIES in path.parts:
            raise ValueError(
                f"--store {place} would be in {path.parent}, a copy that is removed after the job: use an absolute"
                " path on a file system that all nodes can access, or s3://bucket/prefix"
            )
        return str(path)

    def as_options(self) -> dict[str, Any]:
        """The options as plain values, without those that only say how to run."""
        options = {name: value for name, value in asdict(self).items() if name not in NOT_IN_FILES}
        return {name: _plain(value) for name, value in options.items()}

    def as_yaml(self) -> str:
        """The options as a file for `--config`."""
        return yaml.safe_dump(self.as_options(), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """A value for a file, without secrets."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return without_secrets(str(value)) if isinstance(value, str | Path) else value


_FIELDS = {field.name: field for field in fields(CaptureConfig)}

PRESETS = {
    "notebook": CaptureConfig(
        model=MIXTRAL,
        quantization="fp4",
        dtype="float16",
        quantize_gates=True,
        bos="none",
        dataset=(f"{REPOSITORY}:{CONFIGS['wikitext-2']}",),
        split="test",
        limit_documents=8,
        limit_tokens=128,
        sequence_length=128,
    ),
}
"""The options of `--preset`.

For the notebook, these are all known settings. Unknown, and therefore not included: the revisions of its model and data
set; whether it kept empty rows (here they are documents without a token); whether 128 tokens were taken of each row, as
here, or of all together; how it batched and padded. Its code is not run either: routers are rounded to the values that
transformers 4 computed with (docs/models.md). The forward pass is that of this project, and runs on the
installed versions.
"""


def parse_capture(arguments: Sequence[str]) -> CaptureConfig:
    """Read a command line, the file of its `--config`, and the preset, over which both take precedence.

    Raises
    ------
    ValueError, OSError
        When the file cannot be read or holds an unknown key.
    SystemExit
        From `--help` and from unknown or malformed options.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    for repeated in ("--dataset", "--name", "--record", "--mask", "--force"):
        early.add_argument(repeated, action="append")
    early.add_argument("--preset")
    known, _ = early.parse_known_args(arguments)
    if isinstance(known.config, list):  # argparse reads `--config=--` as an option without a value
        raise ValueError("--config needs a file, but got --")
    file = [] if known.config is None else _as_arguments(_read(known.config.expanduser()), known.config)
    base = PRESETS.get(known.preset, CaptureConfig())
    if early.parse_known_args([*file, *arguments])[0].dataset:
        base = replace(base, dataset=(), split=None)  # a preset's split belongs to its data set
    base = parse(CaptureConfig, "capture", file, default=from_environment(base))
    # Values on the command line replace the file's list; they are not appended.
    if known.dataset:
        base = replace(base, dataset=(), name=())
    lists: dict[str, Any] = {name: () for name in ("record", "mask", "force") if getattr(known, name)}
    base = replace(base, **lists)
    return parse(CaptureConfig, "capture", arguments, default=base)


def as_begun(attrs: Mapping[str, Any], data_set: str, **changes: Any) -> CaptureConfig:
    """The options for repeating the capture of a data set.

    Parameters
    ----------
    attrs
        The capture's attributes, from `store.attributes`.
    data_set
        Its name in the store.
    changes
        Options with different values.

    Raises
    ------
    ValueError
        When it was not captured by `jobs/capture.py`, as for imported routes and samples of `jobs/importance.py`.
    """
    begun = attrs.get("configuration")
    script = attrs.get("script", "jobs/capture.py")  # not recorded by captures
    if not isinstance(begun, Mapping) or "dataset" not in begun or script != "jobs/capture.py":
        raise ValueError(f"{data_set} is not a capture of jobs/capture.py and cannot be repeated: use one that is")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in begun.items()}
    options = {name: value for name, value in options.items() if name in _FIELDS}
    names = options["name"] or tuple(map(group_name, options["dataset"]))
    options |= {"dataset": (options["dataset"][names.index(data_set)],), "name": (data_set,)}
    options |= {name: attrs[name] for name in ("sequence_length", "rows_per_shard")}  # so that rows are the same
    options |= {f"{name}_file": None for name in ("mask", "force")}  # the identity holds their content
    options |= {name: tuple(attrs.get(name) or ()) for name in ("mask", "force")}
    return CaptureConfig(**options | changes)


Config = TypeVar("Config", bound=CaptureConfig)


def from_environment(default: Config, script: str = "capture") -> Config:
    """Options with defaults from the environment; errors are those of the script."""
    given = {name: os.environ[variable] for name, variable in VARIABLES.items() if os.environ.get(variable)}
    return parse(type(default), script, [f"--{name}={value}" for name, value in given.items()], default=default)


def take_hub_token() -> None:
    """Set HF_TOKEN from a `.env` file, before a hub library reads the environment; the rest of the file is ignored."""
    if token := dotenv_values(find_dotenv(usecwd=True)).get("HF_TOKEN"):
        os.environ.setdefault("HF_TOKEN", token)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        options = yaml.load(text, Loader=yaml.BaseLoader)  # every value as written: 0123456 is a commit
        tree = yaml.compose(text)
        names = [str(key.value) for key, _ in tree.value] if isinstance(tree, yaml.MappingNode) else []
    except RecursionError as error:
        raise ValueError(f"--config {path} is nested too deeply for options") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} contains {type(options).__name__}, but must contain option: value lines")
    names = [name.replace("-", "_") for name in names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--config {path} gives {', '.join(twice)} more than once")
    options = dict(zip(names, options.values(), strict=True))
    known = _FIELDS.keys() - set(NOT_IN_FILES)
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"--config {path}: unknown {', '.join(unknown)}; known options are {', '.join(sorted(known))}")
    return options


def _as_arguments(options: dict[str, Any], path: Path) -> list[str]:
    """The options of a file as a command line; `null`, `~` and empty values leave an option at its default."""
    arguments = []
    lists = {name for name, field in _FIELDS.items() if field.default == ()}
    switches = {name for name, field in _FIELDS.items() if isinstance(field.default, bool)}
    for name, value in options.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items) or (isinstance(value, list) and name not in lists):
            kind = "one value or a list of them" if name in lists else "one value"
            raise ValueError(f"--config {path}: {name} is {reprlib.repr(value)}, but must be {kind}")
        if name in switches and value not in ("true", "false"):
            raise ValueError(f"--config {path}: {name} is {value!r}, but must be true or false")
        if name in switches:
            arguments.append(f"--{name}" if value == "true" else f"--no_{name}")
        else:
            arguments += [f"--{name}={item}" for item in items if item not in ("", "~", "null")]
    return arguments
