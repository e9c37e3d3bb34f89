"""Import routes that another engine returned, as a capture.

usage: python jobs/import_routes.py FILES --format FORMAT --model MODEL --store STORE --name DATASET

Examples:
  python jobs/import_routes.py routes.npz --format vllm --model org/model --store s.zarr --name chat
  python jobs/import_routes.py *.jsonl --format sglang --model org/model --store s.zarr --name chat
  python jobs/import_routes.py own.parquet --format plain --model mine --num_experts 8 \\
    --store s.zarr --name own

What to import:
  --format FORMAT           plain, vllm, sglang, transformers, olmoe or replay
  --store STORE             the output: a folder, or s3://bucket/prefix
  --name DATASET            the data set's name in it
  --weights RULE            transformers: how logits become weights (family)
  --sequence_length N       most tokens in a row; --rows_per_shard N

Model:
  --model MODEL             that chose: a folder, tiny, a hub id, or its name with --num_experts
  --num_experts N           experts per layer; then no configuration is read
  --experts_per_token N     for formats without it (the model's)
  --layers LAYERS           the layers that have experts: 1-26, or 0,2,4 (the model's)
  --tokenizer TOKENIZER     a folder, a hub id or none (the model's)
  --engine_version VERSION  stored with the routes; --quantization KIND

Output:
  --json                    one JSON document, for scripts; docs/json.md names its keys

Run the same command again to resume. docs/importing.md describes the formats, docs/options.md
the options. Exit status: 0 all imported, 1 another job is writing the capture, 2 files or options
are wrong.
"""

import hashlib
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import command_line, start

start(__name__, __doc__)

import tyro

from jobs.console.arguments import parse
from jobs.console.tables import print_json
from jobs.console.terminal import Reporter, log, reporting, run_job, say_next, shown
from store.coverage import Coverage
from store.layout import missing_expert
from store.writing import write_capture

if TYPE_CHECKING:
    from workers.imports.blocks import Shape
    from workers.imports.formats import Format
    from workers.imports.sequence import Asked, Routed
    from workers.text.tokenizer import TextTokenizer

RULES = {"mixtral": "renormalized", "granitemoe": "renormalized", "gpt_oss": "renormalized"} | dict.fromkeys(
    ("olmoe", "qwen2_moe", "qwen3_moe"), "norm_topk_prob"
)
"""How families with a plain softmax compute weights from logits: always renormalized, or according to their
configuration."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Import routes from vLLM, SGLang, transformers or another source as a capture: see docs/importing.md.

    Running the same command again resumes an interrupted import and compares what is already there. Exit status: 0 all
    imported, 1 another job is writing the capture, 2 the files or options are wrong; the error names the file, the line
    and what to do.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of one format, in order."""
    format: Literal["plain", "vllm", "sglang", "transformers", "olmoe", "replay"]
    """plain: JSON lines, Parquet or npz of token, expert, optional weight, document and phase. vllm: npz of offline
    outputs, or JSON lines of HTTP responses. sglang: JSON lines of responses. transformers: safetensors or npz of
    output_router_logits. olmoe: JSON lines of its analysis scripts. replay: what analysis.write_replay wrote."""
    model: str
    """The model that chose: a folder, "tiny", a hub id, or only its name if --num_experts is given."""
    store: str
    """The store to write to: a folder, or s3://bucket/prefix. Created if it does not exist."""
    name: str
    """The data set's name in it."""
    engine_version: str = "not stated"
    """The engine's version, stored with the routes: 0.33.0."""
    quantization: str = "not stated"
    """The precision of the engine's weights, stored with the routes: fp8, none."""
    tokenizer: str = "model"
    """A folder or hub id, for the pieces of tokens and for texts; "model": the model's, unless --num_experts is given;
    "none": only ids are stored."""
    num_experts: int | None = None
    """Experts per layer. If given, the model's configuration is not read."""
    experts_per_token: int | None = None
    """k, for formats that do not contain it. Default: the model's."""
    layers: str | None = None
    """The model's own numbers of the layers that have experts: 1-26, or 0,2,4. Default: the model's, or with
    --num_experts all layers in the files. If the files have all of the model's layers, the others are left out."""
    weights: Literal["family", "none", "softmax", "renormalized"] = "family"
    """transformers: how weights are computed from logits. family: as in the model's family, none if that is not
    known."""
    sequence_length: int | None = None
    """The most tokens in a row. Default: the smallest power of two that holds the longest of the first 1,000 sequences;
    16 to 2,048."""
    rows_per_shard: int | None = None
    """Default: about 262,144 positions."""
    json: bool = False
    """One JSON document on standard output, for scripts: docs/json.md names its keys."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is known about the model."""

    name: str
    revision: str | None = None
    layers: tuple[int, ...] | None = None
    num_experts: int
    experts_per_token: int | None
    rule: str = "none"
    """How weights are computed from router logits; "unknown" if the k largest logits may not be the choice."""


