"""From options to captures of experts' effects: in what they differ from other captures.

Everything else is a capture's: planning, leases, shards, commits, workers, and what happens when something breaks.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar

from jobs.capturing.importance_options import ImportanceConfig
from jobs.capturing.planner import encode
from jobs.capturing.run import CPU_SHARD_OPERATIONS, Prepared, Run
from jobs.sources.documents import Document, Source
from jobs.sources.sampled import sampled
from store.layout import default_rows_per_shard
from workers.importance import EFFECTS, ImportanceEngine
from workers.interventions import Interventions, layers_named
from workers.models.footprint import operations_per_token
from workers.models.intervening import choose_to_change
from workers.record import Recorded


class ImportanceRun(Run):
    """What all data sets share; see `Run`."""

    config: ImportanceConfig
    batch_tokens_on: ClassVar[Mapping[str, int]] = {"cuda": 65_536, "cpu": 8_192}
    named: ClassVar[str] = "-importance"

    def __init__(self, config: ImportanceConfig, device: str | None = None) -> None:
        super().__init__(config, device)
        self.engine = partial(ImportanceEngine, layers=self.measured)

    @cached_property
    def measured(self) -> tuple[int, ...]:
        """The layers whose experts are measured.

        Raises
        ------
        ValueError
            When one does not exist, or its router cannot do without an expert.
        """
        layers = tuple(layers_named(self.config.layers, self.described["layers"]))
        choose_to_change(self.model, self.config.model_revision, mask=[(layer, 0) for layer in layers])
        return layers

    @cached_property
    def recorded(self) -> Recorded:
        """See `Run`; so for the others."""
        return EFFECTS

    @cached_property
    def interventions(self) -> Interventions:
        """None beside the experts that are masked one by one."""
        return Interventions()

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
        prepared = super().prepare(name, source)
        return replace(prepared, identity={**prepared.identity, "effect_layers": [*self.measured]})

    def _more_attributes(self) -> dict[str, Any]:
        """The script of the command that makes it again."""
        return {"script": "jobs/importance.py"}

    def _rows(self, sequence_length: int) -> int:
        """As many as a micro-batch has; on a CPU fewer, by the operations of all runs."""
        if self.device != "cpu":
            return default_rows_per_shard(sequence_length, self.batch_tokens)
        runs = len(self.measured) * self.described["num_experts"] / 2  # of all layers: half of them are run
        operations = operations_per_token(self.model, self.config.model_revision) * max(1, runs)
        return default_rows_per_shard(sequence_length, int(CPU_SHARD_OPERATIONS // operations))
