"""The time that scripts take before their first output: help, and a question that was asked before; by hand.

Processor time of whole processes, as ratios to what the libraries alone take to load in the same run: each round starts
all of them once, so that other work on the machine affects all equally.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_model import fake_capture, words  # noqa: E402

LIBRARIES = {
    "tyro, rich": "import tyro, rich",
    "xarray, zarr": "import xarray, zarr",
    "xarray, zarr, and one variable": "import xarray, zarr; xarray.Variable('x', [1.0])",  # this loads dask.array
}
RATIOS = {
    "help of capture": "tyro, rich",
    "help of query": "tyro, rich",
    "help of expert-atlas": "tyro, rich",
    "status": "xarray, zarr",
    "query, kept": "xarray, zarr",
}


def cpu_s(command: Sequence[str]) -> float:
    """Processor time of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(store: Path) -> dict[str, list[str]]:
    """What is started, by name."""
    python = [sys.executable]
    atlas = "import sys; sys.argv = ['expert-atlas', '--help']; from jobs.console.command import main; main()"
    return {
        **{name: [*python, "-c", code] for name, code in LIBRARIES.items()},
        "help of capture": [*python, "jobs/capture.py", "--help"],
        "help of query": [*python, "jobs/query.py", "--help"],
        "help of expert-atlas": [*python, "-c", atlas],
        "status": [*python, "jobs/status.py", str(store)],
        "query, kept": [*python, "jobs/query.py", str(store / "a"), "--token_id", "17"],
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results" / "starting.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        store = Path(name) / "s.zarr"
        fake_capture(store, [words(40, 0), words(30, 1)], "a")
        started = commands(store)
        for command in started.values():
            cpu_s(command)  # bytecode is written, and the answer is kept
        rounds = [{name: cpu_s(command) for name, command in started.items()} for _ in range(options.rounds)]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("tyro", "rich", "xarray", "zarr", "dask")},
        "rounds": options.rounds,
        "median_cpu_s": {name: round(statistics.median(each[name] for each in rounds), 3) for name in started},
        "median_ratio": {
            f"{name} / {of}": round(statistics.median(each[name] / each[of] for each in rounds), 2)
            for name, of in (*RATIOS.items(), ("query, kept", "xarray, zarr, and one variable"))
        },
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
