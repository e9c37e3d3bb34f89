"""The explorer's response times: `python tests/benchmarks/explore.py -o RESULT.json`, by hand.

Creates a synthetic store of Mixtral's shape, indexes it with the real command, and requests typical pages from the real
server: tokens by frequency and rare ones, experts, pages of text, searches. All are requested once in random order, one
after the other, over new connections; a second round has four concurrent visitors.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from synthetic_store import EXPERTS, LAYERS, VOCABULARY, make_store  # noqa: E402

ASKED = 200  # of each kind
WARM_S = 30  # until the other processes have read the index, of a hundred million tokens (arbitrary)
NAME = "synthetic"


def addresses(documents: int) -> dict[str, list[str]]:
    """The requests, by kind."""
    draw = random.Random(0)
    weights = [1 / rank for rank in range(1, VOCABULARY + 1)]
    frequent = draw.choices(range(VOCABULARY), weights, k=ASKED)
    any_token = [draw.randrange(VOCABULARY) for _ in range(ASKED)]
    place = lambda: f"layer={draw.randrange(LAYERS)}&expert={draw.randrange(EXPERTS)}"
    return {
        "page of text": [f"document/{draw.randrange(documents)}?page={draw.randint(1, 12)}" for _ in range(ASKED)],
        "token, as frequent as in text": [f"token/{token}" for token in frequent],
        "token at an expert, as frequent as in text": [f"token/{token}?{place()}" for token in frequent],
        "token at an expert, any": [f"token/{token}?{place()}" for token in any_token],
        "the most frequent token at an expert, page 1,000": [f"token/0?{place()}&page=1000" for _ in range(ASKED)],
        "expert": [f"expert/{draw.randrange(LAYERS)}/{draw.randrange(EXPERTS)}" for _ in range(ASKED)],
        "search": [f"search?q={draw.randrange(VOCABULARY)}" for _ in range(ASKED)],
        "data set": ["" for _ in range(ASKED)],
    }


def seconds(url: str) -> float:
    """Seconds until the last byte of an answer."""
    started = time.perf_counter()
    with urllib.request.urlopen(url, timeout=60) as answer:
        answer.read()
    return time.perf_counter() - started


def told(times: list[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    half, most, all_but_one = np.percentile(times, [50, 95, 99]) * 1000
    return {"p50_ms": round(half, 1), "p95_ms": round(most, 1), "p99_ms": round(all_but_one, 1),
            "max_ms": round(1000 * max(times), 1)}  # fmt: skip


def main() -> None:
    """Make the store, index it, ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--store", type=Path, help="made there, and kept; default a temporary folder")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="that answer")
    parser.add_argument("--beside", default="nothing", help="what else the machine was doing, in words")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = options.store or Path(folder) / "store.zarr"
        if not store.exists():
            make_store(store, options.tokens, name=NAME)
        result = measured(store, options.processes)
    result["command"] = "python tests/benchmarks/explore.py -o RESULT.json"
    result["beside"] = options.beside
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def measured(store: Path, processes: int) -> dict[str, Any]:
    """The index made and the pages asked for."""
    command = [sys.executable, str(ROOT / "jobs" / "explore.py"), str(store), "--port", "0"]
    command += ["--processes", str(processes)]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            base = server.stdout.readline().strip()
            state: dict[str, Any] = {"busy": True}
            listening = time.monotonic() - started
            while state["busy"]:
                time.sleep(0.5)
                with urllib.request.urlopen(f"{base}-/state.json", timeout=60) as answer:
                    [state] = json.load(answer)["sets"]
            indexed = time.monotonic() - started
            time.sleep(1 if processes == 1 else WARM_S)
            return {
                "date": datetime.now(UTC).date().isoformat(),
                "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
                "versions": {name: version(name) for name in ("zarr", "numpy", "starlette", "uvicorn", "jinja2")},
                "processes": processes,
                "load_average": round(os.getloadavg()[0], 1),
                "tokens": state["tokens_done"],
                "seconds_to_the_first_page": round(listening, 1),
                "seconds_to_index": round(indexed, 1),
                "index_bytes_a_token": round(size(Path(f"{store}.results")) / state["tokens_done"], 1),
                **asked(base, state["documents"]),
                "server_gib_beside_the_mapped_index": round(own_memory(server.pid) / 2**30, 2),
            }
        finally:
            server.terminate()


def asked(base: str, documents: int) -> dict[str, Any]:
    """Seconds of the answers, by kind and of all together."""
    urls = [(kind, f"{base}{NAME}/{place}") for kind, places in addresses(documents).items() for place in places]
    random.Random(1).shuffle(urls)
    found: dict[str, list[float]] = {}
    for kind, url in urls:
        found.setdefault(kind, []).append(seconds(url))
    with ThreadPoolExecutor(4) as visitors:
        together = list(visitors.map(seconds, [url for _, url in urls]))
    return {
        "one_visitor": told([each for times in found.values() for each in times]),
        "by_kind": {kind: told(times) for kind, times in found.items()},
        "four_visitors": told(together),
        "ratio_of_p95": round(float(np.percentile(together, 95) / np.percentile([*chain(*found.values())], 95)), 2),
    }


def own_memory(pid: int) -> int:
    """Bytes of a process that are not backed by a file."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


def size(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
