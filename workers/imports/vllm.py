"""The output of vLLM with `enable_return_routed_experts`: npz files of offline outputs, and HTTP responses.

Read from vllm 0.33.0 and, where the API differs, 0.21.0: `vllm/outputs.py`, `vllm/v1/engine/output_processor.py`,
`vllm/model_executor/layers/fused_moe/routed_experts_capturer.py`, `vllm/utils/serial_utils.py`, and `protocol.py` of
`vllm/entrypoints/openai/chat_completion`, `.../completion` and `vllm/entrypoints/scale_out/token_in_token_out`.

- **0.33** (since 0.22): one array of S - 1 tokens, prompt and completion together, (tokens, layers, k) over *all* of
  the model's layers, zeros at those without experts; uint8 up to 256 experts, uint16 beyond. Over HTTP it is
  `choices[i].routed_experts`, the array's `.npy` bytes in base64. A request's `routed_experts_prompt_start` omits that
  many of the prompt's first tokens, and responses do not say so.
- **0.21**: `prompt_routed_experts` of the request and `routed_experts` of each completion, int16, over the layers that
  have experts; over HTTP nested lists under the same names. Preemption drops routes silently.

Token ids come with the request option `return_token_ids`: `prompt_token_ids` on the response or the choice, `token_ids`
on the choice. Files:

- **JSON lines**: one response per line; or `{"request": ..., "response": ...}`, where `routed_experts_prompt_start` and
  a prompt of token ids are taken from the request. If the prompt's ids are not known, a line may have its own
  `prompt_token_ids`.
- **npz**: the arrays of each completion under its number: `0.prompt_token_ids`, `0.token_ids`, `0.routed_experts`, and
  optionally `0.prompt_routed_experts` and `0.start`.
"""

import base64
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.imports.files import arrays_of, integers, json_lines
from workers.imports.sequence import Asked, Routed

SUFFIXES = (".npz", ".jsonl", ".json")


def read(path: Path, asked: Asked) -> Iterator[Routed]:
    """The sequences of a file, one for each completion."""
    yield from _offline(path) if path.suffix == ".npz" else _responses(path)


def _offline(path: Path) -> Iterator[Routed]:
    with arrays_of(path) as arrays:
        names = {name.partition(".")[0] for name in arrays}
        if wrong := sorted(name for name in names if not name.isdecimal()):
            raise ValueError(
                f"{path} holds {wrong[0]!r}: arrays are named by the number of their completion, such as"
                " 0.prompt_token_ids, 0.token_ids and 0.routed_experts"
            )
        for number in sorted(names, key=int):
            own = {
                name: arrays[f"{number}.{name}"]
                for name in ("prompt_token_ids", "token_ids", "prompt_routed_experts", "routed_experts", "start")
                if f"{number}.{name}" in arrays
            }
            size = sum(array.nbytes for array in own.values())
            start = int(own.pop("start", np.array(0)))
            yield _routed(f"{path.stem} {number}", f"{path}, completion {number}", own, start, size)


def _responses(path: Path) -> Iterator[Routed]:
    for where, line, size in json_lines(path):
        response, request = line.get("response", line), line.get("request", {})
        choices = response.get("choices")
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"{where} has no choices: it must be a response of vLLM's server")
        start = line.get("start", request.get("routed_experts_prompt_start", 0))
        for choice in choices:
            ids = _prompt_ids(line, response, request, choice)
            own = {
                "prompt_token_ids": ids,
                "token_ids": choice.get("token_ids"),
                "prompt_routed_experts": response.get("prompt_routed_experts") or choice.get("prompt_routed_experts"),
                "routed_experts": choice.get("routed_experts"),
            }
            known = {name: _array(value, f"{where}, {name}") for name, value in own.items() if value is not None}
            name = f"{response.get('id', where)}" + (f" {choice.get('index')}" if len(choices) > 1 else "")
            yield _routed(name, where, known, int(start), size // len(choices))


def _prompt_ids(*places: Mapping[str, Any]) -> Any:
    """The prompt's ids, from the first place that has them."""
    for place in places:
        for name in ("prompt_token_ids", "token_ids") if place is places[2] else ("prompt_token_ids",):
            if place.get(name) is not None:
                return place[name]
    prompt = places[2].get("prompt")
    return prompt if isinstance(prompt, list) and all(isinstance(token, int) for token in prompt) else None


def _array(value: Any, where: str) -> NDArray[Any]:
    """Nested lists, or the `.npy` bytes of an array in base64."""
    if not isinstance(value, str):
        return integers(value, where)
    try:
        return np.asarray(np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False))
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{where} is not an array in base64 ({error})") from error


def _routed(name: str, where: str, own: Mapping[str, NDArray[Any]], start: int, size: int) -> Routed:
    """One completion, with the routes of its prompt and its own joined."""
    for wanted in ("prompt_token_ids", "token_ids"):
        if wanted not in own:
            raise ValueError(f"{where} has no {wanted}: set return_token_ids in the request, or add them")
    experts = [own[name] for name in ("prompt_routed_experts", "routed_experts") if name in own and own[name].size]
    if not experts:
        raise ValueError(
            f"{where} has no routed_experts: start vLLM with enable_return_routed_experts; a request that was aborted"
            " or preempted has none"
        )
    prompt, completion = own["prompt_token_ids"], own["token_ids"]
    return Routed(
        name=name,
        token=np.concatenate([prompt, completion]).astype(np.int64),
        expert=experts[0] if len(experts) == 1 else np.concatenate(experts),
        start=start,
        prompt=len(prompt),
        size_bytes=size,
    )
