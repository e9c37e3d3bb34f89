"""Import ten million tokens of another engine's routes: rate and memory, compared with planning text; by hand.

vLLM's forms of Mixtral 8x7B's size (32 layers, two of eight experts), HTTP responses as JSON lines and offline outputs
as npz, of completions of 256 to 2,048 tokens; then as many tokens planned from real text in the same run, as
`planning.py` does. Each runs in its own process, whose peak memory is reported.
"""

import argparse
import base64
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from planning import plan  # noqa: E402

from jobs import import_routes  # noqa: E402

LAYERS, EXPERTS, CHOICES, VOCABULARY = 32, 8, 2, 32_000
TEXT_TOKENS = 2_614_000  # of demo:prose, about
PARTS = 8  # files


def completions(tokens: int) -> Iterator[dict[str, Any]]:
    """Requests with routes that repeat like those of real models: a token's experts mostly follow from its id."""
    random, made = np.random.default_rng(0), 0
    usual = random.random((VOCABULARY, LAYERS, EXPERTS)).argsort(-1)[..., :CHOICES].astype(np.uint8)
    while made < tokens:
        size = int(random.integers(256, 2049))
        token = (random.pareto(1.0, size) * 20).astype(np.int64) % VOCABULARY
        expert = usual[token[:-1]]
        other = random.random(expert.shape[:2]) < 0.5
        expert[other] = usual[random.integers(0, VOCABULARY, int(other.sum())), 0]
        prompt = size // 4
        yield {"prompt": token[:prompt], "completion": token[prompt:], "expert": expert}
        made += size


def write(folder: Path, tokens: int, form: str) -> list[Path]:
    """Files of such completions."""
    files = []
    for part in range(PARTS):
        some = list(completions(tokens // PARTS)) if form == "npz" else completions(tokens // PARTS)
        path = folder / f"{part}.{form}"
        if form == "npz":
            arrays = {}
            for number, one in enumerate(some):
                arrays |= {f"{number}.prompt_token_ids": one["prompt"], f"{number}.token_ids": one["completion"]}
                arrays[f"{number}.routed_experts"] = one["expert"]
            np.savez(path, **arrays)
        else:
            with path.open("w") as file:
                file.writelines(f"{json.dumps(_response(number, one))}\n" for number, one in enumerate(some))
        files.append(path)
    return files


def _response(number: int, one: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, one["expert"])
    encoded = base64.b64encode(buffer.getvalue()).decode()
    choice = {"index": 0, "token_ids": one["completion"].tolist(), "routed_experts": encoded}
    return {"id": f"r{number}", "choices": [choice], "prompt_token_ids": one["prompt"].tolist()}


def measured(what: str, folder: Path, tokens: int) -> dict[str, float]:
    """Do one of them in this process."""
    files = sorted(folder.glob(f"*.{what}"))
    wall, cpu = time.perf_counter(), time.process_time()
    if what == "text":
        done = int(plan(folder, max(1, tokens // TEXT_TOKENS))["tokens"])
    else:
        options = ["--format", "vllm", "--model", "mixtral", "--num_experts", str(EXPERTS), "--name", "imported"]
        assert import_routes.main([*map(str, files), *options, "--store", str(folder / "s.zarr")]) == 0
        done = tokens
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    told = Path("/proc/self/status").read_text()  # of this program: `resource` also counts what ran before its exec
    peak = 1024 * int(told.partition("VmHWM:")[2].split()[0])
    return {"tokens": done, "tokens_per_s": done / wall, "tokens_per_cpu_s": done / cpu, "peak_bytes": peak}


def in_a_process(what: str, tokens: int) -> dict[str, float]:
    """Measure one of them in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        files = [] if what == "text" else write(Path(name), tokens, what)
        command = [sys.executable, __file__, "--what", what, "--folder", name, "--tokens", str(tokens)]
        done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found: dict[str, float] = json.loads(done.splitlines()[-1])
        return found | {"file_bytes": sum(path.stat().st_size for path in files)}


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--what", choices=["jsonl", "npz", "text"], help="measure this only, in --folder, and print")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "importing.json")
    options = parser.parse_args()
    if options.what:
        found = measured(options.what, options.folder, options.tokens)
        print(json.dumps({name: round(value) for name, value in found.items()}))
        return
    results, ratios = {}, {}
    for form in ("jsonl", "npz"):
        planned = in_a_process("text", options.tokens)  # measured with each, because the load of the machine varies
        few, many = (in_a_process(form, tokens) for tokens in (options.tokens // 10, options.tokens))
        results[form] = {"planned from text": planned, "a tenth of the tokens": few, "imported": many}
        ratios[form] = {name: round(many[name] / planned[name], 2) for name in ("tokens_per_s", "tokens_per_cpu_s")}
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "zarr", "numcodecs", "tokenizers")},
        "measured": results,
        "rate_over_planning": ratios,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
