"""Routes in each engine's format, written as by the engine, for tests of imports."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LAYERS, CHOICES, EXPERTS = 3, 2, 8


def sequences(number: int = 5, *, layers: int = LAYERS, last: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts, completions, and the experts and weights of all tokens but the last, or of all."""
    random, made = np.random.default_rng(seed), []
    for _ in range(number):
        prompt, completion = (
            random.integers(0, 50, random.integers(1, 9)),
            random.integers(0, 50, random.integers(1, 9)),
        )
        tokens = len(prompt) + len(completion) - (not last)
        expert = random.random((tokens, layers, EXPERTS)).argsort(-1)[..., :CHOICES]
        weight = -np.sort(-random.random((tokens, layers, CHOICES)).astype(np.float32))
        made.append({"prompt": prompt, "completion": completion, "expert": expert, "weight": weight})
    return made


def npy(array: np.ndarray) -> str:
    """The format of vLLM 0.33: vllm/utils/serial_utils.py, numpy2base64."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def vllm_http(folder: Path, made: list[dict[str, Any]]) -> Path:
    """Chat completions of 0.33, with `return_token_ids`."""
    responses = []
    for number, one in enumerate(made):
        choice = {
            "index": 0,
            "token_ids": one["completion"].tolist(),
            "routed_experts": npy(one["expert"].astype("u1")),
        }
        responses.append({"id": f"r{number}", "choices": [choice], "prompt_token_ids": one["prompt"].tolist()})
    return lines(folder / "vllm.jsonl", responses)


def vllm_completions(folder: Path, made: list[dict[str, Any]]) -> Path:
    """Completions with the prompt's ids in the choice, and requests that omitted a part of the prompt."""
    records = []
    for number, one in enumerate(made):
        start = len(one["prompt"]) // 2
        choice = {
            "index": 0,
            "token_ids": one["completion"].tolist(),
            "prompt_token_ids": one["prompt"].tolist(),
            "routed_experts": npy(one["expert"][start:].astype("u1")),
        }
        response = {"id": f"r{number}", "choices": [choice]}
        records.append({"request": {"routed_experts_prompt_start": start}, "response": response})
    return lines(folder / "completions.jsonl", records)


def vllm_previous(folder: Path, made: list[dict[str, Any]]) -> Path:
    """0.21: nested lists, with separate routes of the prompt."""
    records = []
    for number, one in enumerate(made):
        cut = len(one["prompt"])
        choice = {"token_ids": one["completion"].tolist(), "routed_experts": one["expert"][cut:].tolist() or None}
        records.append(
            {
                "id": f"r{number}",
                "choices": [choice],
                "prompt_token_ids": one["prompt"].tolist(),
                "prompt_routed_experts": one["expert"][:cut].tolist(),
            }
        )
    return lines(folder / "previous.jsonl", records)


def vllm_offline(folder: Path, made: list[dict[str, Any]]) -> Path:
    arrays = {}
    for number, one in enumerate(made):
        arrays[f"{number}.prompt_token_ids"] = one["prompt"]
        arrays[f"{number}.token_ids"] = one["completion"]
        arrays[f"{number}.routed_experts"] = one["expert"].astype(np.uint8)
    np.savez(folder / "vllm.npz", **arrays)
    return folder / "vllm.npz"


def vllm_offline_previous(folder: Path, made: list[dict[str, Any]]) -> Path:
    arrays = {}
    for number, one in enumerate(made):
        cut = len(one["prompt"])
        arrays[f"{number}.prompt_token_ids"], arrays[f"{number}.token_ids"] = one["prompt"], one["completion"]
        arrays[f"{number}.prompt_routed_experts"] = one["expert"][:cut].astype(np.int16)
        arrays[f"{number}.routed_experts"] = one["expert"][cut:].astype(np.int16)
    np.savez_compressed(folder / "previous.npz", **arrays)
    return folder / "previous.npz"


