"""From options to captures of experts' effects: the differences from other captures.

Everything else is the same as for a capture: planning, leases, shards, commits, workers, and the handling of failures.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar

from jobs.capturing.importance_options import ImportanceConfig
from jobs.capturing.planner import encode
from jobs.capturing.run import CPU_SHARD_OPERATIONS, Prepared, Run
from jobs.sources.documents import Document, Source
from jobs.sources.sampled import sampled
from store.layout import default_rows_per_shard
from workers.engine import ModelEngine
from workers.importance import EFFECTS, ImportanceEngine
from workers.interventions import Interventions, layers_named
from workers.models.checkpoint import find_checkpoint
from workers.models.description import build_skeleton, compute_dtype
from workers.models.footprint import operations_per_token
from workers.models.intervening import choose_to_change
from workers.record import Recorded


class ImportanceRun(Run):
    """What all data sets share; see `Run`."""

    config: ImportanceConfig
    batch_tokens_on: ClassVar[Mapping[str, int]] = {"cuda": 65_536, "cpu": 8_192}
    named: ClassVar[str] = "-importance"

    @cached_property
    def measured(self) -> tuple[int, ...]:
        """The layers whose experts are measured.

        Raises
        ------
        ValueError
            When one does not exist, or its router needs all its experts.
        """
        layers = tuple(layers_named(self.config.layers, self.described["layers"]))
        choose_to_change(self.model, self.config.model_revision, mask=[(layer, 0) for layer in layers])
        return layers

    def _refuse_mask(self) -> None:
        """Raise if the mask would be impossible for a capture."""
        left = self.described["num_experts"] - self.config.least
        if self.config.write_mask is not None and left < (chosen := self.described["experts_per_token"]):
            raise ValueError(
                f"--least {self.config.least} would leave {left} of {self.described['num_experts']} experts of each"
                f" layer in --write_mask, but {chosen} are chosen for each token: use fewer"
            )

    @property
    def engine(self) -> Callable[..., ModelEngine]:
        """See `Run`, also for the following methods."""
        return partial(ImportanceEngine, layers=self.measured)

    @cached_property
    def recorded(self) -> Recorded:
        return EFFECTS

    @cached_property
    def interventions(self) -> Interventions:
        """None, apart from the experts that are masked one by one."""
        return Interventions()

    @property
    def kept_bytes(self) -> int:
        """The hidden states at the input of each measured layer."""
        config = self.config
        dtype = compute_dtype(self.device, config.dtype)
        skeleton = build_skeleton(find_checkpoint(self.model, config.model_revision, weights=False), dtype)
        hidden: int = skeleton.config.get_text_config().hidden_size
        return len(self.measured) * self.batch_tokens * hidden * dtype.itemsize

    def sources(self) -> list[tuple[str, Source]]:
        config = self.config

        def tokens_of(document: Document) -> int:
            [(_, tokens, _)] = encode([document], self.tokenizer, skip_unrenderable=True)
            return len(tokens)

        return [
            (name, sampled(source, config.sample_tokens, config.seed, tokens_of, config.limit_tokens))
            for name, source in super().sources()
        ]

    def prepare(self, name: str, source: Source) -> Prepared:
        self._refuse_mask()
        prepared = super().prepare(name, source)
        return replace(prepared, identity={**prepared.identity, "effect_layers": [*self.measured]})

    def _more_attributes(self) -> dict[str, Any]:
        """The script of the command that makes it again."""
        return {"script": "jobs/importance.py"}

    def _rows(self, sequence_length: int) -> int:
        """As many as a micro-batch has; fewer on a CPU, by the operations of all runs."""
        if self.device != "cpu":
            return default_rows_per_shard(sequence_length, self.batch_tokens)
        runs = len(self.measured) * self.described["num_experts"] / 2  # runs of all layers: half of them on average
        operations = operations_per_token(self.model, self.config.model_revision) * max(1, runs)
        return default_rows_per_shard(sequence_length, int(CPU_SHARD_OPERATIONS // operations))