def main(arguments: list[str]) -> int:
    """Import, and report what was imported."""
    config = parse(ImportConfig, "import_routes", arguments)

    from workers.imports.blocks import Grid, ahead, blocks, shape_of, tokenized
    from workers.imports.files import size_bytes
    from workers.imports.formats import FORMATS
    from workers.imports.sequence import Asked

    chosen = FORMATS[config.format]
    _check(config, chosen)
    model, tokenizer = _model(config), _tokenizer(config)
    tokenize = None if tokenizer is None else lambda text: tokenizer.encode_batch([text])[0]
    asked = Asked(experts_per_token=model.experts_per_token, weights=_weights(config, model))
    shape = shape_of(_sequences(config.files, chosen, asked), tokenize)
    _refuse_choices(model, shape)
    layers = _layers(config) or model.layers or tuple(range(shape.layers))
    positions = config.sequence_length or shape.positions
    grid = Grid(positions=positions, layers=layers, missing_expert=missing_expert(model.num_experts))
    by_weight, counts = chosen.by_weight or shape.weights, _Counts()
    size = sum(map(size_bytes, config.files))
    with reporting(f"import {config.name}", total=size, unit="bytes", transient=True) as report:
        read = (tokenized(routed, tokenize) for routed in _sequences(config.files, chosen, asked))
        state = write_capture(
            config.store,
            config.name,
            blocks=ahead(blocks(counts.watch(read, report), shape, grid)),
            num_experts=model.num_experts,
            layers=layers,
            pieces=None if tokenizer is None else tokenizer.pieces(),
            attrs=_provenance(config, model, tokenizer, by_weight=by_weight),
            rows_per_shard=config.rows_per_shard,
        )
    facts = _facts(config, state, shape) | {"tokens_without_routes": counts.without_routes, "layers": list(layers)}
    facts["num_experts"] = model.num_experts
    if config.json:
        print_json(facts)
    else:
        _tell(config, facts, by_weight=by_weight)
    return 0


def _facts(config: ImportConfig, state: Coverage, shape: "Shape") -> dict[str, Any]:
    """What was imported; see `ImportConfig.json`."""
    return {
        "store": config.store,
        "data_set": config.name,
        "format": config.format,
        "tokens": state.tokens_done,
        "rows": state.plan.rows,
        "documents": state.plan.documents,
        "experts_per_token": shape.choices,
        "weights": shape.weights,
        "phases": shape.phases,
        "digest": state.digest,
    }


class _Counts:
    """Counts and reports what is imported."""

    def __init__(self) -> None:
        self.tokens = self.without_routes = 0

    def watch(self, sequences: "Iterator[Routed]", report: Reporter) -> "Iterator[Routed]":
        """The same sequences."""
        for routed in sequences:
            if routed.token is not None:
                self.tokens += len(routed.token)
                self.without_routes += len(routed.token) - len(routed.expert)
            yield routed
            report.to(report.done + routed.size_bytes, f"{self.tokens:,} tokens")


def _sequences(files: tuple[Path, ...], chosen: "Format", asked: "Asked") -> "Iterator[Routed]":
    return chain.from_iterable(chosen.read(path, asked) for path in files)


def _check(config: ImportConfig, chosen: "Format") -> None:
    """Raise if an option is invalid, a file is missing, or a file has the wrong type."""
    for option in ("num_experts", "experts_per_token", "sequence_length", "rows_per_shard"):
        if (value := getattr(config, option)) is not None and value < 1:
            raise ValueError(f"--{option} {value}: must be at least 1")
    if not config.files:
        raise ValueError("name at least one file")
    for path in config.files:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        if path.suffix not in chosen.suffixes:
            raise ValueError(
                f"{path}: --format {config.format} reads {', '.join(chosen.suffixes)}; pickled data is never read:"
                " save it with numpy.savez or safetensors"
            )


def _refuse_choices(model: Model, shape: "Shape") -> None:
    if model.experts_per_token not in (None, shape.choices):
        raise ValueError(
            f"the files have {shape.choices} experts per token, but {model.name} chooses {model.experts_per_token}:"
            " name the right model, or use --num_experts and --experts_per_token"
        )


