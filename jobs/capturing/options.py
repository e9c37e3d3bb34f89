"""What a capture is asked to do, and how it is read from a preset, a YAML file and a command line."""

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
    "Data set to capture, once for each: an alias (wikitext-2, wikitext-103, demo:prose, demo:code, demo:legal,"
    f" demo:maths), a file, folder or glob of {described()}, a folder saved by the library datasets, or a hub id"
    " org/name[:config]."
)
NOT_IN_FILES = ("preset", "config", "print_config", "dry_run", "rate")


@dataclass(frozen=True, kw_only=True)
class CaptureConfig:
    """Capture which experts a mixture-of-experts model chooses, for every token of one or more data sets.

    Each data set becomes a group of the store. A capture that was stopped, however it was stopped, goes on when the
    same command is given again. Exit status: 0 complete, 1 something is missing, 2 the command cannot be carried out,
    3 only shards in quarantine are missing (--retry_quarantined), 130 or 143 interrupted.
    """

    preset: Literal["notebook"] | None = None
    """Begin with the options of a known experiment; whatever else is given goes before them, and --print_config shows
    what comes of it. notebook: the one that this project grew from. Mixtral 8x7B Instruct in FP4, its routers too,
    computing in float16, without special tokens, on the first 128 tokens of each of the first 8 rows of WikiText-2's
    test split (rows as the hub has them, a line each, some empty; the alias wikitext-2 gives articles). Another
    --dataset replaces that one and its split; all else is kept."""
    dataset: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(help=DATASET)] = ()
    local: bool = False
    """Capture in this process, on one device, without Ray. Default: with Ray, on the cluster of $RAY_ADDRESS or the
    one that was started on this machine, else on this machine alone."""
    workers: int | None = None
    """Copies of the model on a cluster. Default: $EXPERT_ATLAS_WORKERS, else one on every GPU, also on those that
    join later; without GPUs one."""
    gpus_per_worker: float = 1.0
    """GPUs of a worker, or of --local: 0.25 puts four workers on one GPU, 2 spreads the model's layers over two."""
    cpus_per_worker: float = 1.0
    """CPUs that a worker reserves."""
    model: str = MIXTRAL
    """Checkpoint: a hub id, a folder, or "tiny" for the small Mixtral that comes with this package."""
    model_revision: str | None = None
    """Commit, tag or branch of a hub model."""
    quantization: Literal["nf4", "fp4", "mxfp4", "fp8", "int8", "none"] | None = None
    """Precision of the weights; nf4 is NF4 with double quantization, fp8 is e4m3 with one scale a row, or with those of
    a checkpoint that is published in it; mxfp4 is for models that are published in it. Routers are left as they are.
    Default: that of the capture that is resumed, else what the checkpoint is stored in, else nf4 on a GPU and none on a
    CPU, where 4 bits are slower."""
    matmul: Literal["bf16", "fp8"] = "bf16"
    """What products with weights in nf4, fp4 or fp8 are computed in. bf16 stands for what --dtype says. fp8 is faster,
    on GPUs that can (L4, RTX 4090, H100 and newer); docs/models.md says for which families, and what it changes."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What the model computes in. Default: bfloat16 on a GPU, float32 on a CPU."""
    quantize_gates: bool = False
    """Round the routers to 4 bits too, as transformers 4 does unless asked otherwise. For comparison: it changes about
    as many choices as rounding all the rest (docs/models.md)."""
    store: str | None = None
    """Where the captures go: a folder, on a cluster one that all nodes see, or s3://bucket/prefix.
    Default: $EXPERT_ATLAS_STORE, else ~/expert-atlas/routes.zarr."""
    name: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Name of the group, once for each --dataset and in the same order. Default: made from the data set's name."""
    split: str | None = None
    """Split of a hub data set or a saved one (default: train), or of a folder whose files are named after splits."""
    text_field: str | None = None
    """Column that holds the text or the conversation, or two as PROMPT+COMPLETION. Default: "text", else the only
    column of text or messages that does not name or sort rows, else a prompt and its completion."""
    revision: str | None = None
    """Commit, tag or branch of a hub data set."""
    limit_documents: int | None = None
    """Capture the first so many documents only."""
    limit_tokens: int | None = None
    """Capture the first so many tokens of each document only; a BOS is not counted."""
    sequence_length: int | None = None
    """Tokens in a row at most; longer documents are cut into several rows. Default: the smallest power of two that
    holds the longest of the first 1,000 documents, at most 2048."""
    rows_per_shard: int | None = None
    """Rows in a shard, the unit of work. Default: those of the capture that is resumed, else 262144 //
    sequence_length; on a CPU fewer, by the model's operations a token, so that a shard takes seconds."""
    record: Annotated[tuple[Recordable, ...], tyro.conf.UseAppendAction] = ()
    """Record more than the choices, once for each. logits: what the router computed before it chose. output_norm: the
    L2 norm of each chosen expert's output before it is weighed. logprob: the log-probability of the next token, at the
    position that predicts it. The last two need the last layer's experts, and the last one the model's head, which are
    not loaded otherwise. docs/recording.md says what each takes, in time and in bytes."""
    top_logits: int | None = None
    """With --record logits: of each token at each layer, so many of the largest logits, with their experts. Default:
    all of them of up to 64 experts, 32 of more."""
    weight_precision: WeightPrecision = "float16"
    """What the weights of choices are stored in. float32 is for training that replays routes. compact rounds them to
    what the routers' own precision means: of routers in bfloat16, to 5 bits of mantissa."""
    mask: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Experts that cannot be chosen, as LAYER:EXPERT, once for each: 7:1. Either side may be a range, 3-5:0-2, or * for
    all. The router's own rule chooses among the others; recorded logits are those before."""
    mask_file: Path | None = None
    """JSON file with more experts that cannot be chosen: layers with lists of experts, {"7": [1, 3]}."""
    force: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Experts that are always among the chosen, named as those of --mask, with the weight that their logits give."""
    force_file: Path | None = None
    """JSON file with more experts that are always among the chosen, as that of --mask_file."""
    top_k: int | None = None
    """Experts chosen for each token. Default: the model's own number."""
    routes_from: str | None = None
    """Take the choices from another capture of the same text by the same model, STORE/DATASET, instead of the routers:
    what would these weights do on the routes of others? Its rows must be the same. Workers must see its store."""
    routes_weights: bool = False
    """With --routes_from: take the weights of the choices too. Default: this model's own logits weigh them."""
    batch_tokens: int | None = None
    """Padded tokens in a micro-batch at most. Default: 32768 on a GPU, 8192 on a CPU."""
    bos: Literal["none", "document", "row"] = "none"
    """Where a beginning-of-sequence token is put."""
    skip_unrenderable: bool = False
    """Leave out rows without a text, and conversations that have another form or that the chat template cannot take,
    instead of stopping at the first. They are counted and named in the log, in status and in the attributes."""
    template_date: str = "2024-07-26"
    """What chat templates take for the day of the run, which some write: YYYY-MM-DD. So the tokens are the same every
    day."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the model. auto: $EXPERT_ATLAS_DEVICE, else a GPU if this machine, or the cluster now, has one."""
    retry_quarantined: bool = False
    """Try again the shards that were given up after three failures."""
    stall_minutes: float = 10.0
    """A cluster's worker that routes no token for so long is taken for hung: killed, replaced, its shards retried."""
    allow_mixed: bool = False
    """Go on with a capture that was begun with other package versions or on another device type."""
    dry_run: bool = False
    """Estimate rows, shards, tokens, bytes and memory; write nothing, load no weights."""
    rate: float | None = None
    """Tokens per second, from which --dry_run tells the time."""
    config: Path | None = None
    """YAML file with any of these options; the command line goes before it."""
    print_config: bool = False
    """Print the options as a YAML file that --config takes, and stop."""

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
                raise ValueError(f"--{name} is {value}, and must be more than 0")
        try:
            date.fromisoformat(self.template_date)
        except ValueError as error:
            raise ValueError(f"--template_date is {self.template_date!r}, and must be a date: YYYY-MM-DD") from error
        if not all(0 <= value < math.inf for value in (self.gpus_per_worker, self.cpus_per_worker)):
            raise ValueError("--gpus_per_worker and --cpus_per_worker must be 0 or more")
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(f"--gpus_per_worker {self.gpus_per_worker}: above 1 it must be a whole number")
        if len(set(self.record)) < len(self.record):
            raise ValueError(f"--record is given as {', '.join(self.record)}: give each once")
        if self.name and len(self.name) != len(self.dataset):
            raise ValueError(
                f"--name is given {len(self.name)} times and --dataset {len(self.dataset)} times: each data set"
                " needs one name, or none is given"
            )

    @property
    def store_path(self) -> str:
        """The store: an absolute path, or an s3:// URL.

        Raises
        ------
        ValueError
            When it is empty, or lies in the copy of the code that a cluster makes for a job and removes after it.
        """
        place = "~/expert-atlas/routes.zarr" if self.store is None else self.store
        if Path(place) == Path():
            raise ValueError("--store is empty, or the current folder: name a folder of its own, such as routes.zarr")
        if "://" in place:
            return place
        if place.startswith("~") and not Path.home().is_dir():
            raise ValueError(f"--store {place}: this user has no home folder; name a folder with --store")
        path = Path(place).expanduser().absolute()
        if JOB_COPIES in path.parts:
            raise ValueError(
                f"--store {place} would lie in {path.parent}, a copy that is removed after the job: give an absolute"
                " path on a file system that all nodes see, or s3://bucket/prefix"
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
"""What `--preset` begins with.

Of the notebook these are all the settings that are known. Not known, and so not here: the revisions of its model and
data set; whether it kept empty rows (here they are documents without a token); whether 128 tokens were taken of each
row, as here, or of all together; how it batched and padded. Nor is its code run: routers are rounded to the values that
transformers 4 computed with (docs/models.md). The forward pass is this project's own, and runs on the
installed versions.
"""


def parse_capture(arguments: Sequence[str]) -> CaptureConfig:
    """Read a command line, the file that its `--config` names, and the preset that both go before.

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
    if isinstance(known.config, list):  # argparse takes `--config=--` for one without a value
        raise ValueError("--config needs a file, and -- is none")
    file = [] if known.config is None else _as_arguments(_read(known.config.expanduser()), known.config)
    base = PRESETS.get(known.preset, CaptureConfig())
    if early.parse_known_args([*file, *arguments])[0].dataset:
        base = replace(base, dataset=(), split=None)  # a preset's split is its data set's
    base = parse(CaptureConfig, "capture", file, default=from_environment(base))
    # What is given on the command line goes in place of the file's list, not after it.
    if known.dataset:
        base = replace(base, dataset=(), name=())
    lists: dict[str, Any] = {name: () for name in ("record", "mask", "force") if getattr(known, name)}
    base = replace(base, **lists)
    return parse(CaptureConfig, "capture", arguments, default=base)


def as_begun(attrs: Mapping[str, Any], data_set: str, **changes: Any) -> CaptureConfig:
    """The options that capture a data set again as it was captured.

    Parameters
    ----------
    attrs
        What `store.attributes` gives of the capture.
    data_set
        Its name in the store.
    changes
        Options that are to be others.

    Raises
    ------
    ValueError
        When it was not captured by `jobs/capture.py`: imported routes, and what `jobs/importance.py` sampled.
    """
    begun = attrs.get("configuration")
    script = attrs.get("script", "jobs/capture.py")  # which captures do not say
    if not isinstance(begun, Mapping) or "dataset" not in begun or script != "jobs/capture.py":
        raise ValueError(f"{data_set} is no capture of jobs/capture.py, and cannot be made again: give one that is")
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in begun.items()}
    options = {name: value for name, value in options.items() if name in _FIELDS}
    names = options["name"] or tuple(map(group_name, options["dataset"]))
    options |= {"dataset": (options["dataset"][names.index(data_set)],), "name": (data_set,)}
    options |= {name: attrs[name] for name in ("sequence_length", "rows_per_shard")}  # so that rows are the same
    options |= {f"{name}_file": None for name in ("mask", "force")}  # the identity has what stood in them
    options |= {name: tuple(attrs.get(name) or ()) for name in ("mask", "force")}
    return CaptureConfig(**options | changes)


Config = TypeVar("Config", bound=CaptureConfig)


def from_environment(default: Config, script: str = "capture") -> Config:
    """Options with what the environment says in place of their defaults; errors are those of the script."""
    given = {name: os.environ[variable] for name, variable in VARIABLES.items() if os.environ.get(variable)}
    return parse(type(default), script, [f"--{name}={value}" for name, value in given.items()], default=default)


def take_hub_token() -> None:
    """HF_TOKEN from a `.env` file, before a hub library reads the environment; nothing else that stands in there."""
    if token := dotenv_values(find_dotenv(usecwd=True)).get("HF_TOKEN"):
        os.environ.setdefault("HF_TOKEN", token)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        options = yaml.load(text, Loader=yaml.BaseLoader)  # every value as it is written: 0123456 is a commit
        tree = yaml.compose(text)
        names = [str(key.value) for key, _ in tree.value] if isinstance(tree, yaml.MappingNode) else []
    except RecursionError as error:
        raise ValueError(f"--config {path} is nested too deeply to be options") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--config {path} holds {type(options).__name__}, and must hold option: value lines")
    names = [name.replace("-", "_") for name in names]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--config {path} gives {', '.join(twice)} more than once")
    options = dict(zip(names, options.values(), strict=True))
    known = _FIELDS.keys() - set(NOT_IN_FILES)
    if unknown := sorted(options.keys() - known):
        raise ValueError(f"--config {path}: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return options


def _as_arguments(options: dict[str, Any], path: Path) -> list[str]:
    """The options of a file as a command line; `null`, `~` and nothing leave an option at its default."""
    arguments = []
    lists = {name for name, field in _FIELDS.items() if field.default == ()}
    switches = {name for name, field in _FIELDS.items() if isinstance(field.default, bool)}
    for name, value in options.items():
        items = value if isinstance(value, list) else [value]
        if not all(isinstance(item, str) for item in items) or (isinstance(value, list) and name not in lists):
            kind = "one value or a list of them" if name in lists else "one value"
            raise ValueError(f"--config {path}: {name} holds {reprlib.repr(value)}, and must hold {kind}")
        if name in switches and value not in ("true", "false"):
            raise ValueError(f"--config {path}: {name} is {value!r}, and must be true or false")
        if name in switches:
            arguments.append(f"--{name}" if value == "true" else f"--no_{name}")
        else:
            arguments += [f"--{name}={item}" for item in items if item not in ("", "~", "null")]
    return arguments
