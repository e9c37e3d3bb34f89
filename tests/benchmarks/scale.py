"""Tens of thousands of shards, and many workers: `python tests/benchmarks/scale.py -o RESULT.json`, by hand.

Shards of 16 rows × 64 positions from a synthetic source of tokens, and the tests' fake model. Planned, captured through
Ray, captured again when there is nothing to do, listed by `jobs/status.py` and opened, at two sizes, each in its own
process: seconds, peak memory, and the number of requested objects. It also measures the driver's own speed: shards are
given to workers that do nothing.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
from fake_model import FakeRun, FakeTokenizer, fake_layout  # noqa: E402

from jobs import cluster  # noqa: E402
from jobs.capturing.captures import Capture, capture_datasets  # noqa: E402
from jobs.capturing.options import CaptureConfig  # noqa: E402
from jobs.sources.documents import Document, Source  # noqa: E402
from store import dataset_names, objects, open_capture  # noqa: E402

POSITIONS, ROWS = 64, 16
SIZES = (9_500, 38_000)
ACTORS = (1, 8, 64)
GIVEN = 3_000  # shards that are given to workers that do nothing
GPUS, SHARD_S = 256, 12.0  # of H200s, each 12 s a shard of 262,144 positions


class Tokens(FakeTokenizer):
    """A document is a number, and its tokens are drawn from it."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """A row of tokens each."""
        return [2 + (int(text) * 7919 % 997 + np.arange(POSITIONS, dtype=np.int32) ** 2) % 997 for text in texts]


class Idle:
    """A worker that reports its work as done."""

    def place(self) -> str:
        """The place of the worker."""
        return platform.node()

    def load(self, order: Any) -> dict[str, str]:
        """Nothing is loaded."""
        return {}

    def capture(self, dataset: str, shard: int) -> dict[str, Any]:
        """Nothing is captured."""
        return {"tokens": 1, "seconds": 0.0, "halvings": 0}

    def routed(self) -> int:
        """No token."""
        return 0


def source_of(shards: int) -> Source:
    """So many shards of full rows."""

    def read(start: int) -> Iterator[Document]:
        return (Document(name=str(number), text=str(number)) for number in islice(range(shards * ROWS), start, None))

    return Source(name="scale", read=read, identify=partial(dict, data="scale"), conversations=False)


def run_of(store: Path) -> Any:
    """A run of the fake model, of rows this short."""
    run = FakeRun(store, fake_layout(sequence_length=POSITIONS, rows_per_shard=ROWS), batch_tokens=ROWS * POSITIONS)
    run.tokenizer = Tokens()
    return run


def plan_only(run: Any, captures: Sequence[Capture]) -> None:
    """A `jobs.capturing.captures.Fill` that fills nothing."""
    for capture in captures:
        capture.planner.run()


def on_workers(number: int) -> Callable[[Any, Sequence[Capture]], None]:
    """A `jobs.capturing.captures.Fill` on so many workers of Ray, on CPUs."""

    def fill(run: Any, captures: Sequence[Capture]) -> None:
        config = CaptureConfig(store="unused", device="cpu", workers=number, cpus_per_worker=0.1)
        with cluster.connected(config) as connected:
            connected.capture(run, captures)

    return fill


# One measurement, in a process of its own


def measure(what: str, store: Path, number: int) -> dict[str, Any]:
    """Seconds and peak memory of one step, and the number of requested objects."""
    asked: Counter[str] = Counter()
    with counted(asked):
        started = time.perf_counter()
        own = DOES[what](store, number) or {}
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": round(seconds, 2), "peak_gib": round(peak, 3), "objects": dict(asked), **own}


def do_plan(store: Path, shards: int) -> None:
    """Text to rows."""
    capture_datasets(run_of(store), [("scale", source_of(shards))], plan_only)


def do_capture(store: Path, shards: int) -> None:
    """Capture the planned shards, on as many workers as there are cores."""
    capture_datasets(run_of(store), [("scale", source_of(shards))], on_workers(max(1, (os.cpu_count() or 2) - 2)))


def do_list(store: Path, _: int) -> None:
    """Count like `jobs/status.py`."""
    from jobs.status import main as status

    assert status([str(store)]) == 0


def do_open(store: Path, _: int) -> None:
    """And one row is read."""
    [name] = dataset_names(store)
    capture = open_capture(store, name)
    assert int(capture["expert"][-1, 0, 0, 0]) < 8


def do_nothing(store: Path, workers: int) -> dict[str, Any]:
    """All shards to workers that do nothing; the clock runs from the first answer to the last."""
    times: list[float] = []
    told = cluster.Progress.finished

    def finished(self: Any, worker: Any, unit: Any, facts: Mapping[str, Any]) -> None:
        times.append(time.perf_counter())
        told(self, worker, unit, facts)

    cluster.Replica = Idle  # type: ignore[assignment,misc]
    cluster.Progress.finished = finished  # type: ignore[method-assign]
    capture_datasets(run_of(store), [("scale", source_of(GIVEN))], on_workers(workers))
    middle = times[len(times) // 4 : 3 * len(times) // 4]  # all workers are there, and none is idle
    return {"shards_per_s": round((len(middle) - 1) / (middle[-1] - middle[0]))}


DOES: Mapping[str, Callable[[Path, int], dict[str, Any] | None]] = {
    "plan": do_plan,
    "capture": do_capture,
    "capture_again": do_capture,
    "list": do_list,
    "open": do_open,
    "dispatch": do_nothing,
}


@contextmanager
def counted(asked: Counter[str]) -> Iterator[None]:
    """Count the requests of this process to a store, by kind."""
    methods = {
        name: getattr(objects.LocalObjects, name)
        for name in ("get", "get_many", "sizes", "put", "put_new", "put_over", "delete", "list", "folders")
    }

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *given: Any) -> Any:
            several = given[-1] if name in ("get_many", "sizes") else [None]
            asked[name] += len(several)
            return method(self, *given)

        return call

    for name, method in methods.items():
        setattr(objects.LocalObjects, name, counting(name, method))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(objects.LocalObjects, name, method)


# All of them


def measured(what: str, store: Path, number: int) -> dict[str, Any]:
    """`measure`, in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, str(store), str(number)]
    path = os.pathsep.join(filter(None, [*sys.path[:3], os.environ.get("PYTHONPATH")]))  # for Ray's workers
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(what, number, json.dumps(found), flush=True)
    return found


def main() -> None:
    """Measure everything, and write the result after each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--actors", type=int, nargs="*", default=ACTORS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.measure:
        what, store, number = options.measure
        print(json.dumps(measure(what, Path(store), int(number))))
        return
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("ray", "zarr", "numpy")},
        "command": "python tests/benchmarks/scale.py -o RESULT.json",
        "shards": {},
        "dispatch": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for number in options.actors:
            store = Path(folder) / f"idle-{number}.zarr"
            measured("plan", store, GIVEN)
            result["dispatch"][str(number)] = measured("dispatch", store, number)
            options.output.write_text(json.dumps(result, indent=1) + "\n")
        best = max(each["shards_per_s"] for each in result["dispatch"].values())
        result["needed"] = {
            "gpus": GPUS,
            "seconds_a_shard": SHARD_S,
            "shards_per_s": round(GPUS / SHARD_S, 1),
            "driver_could_feed_gpus": round(best * SHARD_S),
        }
        for shards in options.sizes:
            store = Path(folder) / f"{shards}.zarr"
            done = ("plan", "capture", "capture_again", "list", "open")
            result["shards"][str(shards)] = {what: measured(what, store, shards) for what in done}
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
