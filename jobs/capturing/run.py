"""From options to a group that can be planned and captured: sources, tokenizer, model facts, identity.

A capture's identity is complete here before any document is tokenized, except that the default sequence length depends
on the first 1,000 documents.
"""

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from jobs.capturing.options import CaptureConfig
from jobs.capturing.planner import default_sequence_length
from jobs.console.places import capture_at
from jobs.sources.documents import Source
from jobs.sources.resolve import group_name, resolve_source
from store.group import CaptureGroup, valid_name
from store.identity import identity_of
from store.layout import SCHEMA_VERSION, SHARD_TOKENS, Layout, default_rows_per_shard
from workers.engine import ModelEngine, load_engine
from workers.environment import environment
from workers.given import GivenRoutes
from workers.interventions import Interventions, experts_in_file
from workers.models.description import EARLIER, ModelDescription, describe_model
from workers.models.footprint import operations_per_token
from workers.models.intervening import choose_to_change
from workers.models.stored import default_quantization
from workers.models.transformation import router_dtype, transformation_of
from workers.record import Recorded, what_to_record
from workers.replica import Assignment
from workers.shard import ROUTING_VERSION
from workers.text.tokenizer import ROLES, TextTokenizer, load_tokenizer
from workers.tiny import model_path

BATCH_TOKENS = {"cuda": 32_768, "cpu": 8_192}
CPU_SHARD_OPERATIONS = 2**36  # operations per shard on a CPU: three seconds with the tiny Mixtral (from cpu.json)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One data set, ready to be planned."""

    name: str
    source: Source
    layout: Layout
    identity: Mapping[str, Any]


