"""Routes for router replay: the experts of every token, in the shape and type that servers return.

Reinforcement-learning trainers replay the routes of the rollout (R3, arXiv 2510.11370): the training forward takes
[tokens, layers, k] expert ids from the server. Here a capture takes the server's place. Servers have no routes for the
last token, which they sampled but did not process: S − 1 of S tokens. A capture has all.

Note two things. Rows are windows: each was captured without the text before it, so only a document of one row has the
routes of the whole text (`by="row"` exports the rows as they were captured). And k is in descending order of weight
here, while servers do not guarantee an order.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import xarray as xr

from analysis.exports.placement import layer_slots
from analysis.scanning import Array
from store.files import whole_file

Framework = Literal["vllm", "sglang", "slime", "verl"]


class Replay(NamedTuple):
    """One sequence."""

    token: Array
    """Its S token ids, including special ones; int32."""
    routed_experts: Array
    """Expert ids (tokens, layer, k), for all S tokens or for all but the last."""


@dataclass(frozen=True, kw_only=True)
class _Routes:
    """The tokens and experts of a row, or of a document's rows joined; only captured positions."""

    number: int
    document: int
    offset: int
    token: Array
    expert: Array


def document_replay(
    dataset: xr.Dataset,
    document: int,
    framework: Framework = "vllm",
    *,
    all_positions: bool | None = None,
    num_hidden_layers: int | None = None,
) -> Replay:
    """A document's routes, with its rows joined in order.

    If a BOS was put before each row, only the first is kept.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture; only this document's rows are decoded.
    document : int
        Its id.
    framework : {"vllm", "sglang", "slime", "verl"}
        The target format. All index layers by the model's own numbers, with zeros for layers without experts, and have

        - vllm: `CompletionOutput.routed_experts`: uint8 up to 256 experts and uint16 beyond, S − 1 tokens
          (vllm-project/vllm, outputs.py and model_executor/layers/fused_moe/routed_experts_capturer.py as of 0.33.0;
          int32 up to 0.20; 0.21 returned int16 of the layers with experts, prompt and completion apart);
        - sglang: `meta_info.routed_experts` once decoded: int32, S − 1 tokens (sgl-project/sglang,
          srt/state_capturer/routed_experts.py as of 0.5.23, which tags no type; `write_replay` encodes it);
        - slime: `Sample.rollout_routed_experts`: the same (THUDM/slime, slime/rollout/sglang_rollout.py);
        - verl: `AgentLoopOutput.routed_experts`: int16, S tokens, or S − 1, which verl fills up with zeros
          (verl-project/verl, verl/experimental/agent_loop/agent_loop.py as of 0.9.1).
    all_positions : bool, optional
        Whether the last token also has routes; default as in the framework.
    num_hidden_layers : int, optional
        All layers of the model, including dense ones; default the number of captured layers, if these are 0, 1, 2 and
        so on.

    Returns
    -------
    Replay
        `token`, int32 of shape (tokens), and `routed_experts`, of shape (tokens, layers, k) and the framework's dtype.

    Raises
    ------
    ValueError
        When the document has no row, or some of its tokens are not captured or not in the dataset (a last token is
        allowed to be missing if the framework has no routes for it either); or as for
        `analysis.exports.placement.layer_slots`.
    """
    rows = np.flatnonzero(dataset["document_id"].values == document)
    if not rows.size:
        raise ValueError(f"document {document} has no row: it is empty or not in the dataset")
    form = _form(dataset, framework, all_positions, num_hidden_layers)
    return _replay(_joined(_rows(dataset.isel(doc=rows), rows), dataset.attrs.get("bos") == "row"), *form)


def row_replay(
    dataset: xr.Dataset,
    row: int,
    framework: Framework = "vllm",
    *,
    all_positions: bool | None = None,
    num_hidden_layers: int | None = None,
) -> Replay:
    """One row's routes, as captured.

    Parameters
    ----------
    dataset : xr.Dataset
        A capture; only this row is decoded.
    row : int
        Its number.
    framework, all_positions, num_hidden_layers
        See `document_replay`.

    Returns
    -------
    Replay
        See `document_replay`.

    Raises
    ------
    ValueError
        When some of its tokens are not captured, or as for `analysis.exports.placement.layer_slots`.
    """
    form = _form(dataset, framework, all_positions, num_hidden_layers)
    return _replay(next(_rows(dataset.isel(doc=[row]), np.array([row]))), *form)


def write_replay(
    path: Path | str,
    dataset: xr.Dataset,
    framework: Framework = "sglang",
    *,
    by: Literal["document", "row"] = "document",
    all_positions: bool | None = None,
    num_hidden_layers: int | None = None,
) -> int:
    """Write all routes as JSON lines, one sequence per line, with one shard in memory at a time.

    A line holds `document`, `row` (for a document its first), `tokens`, `dtype`, `shape`, and in `meta_info` the
    `routed_experts` as returned by SGLang's `/generate`: the array's bytes in base64 (srt/managers/
    detokenizer_manager.py). SGLang's own `extract_routed_experts_from_meta_info` reads a line of framework "sglang" or
    "slime"; `read_replay` reads all.

    Parameters
    ----------
    path : Path or str
        A file; an existing one is replaced once the new one is complete.
    dataset : xr.Dataset
        A complete capture.
    framework : {"vllm", "sglang", "slime", "verl"}
        See `document_replay`.
    by : {"document", "row"}
        The unit of a sequence.
    all_positions, num_hidden_layers
        See `document_replay`.

    Returns
    -------
    int
        The number of sequences.

    Raises
    ------
    ValueError
        When `by` is unknown, or as for `document_replay`.
    """
    if by not in ("document", "row"):
        raise ValueError(f"by={by!r}: must be 'document' or 'row'")
    form, step = _form(dataset, framework, all_positions, num_hidden_layers), int(dataset.attrs["rows_per_shard"])
    shards = (np.arange(dataset.sizes["doc"])[start : start + step] for start in range(0, dataset.sizes["doc"], step))
    rows: Iterator[_Routes] = itertools.chain.from_iterable(_rows(dataset.isel(doc=shard), shard) for shard in shards)
    if by == "document":
        repeats = dataset.attrs.get("bos") == "row"
        rows = (_joined(group, repeats) for _, group in itertools.groupby(rows, lambda row: row.document))
    written = 0
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(_record(row, _replay(row, *form))) + "\n")
            written += 1
    return written