def sglang_generate(folder: Path, made: list[dict[str, Any]], tag: str | None = None) -> Path:
    """As `extract_routed_experts_from_meta_info` of sglang 0.5.23 reads it: flat int32."""
    records = []
    for number, one in enumerate(made):
        data = one["expert"].astype("<i4" if tag is None else np.dtype(tag)).tobytes()
        meta = {"id": f"r{number}", "routed_experts": base64.b64encode(data).decode()}
        meta |= {} if tag is None else {"routed_experts_dtype": tag}
        output = {"output_ids": one["completion"].tolist(), "meta_info": meta}
        records.append(output | {"prompt_token_ids": one["prompt"].tolist()})
    return lines(folder / f"sglang-{tag}.jsonl", records)


def sglang_tagged(folder: Path, made: list[dict[str, Any]]) -> Path:
    return sglang_generate(folder, made, "uint8")


def sglang_openai(folder: Path, made: list[dict[str, Any]]) -> Path:
    """With `sgl_ext`, and routes that begin at a start that only the request contains."""
    records = []
    for number, one in enumerate(made):
        start = len(one["prompt"]) // 2
        data = base64.b64encode(one["expert"][start:].astype("<i4").tobytes()).decode()
        choice = {"index": 0, "token_ids": one["completion"].tolist(), "sgl_ext": {"routed_experts": data}}
        request = {"input_ids": one["prompt"].tolist(), "routed_experts_start_len": start}
        records.append({"request": request, "response": {"id": f"r{number}", "choices": [choice]}})
    return lines(folder / "openai.jsonl", records)


def plain_rows(made: list[dict[str, Any]], *, numbers: bool) -> list[dict[str, Any]]:
    rows = []
    for number, one in enumerate(made):
        names = ["prompt"] * len(one["prompt"]) + ["generated"] * len(one["completion"])
        rows.append(
            {
                "document": f"r{number}",
                "token": np.concatenate([one["prompt"], one["completion"]]).tolist(),
                "expert": one["expert"].tolist(),
                "weight": one["weight"].tolist(),
                "phase": len(one["prompt"]) if numbers else names,
            }
        )
    return rows


def plain_json(folder: Path, made: list[dict[str, Any]]) -> Path:
    return lines(folder / "plain.jsonl", plain_rows(made, numbers=False))


def plain_parquet(folder: Path, made: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(plain_rows(made, numbers=True)), folder / "plain.parquet", row_group_size=2)
    return folder / "plain.parquet"


def plain_npz(folder: Path, made: list[dict[str, Any]]) -> Path:
    """Rows padded with -1; the last token's experts are -1 in all layers."""
    width = max(len(one["prompt"]) + len(one["completion"]) for one in made)
    token = np.full((len(made), width), -1)
    expert = np.full((len(made), width, LAYERS, CHOICES), -1, np.int16)
    weight = np.zeros(expert.shape, np.float32)
    phase = np.full(token.shape, 255, np.uint8)
    for row, one in enumerate(made):
        both = np.concatenate([one["prompt"], one["completion"]])
        token[row, : len(both)], phase[row, : len(both)] = both, np.arange(len(both)) >= len(one["prompt"])
        expert[row, : len(one["expert"])], weight[row, : len(one["expert"])] = one["expert"], one["weight"]
    names = np.array([f"r{number}" for number in range(len(made))])
    np.savez(folder / "plain.npz", token=token, expert=expert, weight=weight, phase=phase, document=names)
    return folder / "plain.npz"


FORMS: dict[str, tuple[str, Callable[[Path, list[dict[str, Any]]], Path]]] = {
    "vllm 0.33, chat": ("vllm", vllm_http),
    "vllm 0.33, completions": ("vllm", vllm_completions),
    "vllm 0.21, HTTP": ("vllm", vllm_previous),
    "vllm 0.33, offline": ("vllm", vllm_offline),
    "vllm 0.21, offline": ("vllm", vllm_offline_previous),
    "sglang, generate": ("sglang", sglang_generate),
    "sglang, tagged": ("sglang", sglang_tagged),
    "sglang, openai": ("sglang", sglang_openai),
    "plain, JSON": ("plain", plain_json),
    "plain, Parquet": ("plain", plain_parquet),
    "plain, npz": ("plain", plain_npz),
}