def _model(config: ImportConfig) -> Model:
    """The model, from the options or from its configuration."""
    if config.num_experts is not None:
        return Model(name=config.model, num_experts=config.num_experts, experts_per_token=config.experts_per_token)

    from workers.tiny import model_path

    try:
        path = model_path(config.model)
        from workers.models.checkpoint import find_checkpoint, read_config
        from workers.models.description import describe_model  # torch takes seconds
        from workers.models.stored import default_quantization

        found = describe_model(path, quantization=default_quantization(path, None, "cpu"), device_type="cpu")
    except (OSError, ValueError) as error:
        raise ValueError(f"{error}\nwithout the model's configuration, use --num_experts and --layers") from error
    return Model(
        name=found["model"],
        revision=found["model_revision"],
        layers=tuple(found["layers"]),
        num_experts=found["num_experts"],
        experts_per_token=config.experts_per_token or found["experts_per_token"],
        rule=_rule(read_config(find_checkpoint(path, None, weights=False).folder)),
    )


def _rule(settings: Mapping[str, Any]) -> str:
    """How a model's family computes weights from logits, from its configuration."""
    rule = RULES.get(settings.get("model_type", ""), "unknown")
    if rule != "norm_topk_prob":
        return rule
    return "renormalized" if settings.get("norm_topk_prob") else "softmax"


def _weights(config: ImportConfig, model: Model) -> str:
    """How weights are computed from router logits."""
    if config.weights == "family" and model.rule == "unknown" and config.format == "transformers":
        raise ValueError(
            f"{model.name} is of a family in which the k largest logits may not be the choice (a correction bias,"
            " groups, or a function other than softmax): capture it with jobs/capture.py, or choose with --weights"
            " none, softmax or renormalized"
        )
    return model.rule if config.weights == "family" else config.weights


def _layers(config: ImportConfig) -> tuple[int, ...] | None:
    """The layers given on the command line."""
    if config.layers is None:
        return None
    numbers: list[int] = []
    for part in config.layers.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip(), re.ASCII)
        if found is None:
            raise ValueError(f"--layers {config.layers!r}: must be numbers and ranges, such as 1-26 or 0,2,4")
        numbers += range(int(found[1]), int(found[2] or found[1]) + 1)
    if not numbers or sorted(set(numbers)) != numbers:
        raise ValueError(f"--layers {config.layers!r}: must be ascending numbers, each once")
    return tuple(numbers)


def _tokenizer(config: ImportConfig) -> "TextTokenizer | None":
    if config.tokenizer == "none" or (config.tokenizer == "model" and config.num_experts is not None):
        return None

    from workers.text.tokenizer import load_tokenizer
    from workers.tiny import model_path

    return load_tokenizer(model_path(config.model if config.tokenizer == "model" else config.tokenizer))


def _provenance(
    config: ImportConfig, model: Model, tokenizer: "TextTokenizer | None", *, by_weight: bool
) -> dict[str, Any]:
    """The provenance that is stored with the routes."""
    engine = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}.get(config.format, config.format)
    return {
        "title": f"routes of {model.name} on {config.name}, imported from {engine}",
        "imported": {
            "format": config.format,
            "engine": engine,
            "engine_version": config.engine_version,
            "files": [{"name": path.name, "sha256": _sha256(path)} for path in config.files],
        },
        "model": model.name,
        "model_revision": model.revision or "not stated",
        "quantization": config.quantization,
        "tokenizer": None if tokenizer is None else tokenizer.sha256,
        "special_token_ids": [] if tokenizer is None else tokenizer.special_ids,
        "order_of_choices": "largest weight first" if by_weight else "as given",
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tell(config: ImportConfig, facts: dict[str, Any], *, by_weight: bool) -> None:
    """Report what was imported, and what to do next."""
    place = f"{config.store.rstrip('/')}/{config.name}"
    lacking = ["no weights"] * (not facts["weights"]) + ["no phases"] * (not facts["phases"])
    log(
        shown(
            f"{place}: {facts['tokens']:,} tokens of {facts['documents']:,} documents,"
            f" {facts['tokens_without_routes']:,} of them without routes, {len(facts['layers'])} layers,"
            f" {facts['experts_per_token']} of {facts['num_experts']} experts"
            + (f"; {' and '.join(lacking)}" if lacking else "")
        )
    )
    if not by_weight:
        log("note: the engine does not guarantee that a token's first expert has the largest weight")
    print(place)
    say_next(command_line("doctor", place))


if __name__ == "__main__":
    run_job(main)
