"""Questions asked of a store: each a function from a lazy capture to a small labelled Dataset.

What is public is imported from here, `from analysis import expert_load, scan`; a name's module is loaded when the name
is first used, so that `import analysis` costs nothing.

- `scan` decodes every shard once and feeds any number of reducers; `measure` keeps what they counted beside the store.
- A metric is a function of a capture (`transitions`), and where several questions share counts a function of what a
  reducer counted (`transitions_of`). Every result says what it is: `n`, `estimator`, `null`, `definition`, `source`.
- `write_report` puts them on one page; `write_tables` and `write_replay` hand them to other tools.

Promises: memory bounded by threads × one shard plus the accumulators, results equal for any chunking and any
number of threads, and no import of torch or transformers. Does not know how a capture is made.
"""

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "attributes": "described",
    "exports.parquet": "write_tables",
    "exports.placement": "gpu_load load_matrix write_sglang_load",
    "exports.replay": "Replay document_replay read_replay row_replay write_replay",
    "metrics.agreement": "agreement",
    "metrics.caching": "CacheCounts cache_hits cache_hits_of",
    "metrics.choices": "Choices coactivation coactivation_of layer_overlap_of transitions transitions_of",
    "metrics.confidence": "Confidence MeanWeights router_confidence",
    "metrics.contexts": "TopContexts top_contexts",
    "metrics.contrast": "contrast",
    "metrics.document_scores": "document_scores",
    "metrics.load": "ExpertCounts Load balance_of domain_specialization expert_load",
    "metrics.path_diversity": "whole_paths window_diversity window_diversity_of",
    "metrics.paths": "WindowCounts document_path frequent_windows frequent_windows_of",
    "metrics.position": "dependent_experts position_load position_load_of",
    "metrics.published": "published_counts validation",
    "metrics.repetition": "Repetition first_repeated_by_load repetition",
    "metrics.segments": "SegmentRouting segment_cache_hits segment_cache_hits_of segment_routing",
    "metrics.token_contributions": "token_contributions",
    "metrics.token_paths": "TokenPaths frequent_ids",
    "metrics.tokens": "TokenCounts expert_tokens expert_tokens_of token_experts token_experts_of",
    "metrics.vocabulary": "SampledRoutes pointwise_of vocabulary_specialization vocabulary_specialization_of",
    "report.page": "write_figures write_report",
    "results": "measure",
    "scanning": "Block Reducer Selection State scan",
    "statistics.growth": "enough growth",
    "statistics.information": "association entropy",
    "statistics.resampling": "Resampled Thinned false_discovery interval p_value",
}
"""The public names, by module. A metric is one file and one line here; editors and mypy read the same below."""

_MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_MODULES)

if TYPE_CHECKING:
    from analysis.attributes import described
    from analysis.exports.parquet import write_tables
    from analysis.exports.placement import gpu_load, load_matrix, write_sglang_load
    from analysis.exports.replay import Replay, document_replay, read_replay, row_replay, write_replay
    from analysis.metrics.agreement import agreement
    from analysis.metrics.caching import CacheCounts, cache_hits, cache_hits_of
    from analysis.metrics.choices import (
        Choices,
        coactivation,
        coactivation_of,
        layer_overlap_of,
        transitions,
        transitions_of,
    )
    from analysis.metrics.confidence import Confidence, MeanWeights, router_confidence
    from analysis.metrics.contexts import TopContexts, top_contexts
    from analysis.metrics.contrast import contrast
    from analysis.metrics.document_scores import document_scores
    from analysis.metrics.load import ExpertCounts, Load, balance_of, domain_specialization, expert_load
    from analysis.metrics.path_diversity import whole_paths, window_diversity, window_diversity_of
    from analysis.metrics.paths import WindowCounts, document_path, frequent_windows, frequent_windows_of
    from analysis.metrics.position import dependent_experts, position_load, position_load_of
    from analysis.metrics.published import published_counts, validation
    from analysis.metrics.repetition import Repetition, first_repeated_by_load, repetition
    from analysis.metrics.segments import SegmentRouting, segment_cache_hits, segment_cache_hits_of, segment_routing
    from analysis.metrics.token_contributions import token_contributions
    from analysis.metrics.token_paths import TokenPaths, frequent_ids
    from analysis.metrics.tokens import TokenCounts, expert_tokens, expert_tokens_of, token_experts, token_experts_of
    from analysis.metrics.vocabulary import (
        SampledRoutes,
        pointwise_of,
        vocabulary_specialization,
        vocabulary_specialization_of,
    )
    from analysis.report.page import write_figures, write_report
    from analysis.results import measure
    from analysis.scanning import Block, Reducer, Selection, State, scan
    from analysis.statistics.growth import enough, growth
    from analysis.statistics.information import association, entropy
    from analysis.statistics.resampling import Resampled, Thinned, false_discovery, interval, p_value
else:

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            found = globals()[name] = getattr(import_module(f"analysis.{_MODULES[name]}"), name)
            return found
        near = difflib.get_close_matches(name, __all__, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'analysis' has no attribute {name!r}{meant}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
