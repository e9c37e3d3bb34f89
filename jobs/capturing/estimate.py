"""The cost of a capture, estimated from a sample: `--dry_run`. All texts are read, and a sample is tokenized."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import islice

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jobs.capturing.planner import encode
from jobs.capturing.run import Prepared, Run
from jobs.console.terminal import duration
from jobs.sources.documents import Source
from store.layout import FLOAT16_BITS, Layout
from workers.models.activations import card_bytes, estimate_working_bytes
from workers.models.description import compute_dtype
from workers.models.footprint import estimate_bytes
from workers.models.head import CHUNK_BYTES, head_bytes
from workers.text.tokenizer import load_tokenizer

SAMPLE_DOCUMENTS = 500
BYTES_A_VALUE = {"expert": 25 / 64, "weight": 82 / 64, "logit": 1.5, "logit_expert": 1.0, "effect": 2.2}
"""Compressed bytes per value: for real Mixtral routes (measured: 32 layers × 2), for logits in bfloat16 and for effects
(with the tiny model)."""
BYTES_A_FLOAT32 = 3.3  # per value whose bits are all significant (measured: norms 3.2, log-probabilities 3.4)
BYTES_A_TOKEN = 2.0  # the token itself, compressed (measured)
FILLED_WARNING = 0.5


@dataclass(frozen=True, kw_only=True)
class TokenEstimate:
    """Tokens and rows of a data set, by the ratio of tokens to characters in a sample of its documents."""

    documents: int
    sampled: int
    tokens: float
    spread: float
    """Half of a 95% interval of `tokens`; 0 if every document was tokenized."""
    rows: int

    def filled_share(self, sequence_length: int) -> float:
        """Share of the rows' positions that hold a token."""
        return self.tokens / (self.rows * sequence_length) if self.rows else 0.0


def estimate_tokens(run: Run, source: Source, sequence_length: int) -> TokenEstimate:
    """Read all documents and tokenize a sample.

    Notes
    -----
    The ratio estimator of a total under simple random sampling without replacement (Cochran, Sampling Techniques, 3rd
    ed., section 6.4): tokens = characters × Σt/Σc, with the variance of the residuals t - (Σt/Σc)·c. With
    --limit_tokens, t is at most that, and c the number of characters that hold so many tokens on average.
    """
    characters, sample = [], []
    chooser = random.Random(0)  # the same sample every time
    for index, document in enumerate(islice(source.documents(faulty=True), run.config.limit_documents)):
        size = document.characters
        characters.append(size)
        slot = index if index < SAMPLE_DOCUMENTS else chooser.randrange(index + 1)
        if index < SAMPLE_DOCUMENTS:
            sample.append((document, size))
        elif slot < SAMPLE_DOCUMENTS:
            sample[slot] = (document, size)
    day, skip = date.fromisoformat(run.config.template_date), run.config.skip_unrenderable
    tokenizer = load_tokenizer(run.model, run.model_commit, template_date=day)  # without a limit
    encoded = encode([document for document, _ in sample], tokenizer, skip_unrenderable=skip)
    tokens = np.array([len(ids) for _, ids, _ in encoded], float)
    sizes = np.array([size for _, size in sample], float)
    counts = np.array(characters, float)
    if (limit := run.config.limit_tokens) is not None:
        reach = limit * sizes.sum() / max(1.0, tokens.sum())
        tokens, sizes, counts = np.minimum(tokens, limit), np.minimum(sizes, reach), np.minimum(counts, reach)
    ratio = tokens.sum() / max(1.0, sizes.sum())
    n, total = len(sample), len(counts)
    variance = ((tokens - ratio * sizes) ** 2).sum() / max(1, n - 1)
    spread = 1.96 * total * math.sqrt((1 - n / total) * variance / n) if n else 0.0
    rows = int(np.ceil(counts * ratio / sequence_length).sum())
    return TokenEstimate(documents=total, sampled=n, tokens=counts.sum() * ratio, spread=spread, rows=rows)


