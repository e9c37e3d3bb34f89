"""The routes that the authors of OLMoE wrote for each block of text: JSON lines with the experts of all tokens.

Read from allenai/OLMoE at 8eb1b3d, `scripts/run_moe_analysis.py`: a line has `input_ids` (tokens),
`predicted_token_ids`, which is not kept, and `exp_ids` (tokens, k, layers) of all layers, sorted by descending router
logit.
"""

from collections.abc import Iterator
from pathlib import Path

from workers.imports.files import integers, json_lines
from workers.imports.sequence import Asked, Routed

SUFFIXES = (".jsonl", ".json")


def read(path: Path, asked: Asked) -> Iterator[Routed]:
    """The sequences of a file, one for each block."""
    for number, (where, line, size) in enumerate(json_lines(path)):
        if missing := [name for name in ("input_ids", "exp_ids") if name not in line]:
            raise ValueError(f"{where} has no {missing[0]}; it has {', '.join(line)}")
        expert = integers(line["exp_ids"], f"{where}, exp_ids")
        if expert.ndim != 3:
            raise ValueError(f"{where}: exp_ids has the shape {expert.shape}, but must have (tokens, k, layers)")
        yield Routed(
            name=f"{path.stem} {number}",
            token=integers(line["input_ids"], f"{where}, input_ids"),
            expert=expert.transpose(0, 2, 1),
            size_bytes=size,
        )
