"""Routes of a few texts in a notebook, without a store."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from store.attributes import flat
from store.identity import identity_of
from store.layout import Layout
from store.plan import Rows
from workers.engine import ModelEngine
from workers.interventions import Named
from workers.models.intervening import choose_to_change
from workers.models.loading import LoadedModel, load_model
from workers.models.stored import default_quantization
from workers.models.transformation import router_dtype, transformation_of
from workers.record import Recordable, WeightPrecision, what_to_record
from workers.shard import route_rows
from workers.text.rows import BosRule, document_rows, padded
from workers.text.tokenizer import load_tokenizer
from workers.tiny import model_path


def capture_texts(
    model: str | Path | LoadedModel,
    texts: Sequence[str],
    *,
    quantization: str | None = None,
    matmul: str = "bf16",
    sequence_length: int = 2048,
    batch_tokens: int = 8192,
    bos: BosRule = "none",
    record: Sequence[Recordable] = (),
    top_logits: int | None = None,
    weight_precision: WeightPrecision = "float16",
    mask: Sequence[Named] = (),
    force: Sequence[Named] = (),
    top_k: int | None = None,
) -> xr.Dataset:
    """Capture the routes of some texts, in memory.

    Parameters
    ----------
    model
        A checkpoint folder, a hub id, "tiny", or a model that `load_model` returned, which is loaded once for many
        captures.
    texts
        Each text is one document.
    quantization
        "nf4", "fp4", "mxfp4", "fp8", "int8" or "none"; ignored for a loaded model. Default: the format in which the
        checkpoint is stored; otherwise nf4 on a GPU and none on a CPU.
    matmul
        "bf16" or "fp8", as for `load_model`; ignored for a loaded model.
    sequence_length
        Maximum number of tokens in a row. Longer texts are cut into several rows.
    batch_tokens
        Maximum number of tokens in a micro-batch, padding included.
    bos
        Where a beginning-of-sequence token is added: "none", "document" or "row".
    record
        What is recorded besides the choices; any of: "logits", which the router computed before it chose (variable
        `logit`, float32 (doc, position, layer, expert_id), NaN where there is no token); "output_norm", the L2 norm of
        each chosen expert's output before it is weighted (float32, dims of `expert`); "logprob", the log-probability of
        the next token at the position that predicts it (float32 (doc, position), in nats, NaN at the last position of a
        row).
    top_logits
        Number of largest logits to keep, in descending order: `logit` then has the dim candidate in place of expert_id,
        and `logit_expert` names the experts. Default: all logits of up to 64 experts, 32 of more experts.
    weight_precision
        "float16", "float32", or "compact": rounded to the bits that are meaningful in the routers' own precision.
    mask
        Experts that cannot be chosen, each as (layer, expert) or by name, such as `7:1`, `3-5:0-2` or `*:1`: the
        router's own rule chooses among the others. `logit` is what the router computed before.
    force
        Experts that are always among the chosen, named as those of `mask`, with the weight that their logits give.
    top_k
        Experts per token. Default: the model's own number.

    Returns
    -------
    xarray.Dataset
        In memory, with the variables, dims, dtypes and fill values of `store.open_capture`, so that every function of
        `analysis` takes it.

    Raises
    ------
    ValueError
        When no text has a token, the rows would be longer than the model's positions, or the model cannot be captured,
        recorded or changed in this way.
    """
    if isinstance(texts, str):
        raise ValueError("give a list of texts, not one text: each of its characters would be a document")
    for number, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {number} holds a lone surrogate, which is not valid text: replace it first"
            ) from error
    path = model.folder if isinstance(model, LoadedModel) else model_path(model)
    interventions = choose_to_change(path, None, mask=mask, force=force, top_k=top_k)  # before weights are loaded
    if not isinstance(model, LoadedModel):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        quantization = quantization or default_quantization(path, None, device)
        model = load_model(path, quantization=quantization, matmul=matmul, device=device)
    most = model.provenance["max_position_embeddings"]
    if not 1 <= sequence_length <= most:
        raise ValueError(f"sequence_length is {sequence_length}, but must be 1 to {most}, the model's positions")
    tokenizer = load_tokenizer(model.folder)
    computed_in = getattr(torch, model.provenance["compute_dtype"])
    recorded = what_to_record(
        record,
        model.num_experts,
        router_dtype(model.folder, None, computed_in) if weight_precision == "compact" else None,
        top_logits=top_logits,
        weight_precision=weight_precision,
    )
    engine = ModelEngine(model, recorded, interventions)
    cut = [
        (document, *row)
        for document, ids in enumerate(tokenizer.encode_batch(list(texts)))
        for row in document_rows(ids, sequence_length, bos=bos, bos_id=tokenizer.bos_id)
    ]
    if not cut:
        raise ValueError(f"no text has a token: {len(texts)} texts, all empty")
    documents, offsets, tokens, _ = zip(*cut, strict=True)
    positions = max(len(row) for row in tokens)
    rows = Rows(
        token=padded(list(tokens), positions),
        length=np.array([len(row) for row in tokens], dtype=np.int32),
        document_id=np.array(documents, dtype=np.int64),
        offset=np.array(offsets, dtype=np.int32),
    )
    layout = Layout(
        sequence_length=positions,
        rows_per_shard=len(cut),
        layers=engine.layers,
        num_experts=engine.num_experts,
        experts_per_token=engine.experts_per_token,
        vocab_size=tokenizer.vocab_size,
        **asdict(recorded),
    )
    arrays = {
        **route_rows(engine, rows, layout, batch_tokens)(),
        **{name: getattr(rows, name) for name in ("token", "length", "document_id", "offset")},
        "name": np.array([f"text {index}" for index in range(len(texts))], dtype=object),
        "piece": np.array(tokenizer.pieces(), dtype=object),
        "captured": np.ones(len(cut), dtype=bool),
    }
    attrs = {
        **model.provenance,
        **identity_of(interventions.fields()),
        "experts_per_token": engine.experts_per_token,
        "special_token_ids": tokenizer.special_ids,
        "pairs_cut": sum(one == other for one, other in pairwise(documents)),
    }
    if "logit" in recorded.record:
        attrs |= interventions.told(transformation_of(model.folder))
    return _dataset(layout, arrays, attrs)


def _dataset(layout: Layout, arrays: Mapping[str, np.ndarray], attrs: Mapping[str, Any]) -> xr.Dataset:
    """Arrays in memory under the names, dims and coordinates that they have in a store."""
    specs = layout.arrays()
    return xr.Dataset(
        {name: (specs[name].dims if name in specs else ("doc",), values) for name, values in arrays.items()},
        coords={"layer": np.array(layout.layers, dtype=np.int32)},
        attrs=flat({**layout.attrs(), **attrs, "dataset": "texts"}),
    )