class Run:
    """What all data sets of one command share: model, tokenizer and device.

    Parameters
    ----------
    config
        The options.
    device
        "cuda" or "cpu": the workers' device. Default: as configured, or this machine's if that is "auto".
    """

    batch_tokens_on: ClassVar[Mapping[str, int]] = BATCH_TOKENS
    """Default tokens in a micro-batch, by device."""
    named: ClassVar[str] = ""
    """The suffix after a data set's name in the default name of its group."""

    def __init__(self, config: CaptureConfig, device: str | None = None) -> None:
        self.config = config
        self.model = model_path(config.model)
        here = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = device or (here if config.device == "auto" else config.device)
        self._refuse_foreign_folder()
        self.batch_tokens = config.batch_tokens or self.batch_tokens_on[self.device]

    def _refuse_foreign_folder(self) -> None:
        """Raise if the folder contains anything other than a store."""
        path = Path(self.config.store_path)
        if "://" in self.config.store_path or not path.is_dir() or (path / "zarr.json").exists():
            return
        foreign = [
            entry.name for entry in path.iterdir() if not (entry / "token").is_dir()
        ]  # not an interrupted creation
        if foreign:
            raise ValueError(f"--store {path} is not a store and contains {foreign[0]!r}: use a new or empty folder")

    @cached_property
    def quantization(self) -> str:
        """Precision of the weights: as requested, otherwise that of the resumed captures, otherwise the model's
        default.

        Raises
        ------
        ValueError
            When it is not given, and captures of this command were started with different ones.
        """
        if self.config.quantization is not None:
            return self.config.quantization
        begun = {name: group.identity.get("quantization") for name, group in self._begun().items()}
        if len(set(begun.values())) > 1:
            listed = ", ".join(f"{name} with {kind}" for name, kind in begun.items())
            raise ValueError(f"the captures were started with different precisions ({listed}): use --quantization")
        if begun:
            return str(next(iter(begun.values())))
        return default_quantization(self.model, self.config.model_revision, self.device)

    def _begun(self) -> dict[str, CaptureGroup]:
        """The groups of this command's data sets that already exist in the store."""
        names = self.config.name or [group_name(spec) + self.named for spec in self.config.dataset]
        groups = {name: CaptureGroup(self.config.store_path, name) for name in names}
        return {name: group for name, group in groups.items() if _exists(group)}

    @cached_property
    def expert_backend(self) -> str | None:
        """The back-end of resumed captures that earlier versions may have started; otherwise None, the model's own."""
        begun = {group.identity.get("expert_backend") for group in self._begun().values()}
        return next((each for each in EARLIER if begun == {each}), None)

    @cached_property
    def described(self) -> ModelDescription:
        """The model's facts, without its weights."""
        config = self.config
        return describe_model(
            self.model,
            config.model_revision,
            self.quantization,
            self.device,
            dtype=config.dtype,
            quantize_gates=config.quantize_gates,
            matmul=config.matmul,
            expert_backend=self.expert_backend,
        )

    @cached_property
    def router_dtype(self) -> str:
        """The precision in which routers compute logits."""
        dtype = getattr(torch, self.described["compute_dtype"])
        return router_dtype(self.model, self.config.model_revision, dtype)

    @cached_property
    def recorded(self) -> Recorded:
        """What is recorded in addition to the choices, and the precision of weights."""
        config, model = self.config, self.described
        return what_to_record(
            config.record,
            model["num_experts"],
            self.router_dtype if config.weight_precision == "compact" else None,  # the model is built to find it
            top_logits=config.top_logits,
            weight_precision=config.weight_precision,
        )

    @property
    def engine(self) -> Callable[..., ModelEngine]:
        """The engine for the loaded model: see `workers.engine.load_engine`."""
        return ModelEngine

    @property
    def kept_bytes(self) -> int:
        """The bytes that a worker keeps on its device in addition to those of a capture."""
        return 0

    @cached_property
    def given(self) -> GivenRoutes | None:
        """The capture from which choices are taken."""
        place = self.config.routes_from
        if place is None:
            return None
        if (many := len(self.config.dataset)) > 1:
            raise ValueError(
                f"--routes_from is one capture, but --dataset is given {many} times: capture them one by one"
            )
        path, name = capture_at(place if "://" in place else str(Path(place).expanduser().absolute()))
        return GivenRoutes(path, name, self.config.routes_weights)

    @cached_property
    def interventions(self) -> Interventions:
        """What is changed about the model's choices."""
        config = self.config
        mask, force = (
            [*given, *(experts_in_file(f"--{option}", file.expanduser()) if file else ())]
            for option, given, file in (
                ("mask_file", config.mask, config.mask_file),
                ("force_file", config.force, config.force_file),
            )
        )
        return choose_to_change(
            self.model,
            config.model_revision,
            mask=mask,
            force=force,
            top_k=config.top_k,
            routes_from=None if self.given is None else self.given.identity,
            routes_weights=config.routes_weights,
        )

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer, limited to the requested tokens of a text."""
        day = date.fromisoformat(self.config.template_date)
        return load_tokenizer(self.model, self.model_commit, limit_tokens=self.config.limit_tokens, template_date=day)

    @property
    def _anywhere(self) -> str:
        """The model's name or path, valid for a process in another folder."""
        return os.path.abspath(self.model) if Path(self.model).is_dir() else str(self.model)

    @property
    def model_commit(self) -> str | None:
        """The current commit of a hub model's revision; None for a folder."""
        return None if Path(self.model).is_dir() else self.described["model_revision"]

    def assignment(self, leases: Mapping[str, str]) -> Assignment:
        """The assignment of a replica, independent of where it runs.

        Parameters
        ----------
        leases
            From data set to the token of this job's lease on it.
        """
        config = self.config
        token = os.environ.get("HF_TOKEN")
        return Assignment(
            store=str(config.store_path),
            leases=leases,
            make_engine=partial(
                load_engine,
                "tiny" if config.model == "tiny" else self._anywhere,
                revision=self.model_commit,
                quantization=self.quantization,
                dtype=config.dtype,
                quantize_gates=config.quantize_gates,
                matmul=config.matmul,
                expert_backend=self.expert_backend,
                recorded=self.recorded,
                interventions=self.interventions,
                kind=self.engine,
                device=self.device,
                gpus=max(1, int(config.gpus_per_worker)) if self.device == "cuda" else 1,
            ),
            device=self.device,
            batch_tokens=self.batch_tokens,
            given=self.given,
            allow_mixed=config.allow_mixed,
            secrets={"HF_TOKEN": token} if token else {},
        )

    def sources(self) -> list[tuple[str, Source]]:
        """Group names and data sets, in the given order.

        Raises
        ------
        ValueError
            When a data set is not found, or two would get the same name.
        """
        config = self.config
        options = {"split": config.split, "text_field": config.text_field, "revision": config.revision}
        found = [resolve_source(spec, **options) for spec in config.dataset]
        names = [valid_name(name) for name in config.name] or [source.name + self.named for source in found]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{names.count(name)} data sets would be named {name!r}: give them different names with --name"
                )
        return list(zip(names, found, strict=True))

    def prepare(self, name: str, source: Source) -> Prepared:
        """Determine the layout and the identity of one data set.

        Raises
        ------
        ValueError
            When the rows would be longer than the model's positions, or the data set has no document.
        """
        config, model = self.config, self.described
        choices = self.interventions.top_k or model["experts_per_token"]
        if next(source.documents(faulty=True), None) is None:
            raise ValueError(f"{name}: the data set has no document")
        length = config.sequence_length or self._settled(name, "sequence_length")
        length = length or default_sequence_length(
            source, self.tokenizer, config.limit_documents, skip_unrenderable=config.skip_unrenderable
        )
        if length > model["max_position_embeddings"]:
            raise ValueError(
                f"--sequence_length is {length}, but {model['model']} has {model['max_position_embeddings']} positions"
            )
        if self.tokenizer.vocab_size > model["vocab_size"]:
            raise ValueError(
                f"the tokenizer of {self.model} has {self.tokenizer.vocab_size} ids, but the model has"
                f" {model['vocab_size']} embeddings: they do not belong together"
            )
        if source.conversations and config.bos != "none":
            raise ValueError(
                f"--bos {config.bos}: the chat template determines how conversations begin; use --bos none"
            )
        layout = Layout(
            sequence_length=length,
            rows_per_shard=config.rows_per_shard or self._settled(name, "rows_per_shard") or self._rows(length),
            layers=tuple(model["layers"]),
            num_experts=model["num_experts"],
            experts_per_token=choices,
            vocab_size=self.tokenizer.vocab_size,
            roles=ROLES if source.conversations else (),
            **asdict(self.recorded),
        )
        text = {f"text_{field}": value for field, value in source.identity.items()}
        fields = {
            **{name: value for name, value in model.items() if name not in ("vocab_size", "max_position_embeddings")},
            **self.interventions.fields(),
            "experts_per_token": choices,
            **text,
            "tokenizer": self.tokenizer.sha256,
            "chat_template": self.tokenizer.chat_template_sha256 if layout.roles else None,
            "sequence_length": length,
            "rows_per_shard": layout.rows_per_shard,
            "bos": config.bos,
            "bos_id": None if config.bos == "none" else self.tokenizer.bos_id,
            "batch_tokens": self.batch_tokens,
            "limit_documents": config.limit_documents,
            "limit_tokens": config.limit_tokens,
            "schema_version": SCHEMA_VERSION,
            "routing_version": ROUTING_VERSION,
            "skip_unrenderable": config.skip_unrenderable,
            "template_date": self.tokenizer.template_date if layout.roles else None,
            "record": [*layout.record],
            "top_logits": layout.top_logits,
            "weight_bits": layout.weight_bits,
        }
        if self.given is not None:
            self.given.refuse_unfit(fields)
        return Prepared(name=name, source=source, layout=layout, identity=identity_of(fields))

    def _rows(self, sequence_length: int) -> int:
        """Rows per shard, if not given."""
        if self.device != "cpu":
            return default_rows_per_shard(sequence_length)
        tokens = CPU_SHARD_OPERATIONS // operations_per_token(self.model, self.config.model_revision)
        return default_rows_per_shard(sequence_length, min(SHARD_TOKENS, tokens))

    def _settled(self, name: str, option: str) -> int | None:
        """The value of an option in a resumed capture, if it was also left to the default then."""
        group = CaptureGroup(self.config.store_path, name)
        if not _exists(group) or group.attrs.get("configuration", {}).get(option) is not None:
            return None
        settled: int = getattr(group.layout, option)
        return settled

    def open_group(self, prepared: Prepared) -> CaptureGroup:
        """Create the data set's group, or resume the existing one.

        Raises
        ------
        ValueError
            When the group holds a different capture.
        """
        config = self.config
        limit = "" if config.limit_tokens is None else f"; of each document its first {config.limit_tokens} tokens only"
        attrs = {
            "title": f"routes of {self.described['model']} on {prepared.name}",
            "model": self.described["model"],
            "quantization": self.described["quantization"],
            "matmul": self.described["matmul"],
            **identity_of(self.interventions.fields()),
            "window_rule": f"documents are cut into rows of at most sequence_length tokens; none share a row{limit}",
            "bos": config.bos,
            "special_token_ids": self.tokenizer.special_ids,
            "environment": {name: value for name, value in environment("cpu").items() if name != "device"},
            "git_commit": _git_commit(),
            "configuration": config.as_options() | {"quantization": self.quantization},
            **self._more_attributes(),
            "convention": "k = 0 is the largest weight; ties by lower expert id; expert = missing_expert is no choice",
        }
        return CaptureGroup.create(
            config.store_path,
            prepared.name,
            layout=prepared.layout,
            identity=prepared.identity,
            attrs=attrs,
            pieces=self.tokenizer.pieces(),
        )

    def _more_attributes(self) -> dict[str, Any]:
        """Attributes that describe recorded values."""
        if "logit" not in self.recorded.record:
            return {}
        return self.interventions.told(transformation_of(self.model, self.model_commit))


def _exists(group: CaptureGroup) -> bool:
    try:
        return bool(group.attrs)
    except FileNotFoundError:
        return False


def _git_commit() -> str | None:
    """The commit of this code, with '+' if files were changed; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + "+" * bool(changed.stdout.strip())