def print_estimate(run: Run, name: str, source: Source) -> None:
    """Print the cost of capturing one data set; nothing is written and no weights are loaded."""
    prepared = run.prepare(name, source)
    layout, config = prepared.layout, run.config
    text = estimate_tokens(run, source, layout.sequence_length)
    filled = text.filled_share(layout.sequence_length)
    published = "" if source.published_documents is None else f" ({source.published_documents:,} published)"
    time = "unknown (use --rate TOKENS_PER_SECOND)" if config.rate is None else duration(text.tokens / config.rate)
    lines = {
        "documents": f"{text.documents:,}{published}",
        "tokens": f"{text.tokens:,.0f} ± {text.spread:,.0f} (95 %, from {text.sampled:,} documents tokenized)",
        "rows": f"about {text.rows:,} of {layout.sequence_length:,} positions",
        "shards": f"about {math.ceil(text.rows / layout.rows_per_shard):,} of {layout.rows_per_shard:,} rows",
        "filled": f"{filled:.1%} of the positions hold a token",
        "store": f"about {text.tokens * stored_bytes(layout, run.router_dtype):,.0f} bytes in {config.store_path}",
        "precision": f"weights in {run.quantization}, their products in {run.described['matmul']}",
        "recorded": ", ".join(layout.routes),
        "device memory": _device_memory(run, layout),
        "host memory": f"about {_host_bytes(prepared):,} bytes for the shards in flight",
        "time": time,
    }
    table = Table(title=f"{name}: dry run, nothing is written", show_header=False, title_justify="left")
    for label, value in lines.items():
        table.add_row(label, escape(value))
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)
    if text.rows and filled < FILLED_WARNING:
        longest = layout.sequence_length
        print(f"note: rows are mostly empty; a --sequence_length below {longest} makes scans of the store faster")


def stored_bytes(layout: Layout, router_dtype: str) -> float:
    """The approximate number of bytes per token in the store."""
    bytes_a_value = dict(BYTES_A_VALUE)
    bytes_a_value["weight"] *= 0.6 if layout.weight_bits < FLOAT16_BITS else 1  # with 5 bits (measured)
    if layout.weight_bits > FLOAT16_BITS:
        bytes_a_value["weight"] = BYTES_A_FLOAT32
    if router_dtype == "float32":
        bytes_a_value["logit"] = BYTES_A_FLOAT32
    values = {name: math.prod(layout.arrays()[name].trailing[1:]) for name in layout.routes}
    return BYTES_A_TOKEN + sum(many * bytes_a_value.get(name, BYTES_A_FLOAT32) for name, many in values.items())


def _device_memory(run: Run, layout: Layout) -> str:
    """The memory for weights and, on a GPU, everything else that is held, if known."""
    config, where = run.config, f"on {run.device}, {run.batch_tokens:,} tokens at a time"
    dtype, recorded = compute_dtype(run.device, config.dtype), run.recorded
    last = recorded.whole or len(layout.layers) == 1  # whose experts are run
    weights = estimate_bytes(
        run.model, config.model_revision, run.quantization, run.device, dtype=config.dtype, last_experts=last
    )
    if "logprob" in recorded.record:
        weights += head_bytes(run.model, config.model_revision, dtype)
    if run.device == "cpu":
        return f"{weights:,} bytes of weights {where}"
    work = estimate_working_bytes(
        run.model, config.model_revision, run.quantization, run.described["matmul"],
        dtype, run.batch_tokens,
    )  # fmt: skip
    if work is None:
        return f"more than {weights:,} bytes {where}: what is computed beside the weights is not known for this model"
    work += run.batch_tokens * _token_bytes(layout, recorded.record) + _head_work(dtype, recorded.record)
    work += run.kept_bytes
    total = card_bytes(weights, work)
    rest = total - weights - work
    return f"about {total:,} bytes {where}: {weights:,} of weights, {work:,} for computing, {rest:,} for torch and CUDA"


def _head_work(dtype: torch.dtype, record: Sequence[str]) -> int:
    """Bytes of logits over the vocabulary at a time: in the compute dtype, and their log-probabilities in float32."""
    return CHUNK_BYTES["cuda"] * (4 + dtype.itemsize) // 4 if "logprob" in record else 0


def _host_bytes(prepared: Prepared) -> int:
    layout = prepared.layout
    positions = layout.rows_per_shard * layout.sequence_length
    # One shard is computed while one is written.
    return 2 * positions * (_token_bytes(layout, layout.routes) + 4)


def _token_bytes(layout: Layout, names: Sequence[str]) -> int:
    """Bytes per token of some of the arrays in memory."""
    arrays = [layout.arrays()[name] for name in names]
    return sum(math.prod(spec.trailing[1:]) * np.dtype(spec.dtype).itemsize for spec in arrays)