def read_replay(path: Path | str) -> Iterator[Replay]:
    """The sequences that `write_replay` wrote, one after the other.

    Parameters
    ----------
    path : Path or str
        The file.

    Returns
    -------
    iterator of Replay
        See `document_replay`.
    """
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            data = base64.b64decode(record["meta_info"]["routed_experts"])
            experts = np.frombuffer(data, np.dtype(record["dtype"]).newbyteorder("<")).reshape(record["shape"])
            yield Replay(np.array(record["tokens"], dtype=np.int32), experts.astype(record["dtype"]))


def _form(
    dataset: xr.Dataset, framework: Framework, all_positions: bool | None, num_hidden_layers: int | None
) -> tuple[np.dtype[Any], bool, Array, int]:
    """The type, whether the last token is included, the slot of each captured layer, and the number of slots."""
    if framework not in get_args(Framework):
        raise ValueError(f"unknown framework {framework!r}: choose from {', '.join(get_args(Framework))}")
    experts, layers = int(dataset.attrs["num_experts"]), dataset["layer"].values
    types = {"vllm": np.uint8 if experts <= 256 else np.uint16, "verl": np.int16}
    last = framework == "verl" if all_positions is None else all_positions
    return np.dtype(types.get(framework, np.int32)), last, layers, layer_slots(layers, num_hidden_layers)


def _rows(dataset: xr.Dataset, numbers: Array) -> Iterator[_Routes]:
    """Rows, decoded together; raises for rows that are not captured."""
    names = ("document_id", "offset", "length", "token", "expert")
    own = xr.Dataset({name: dataset[name].variable for name in names}).load()
    token = own["token"].transpose("doc", "position").values
    expert = own["expert"].transpose("doc", "position", "layer", "k").values
    captured = dataset["captured"].values if "captured" in dataset else np.full(len(numbers), True)
    fill = np.iinfo(expert.dtype).max
    for index, number in enumerate(numbers.tolist()):
        length = int(own["length"][index])
        row = _Routes(
            number=number,
            document=int(own["document_id"][index]),
            offset=int(own["offset"][index]),
            token=token[index, :length],
            expert=expert[index, :length] if captured[index] else np.full_like(expert[index, :length], fill),
        )
        _refuse_missing(row, length - 1 if captured[index] else length)  # a server has no routes for a last token
        yield row


def _refuse_missing(row: _Routes, positions: int) -> None:
    """Raise if one of the first `positions` tokens of a row is not captured."""
    missing = (row.expert == np.iinfo(row.expert.dtype).max).any((1, 2))
    if missing[:positions].any():
        raise ValueError(
            f"row {row.number}, document {row.document}: {missing.sum()} of {len(missing)} tokens are not captured;"
            " finish the capture; in imported routes the last token may have none (use all_positions=False)"
        )


def _joined(rows: Iterable[_Routes], bos_before_each: bool) -> _Routes:
    """A document's rows as one; raises if something is missing between them."""
    first, *others = sorted(rows, key=lambda row: row.offset)
    parts, reached = [first], len(first.token)
    if first.offset:
        raise ValueError(
            f"the first row of document {first.document} starts at token {first.offset}: earlier rows are missing"
        )
    for row in others:
        if row.offset > reached:  # a smaller offset is not a gap: offsets do not count special tokens
            raise ValueError(f"document {row.document}: rows are missing before row {row.number}")
        parts.append(row)
        reached = row.offset + len(row.token)
    start = int(bos_before_each)
    token = [first.token, *(row.token[start:] for row in parts[1:])]
    expert = [first.expert, *(row.expert[start:] for row in parts[1:])]
    return _Routes(
        number=first.number,
        document=first.document,
        offset=0,
        token=np.concatenate(token),
        expert=np.concatenate(expert),
    )


def _replay(row: _Routes, dtype: np.dtype[Any], last: bool, layers: Array, slots: int) -> Replay:
    """A row in a framework's format; raises if tokens are not captured."""
    positions = len(row.token) if last else max(len(row.token) - 1, 0)
    _refuse_missing(row, positions)
    routed = np.zeros((positions, slots, row.expert.shape[2]), dtype=dtype)
    routed[:, layers] = row.expert[:positions]
    return Replay(row.token.astype(np.int32), routed)


def _record(row: _Routes, replay: Replay) -> dict[str, Any]:
    """A line of a file."""
    experts = replay.routed_experts
    data = experts.astype(experts.dtype.newbyteorder("<")).tobytes()
    return {
        "document": row.document,
        "row": row.number,
        "tokens": replay.token.tolist(),
        "dtype": experts.dtype.name,
        "shape": list(experts.shape),
        "meta_info": {"routed_experts": base64.b64encode(data).decode("ascii")},
    }
