"""The responses of SGLang's server with `return_routed_experts`, one per line.

Read from sglang 0.5.23: `sglang/srt/state_capturer/routed_experts.py`, `srt/managers/tokenizer_manager.py`,
`srt/managers/detokenizer_manager.py`, `srt/managers/io_struct.py` and `srt/entrypoints/openai/protocol.py`. The ids are
the bytes of an int32 array in base64, flat, in logical shape (tokens, layers, k) over *all* of the model's layers,
zeros at those without experts; k does not count a fused shared expert. They cover the tokens from the request's
`routed_experts_start_len` on, without the last one. `/generate` has them in `meta_info.routed_experts`, the OpenAI
forms in `choices[i].sgl_ext.routed_experts`.

A pull request of 2026 (sgl-project/sglang#31219, not in 0.5.23) tags narrower types as `routed_experts_dtype`, int32,
uint16 or uint8. If there is a tag, it is followed.

SGLang does not return the shape: k comes from the model or an option. Token ids are `output_ids` of `/generate`, and
the prompt's with the request option `return_prompt_token_ids`, or in the request as `input_ids`. A line is a response,
or `{"request": ..., "response": ...}`; `start` in it is the request's `routed_experts_start_len`.
"""

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.imports.files import integers, json_lines
from workers.imports.sequence import Asked, Routed

SUFFIXES = (".jsonl", ".json")
TYPES = {"int32": "<i4", "uint16": "<u2", "uint8": "u1", "int16": "<i2"}


def read(path: Path, asked: Asked) -> Iterator[Routed]:
    """The sequences of a file, one for each response or each choice of a response."""
    for where, line, size in json_lines(path):
        response, request = line.get("response", line), line.get("request", {})
        start = int(line.get("start", request.get("routed_experts_start_len", 0)))
        prompt = _first("prompt_token_ids", line, response) or _first("input_ids", line, response, request)
        answers = response.get("choices") or [response]
        for answer in answers:
            told = {**answer.get("meta_info", {}), **(answer.get("sgl_ext") or {})}
            output = _first("output_ids", answer) or _first("token_ids", answer)
            prompt_ids = _first("prompt_token_ids", answer) or prompt
            if prompt_ids is None or output is None:
                raise ValueError(
                    f"{where} has no {'output_ids' if prompt_ids else 'ids of the prompt'}: set"
                    " return_prompt_token_ids in the request, or add input_ids and output_ids to the line"
                )
            token = np.concatenate([integers(prompt_ids, where), integers(output, where)])
            tokens = len(token) - 1 - start
            yield Routed(
                name=str(told.get("id", response.get("id", where))),
                token=token,
                expert=_experts(told, tokens, asked, where),
                start=start,
                prompt=len(prompt_ids),
                size_bytes=size // len(answers),
            )


def _first(name: str, *places: Mapping[str, Any]) -> Any:
    return next((place[name] for place in places if place.get(name)), None)


def _experts(told: Mapping[str, Any], tokens: int, asked: Asked, where: str) -> NDArray[Any]:
    """The ids (tokens, layers, k), from flat bytes."""
    if not told.get("routed_experts"):
        raise ValueError(
            f"{where} has no routed_experts: start SGLang with --enable-return-routed-experts and set"
            " return_routed_experts in the request"
        )
    if asked.experts_per_token is None:
        raise ValueError("SGLang's ids are flat: give --experts_per_token, or a --model with a configuration")
    tag = told.get("routed_experts_dtype", "int32")
    if tag not in TYPES:
        raise ValueError(f"{where}: routed_experts_dtype is {tag!r}, but only {', '.join(TYPES)} are known")
    try:
        flat = np.frombuffer(base64.b64decode(told["routed_experts"], validate=True), TYPES[tag])
    except ValueError as error:
        raise ValueError(f"{where}: routed_experts is not base64 of {tag} ({error})") from error
    a_layer = tokens * asked.experts_per_token
    if a_layer < 1 or flat.size % a_layer:
        raise ValueError(
            f"{where}: {flat.size} ids cannot be divided among {tokens} tokens with {asked.experts_per_token} experts"
            " per layer: give the request's routed_experts_start_len as `start` in the line, if it had one"
        )
    return flat.reshape(tokens, -1, asked.experts_per_token)
